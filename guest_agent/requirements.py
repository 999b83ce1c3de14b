"""What the agent needs on its machine beside Python: found out before anything that needs it is imported.

This module and ``__main__`` import the standard library only, so that ``agent.pyz --help`` and ``check`` work on a
machine that has nothing else, and name what is missing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Package:
    """A package that the agent uses.

    :ivar name: as its own project calls it, which for Python packages is the name on PyPI
    :ivar module: the Python module to import; empty for a C library
    :ivar library: the C library to load; empty for a Python package
    :ivar oldest: the oldest major version that works, for Python packages
    :ivar debian: the package of Debian and Ubuntu that has it
    """

    name: str
    debian: str
    module: str = ""
    library: str = ""
    oldest: int = 0


CRYPTOGRAPHY = Package("cryptography", "python3-cryptography", module="cryptography", oldest=38)
PYZMQ = Package("pyzmq", "python3-zmq", module="zmq", oldest=24)
LIBBPF = Package("libbpf", "libbpf1", library="libbpf.so.1")
LIBSECCOMP = Package("libseccomp", "libseccomp2", library="libseccomp.so.2")
ALL = (PYZMQ, CRYPTOGRAPHY, LIBBPF, LIBSECCOMP)
"""What ``serve`` needs."""


def missing(packages: Sequence[Package]) -> list[str]:
    """A line for each package that is missing or too old, and one that says how to install them all; none if nothing is
    missing."""
    found = [(package, why) for package in packages if (why := _why_unusable(package))]
    lines = [f"{package.name} {why}" for package, why in found]
    return [*lines, *_remedies([package for package, _ in found])]


def _why_unusable(package: Package) -> str:
    """Why a package can't be used; empty if it can."""
    try:
        if package.library:
            ctypes.CDLL(package.library)
            return ""
        version = str(import_module(package.module).__version__)
    except (ImportError, OSError) as error:
        return f"is not installed ({error})"
    if int(version.partition(".")[0]) < package.oldest:
        return f"{version} is too old; {package.oldest} is the oldest supported"
    return ""


def _remedies(packages: Sequence[Package]) -> Iterator[str]:
    # In a virtual environment, Debian's Python packages are of no use.
    by_pip = [package for package in packages if package.module and sys.prefix != sys.base_prefix]
    by_apt = [package.debian for package in packages if package not in by_pip]
    if by_apt:
        yield f"install what is missing: apt install {' '.join(by_apt)}"
    if by_pip:
        wanted = " ".join(f"'{package.name}>={package.oldest}'" for package in by_pip)
        yield f"install what is missing: {sys.executable} -m pip install {wanted}"
