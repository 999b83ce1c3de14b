"""Build the tests' own kernel modules against Debian's headers of a lab kernel."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lab import headers as debian
from lab.cache import cache, locked


class ModuleError(Exception):
    """A module cannot be built; the text says why."""


def build(folder: Path, release: str) -> Path:
    """Return the module for the kernel whose ``uname -r`` is ``release``, from the cache or compiled with kbuild.

    :param folder: its source, ``FOLDER/FOLDER.c``, beside its ``Kbuild``

    Raises ModuleError if that fails, HeadersError if Debian's packages cannot be had.
    """
    sources = [folder / f"{folder.name}.c", folder / "Kbuild"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    built = cache() / f"{folder.name}-{release}-{digest}.ko"
    headers = debian.headers(release)
    with locked(cache() / f"{folder.name}.lock"):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=cache()) as name:
                _compile(sources, headers, Path(name)).rename(built)
    return built


def _compile(sources: list[Path], headers: Path, work: Path) -> Path:
    # The headers link to the build tools by a relative path, so make a tree of hard links that holds both.
    tree = work / "tree"
    shutil.copytree(headers.parents[2], tree, symlinks=True, copy_function=os.link)
    tools = Path(os.readlink(headers / "scripts")).parent.name
    debian.download(work, tools)
    (package,) = work.glob(f"{tools}_*.deb")
    _run("dpkg-deb", "-x", package, tree)
    place = work / sources[0].stem
    place.mkdir()
    for source in sources:
        shutil.copy(source, place)
    (common,) = (tree / "usr" / "src").glob("linux-headers-*-common")
    # Named explicitly: the flavour's Makefile includes it by its installed path.
    makefile = common / "Makefile"
    flavour = tree / headers.relative_to(headers.parents[2])
    # Without BTF for the module, which would need pahole.
    _run("make", "-s", "-C", flavour, "-f", makefile, f"M={place}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules")
    module = place / f"{place.name}.ko"
    _run("strip", "--strip-debug", module)
    return module


def _run(*argv: str | Path) -> None:
    words = [str(word) for word in argv]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ModuleError(f"{words[0]} failed with status {done.returncode}: {done.stdout.strip()[-1000:]}")
