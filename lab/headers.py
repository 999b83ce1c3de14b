"""The headers of a lab kernel, to compile against: Debian's packages, unpacked in the lab's cache."""

import re
import subprocess
import tempfile
from pathlib import Path

from lab.cache import cache, locked
from lab.debian import KEYRING, sources


class HeadersError(Exception):
    """The headers of a kernel can't be fetched or unpacked; the text says why."""


def headers(release: str) -> Path:
    """Return the folder of ``linux-headers-RELEASE``, from the cache or downloaded. Needs no root, no Debian host.

    Raises HeadersError if Debian has no such packages (any more), or cannot be reached.
    """
    kept = cache() / f"headers-{release}"
    found = kept / "usr" / "src" / f"linux-headers-{release}"
    with locked(cache() / "headers.lock"):
        if not found.exists():
            common = re.sub(r"-(cloud-)?amd64$", "-common", release)
            with tempfile.TemporaryDirectory(dir=cache()) as name:
                folder = Path(name)
                download(folder, f"linux-headers-{release}", f"linux-headers-{common}")
                for package in folder.glob("*.deb"):
                    _run("dpkg-deb", "-x", str(package), str(folder / "root"))
                (folder / "root").rename(kept)
    return found


def download(folder: Path, *packages: str) -> None:
    """Download Debian packages of the lab's suite into a folder.

    Raises HeadersError if Debian has no such packages (any more), or cannot be reached.
    """
    lines = sources(f"[signed-by={KEYRING}]")
    (folder / "sources.list").write_text("".join(f"{line}\n" for line in lines))
    (folder / "lists" / "partial").mkdir(parents=True)
    # A separate apt state: this host may run another suite, or not Debian, and its own lists stay as they are.
    options = ["Dir::Etc::sourcelist", folder / "sources.list", "Dir::Etc::sourceparts", "-", "Dir::State::lists"]
    options += [folder / "lists", "Dir::State::status", "/dev/null", "Dir::Cache", folder, "APT::Sandbox::User", ""]
    options += ["APT::Architecture", "amd64", "Acquire::Languages", "none"]
    words = [
        word for name, value in zip(options[::2], options[1::2], strict=True) for word in ("-o", f"{name}={value}")
    ]
    _run("apt-get", *words, "-qq", "update", folder=folder)
    _run("apt-get", *words, "-qq", "download", *packages, folder=folder)


def _run(*argv: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except FileNotFoundError as error:
        raise HeadersError(f"{argv[0]} is not installed: {error.strerror}") from None
    if done.returncode:
        raise HeadersError(f"{argv[0]} failed: {done.stdout.strip()[-400:]}")
