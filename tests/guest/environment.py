"""Programs that are compared with, each in a Python environment of its own: none is a dependency of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from ci.vm import image


def interpreter(package: str, version: str) -> Path:
    """Python of an environment that has this version of a PyPI package: from the cache, or made now."""
    cache = Path(os.environ.get("VMISHIM_CACHE") or Path.home() / ".cache" / "vmishim") / "environments"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{package}-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    with image.locked(cache / f"{package}.lock"):
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", f"{package}=={version}"]
            subprocess.run(pip, check=True)
            (folder / "complete").touch()
    return python
