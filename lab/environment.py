"""Programs to compare with, each in its own Python environment: none is a dependency of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from lab.cache import locked
from lab.vm import LabVM

LIBVMI = "3.7.1"
"""Version of the genuine bindings."""
UNMOVED = "0000000001000000 A phys_startup_64\n"
"""What LibVMI's file driver needs in addition to kallsyms: where a kernel without KASLR is."""


class MissingError(Exception):
    """A package can't be installed; the text says why."""


def interpreter(package: str, version: str) -> Path:
    """Return the Python of an environment with this version of a PyPI package, from the cache or newly made.

    :raises MissingError: pip cannot get it
    """
    cache = Path(os.environ.get("VMISHIM_CACHE") or Path.home() / ".cache" / "vmishim") / "environments"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{package}-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    with locked(cache / f"{package}.lock"):
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            pip = [
                str(python),
                "-I",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--only-binary",
                ":all:",
            ]
            done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
                raise MissingError(f"pip cannot install {package} {version}: {last.removeprefix('ERROR: ')}")
            (folder / "complete").touch()
    return python


def genuine() -> Path:
    """Return the Python that has the genuine LibVMI bindings: ``VMISHIM_GENUINE_PYTHON``, or one in the cache.

    :raises MissingError: pip cannot get them
    """
    given = os.environ.get("VMISHIM_GENUINE_PYTHON")
    return Path(given) if given else interpreter("libvmi", LIBVMI)


def symbol_map(vm: LabVM) -> str:
    """The ``sysmap`` of a lab VM that was booted with ``nokaslr``, for LibVMI's file driver."""
    return UNMOVED + vm.kallsyms().decode()
