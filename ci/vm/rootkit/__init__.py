"""A rootkit of our own, for intrusion detection to find: built against Debian's headers of a lab kernel, loaded into a
lab VM."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ci.vm import headers as debian
from ci.vm import image as images
from ci.vm.lab import LabVM

HERE = Path(__file__).parent
SOURCES = ("rootkit.c", "Kbuild")
PLACE = "/run/rootkit.ko"
COMMAND = "/sys/module/rootkit/parameters/command"


class RootkitError(Exception):
    """The module cannot be built; the text says why."""


def build(release: str) -> Path:
    """Return the module for the kernel of that ``uname -r``: from the cache, or compiled with Debian's own kbuild.

    Raises RootkitError if that fails, HeadersError if Debian's packages cannot be had.
    """
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    built = images.cache() / f"rootkit-{release}-{digest}.ko"
    folder = debian.headers(release)
    with images.locked(images.cache() / "rootkit.lock"):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=images.cache()) as name:
                _compile(folder, Path(name)).rename(built)
    return built


def _compile(headers: Path, work: Path) -> Path:
    # The headers' links lead to the tools at a place beside them: a tree of hard links has both, and stays as unpacked.
    tree = work / "tree"
    shutil.copytree(headers.parents[2], tree, symlinks=True, copy_function=os.link)
    tools = Path(os.readlink(headers / "scripts")).parent.name
    debian.download(work, tools)
    (package,) = work.glob(f"{tools}_*.deb")
    _run("dpkg-deb", "-x", package, tree)
    sources = work / "sources"
    sources.mkdir()
    for name in SOURCES:
        shutil.copy(HERE / name, sources)
    (common,) = (tree / "usr" / "src").glob("linux-headers-*-common")
    # Named, since the Makefile of the flavour includes it by the path it has when installed.
    makefile = common / "Makefile"
    place = tree / headers.relative_to(headers.parents[2])
    # Without types of its own, which it takes pahole to make.
    _run("make", "-s", "-C", place, "-f", makefile, f"M={sources}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules")
    module = sources / "rootkit.ko"
    _run("strip", "--strip-debug", module)
    return module


def _run(*argv: str | Path) -> None:
    words = [str(word) for word in argv]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RootkitError(f"{words[0]} failed with status {done.returncode}: {done.stdout.strip()[-1000:]}")


class Rootkit:
    """The module in a running lab VM.

    :param vm: where it is loaded
    :raises ci.vm.lab.CommandError: the kernel does not take it
    """

    def __init__(self, vm: LabVM) -> None:
        self.vm = vm
        self.symbols = _addresses(vm)
        vm.write(PLACE, build(vm.image.release).read_bytes())
        places = (f"{name}_at={self.symbols[name]:#x}" for name in ("tasklist_lock", "modules"))
        vm.run("insmod", PLACE, *places)
        self.symbols = _addresses(vm)

    def do(self, verb: str, *numbers: int) -> None:
        """Give a command of ``rootkit.c``. :raises ci.vm.lab.CommandError: the module refused it"""
        line = " ".join([verb, *map(hex, numbers)])
        self.vm.run("sh", "-c", 'printf %s "$1" >"$2"', "sh", line, COMMAND)

    def restore(self) -> None:
        """Undo all that was done."""
        self.do("restore")

    def unload(self) -> None:
        """Undo all, and leave."""
        self.restore()
        self.vm.run("rmmod", "rootkit")


def _addresses(vm: LabVM) -> dict[str, int]:
    """Addresses of the kernel's symbols, and of its modules'; of names that occur twice the first."""
    found: dict[str, int] = {}
    for line in vm.kallsyms().decode().splitlines():
        address, _, name, *_ = line.split()
        found.setdefault(name, int(address, 16))
    return found
