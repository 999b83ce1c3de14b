"""``libvmi.so.0`` and C programs that use it, compiled for tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from vmishim import program

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "compat" / "capi"


@cache
def builder() -> ModuleType:
    """``compat/capi/build.py``, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("build_capi", SOURCES / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library() -> Path:
    """The library of this checkout, built if its sources are newer."""
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".py"))
    if not program.LIBRARY.is_file() or program.LIBRARY.stat().st_mtime < newest:
        builder().build(program.LIBRARY.resolve())
    return program.LIBRARY


def compiled(source: Path, output: Path, *options: str) -> Path:
    """A program that uses ``libvmi.so.0``, by our declarations of it."""
    compiler = builder()._compiler()
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *options]
    libraries = [f"-L{library().parent}", "-l:libvmi.so.0", "-ldl", "-lpthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(output), *libraries], check=True)
    return output


def environment(config: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a program that uses our library.

    :param config: the ``domains.toml`` that it finds
    """
    ours = {
        "LD_LIBRARY_PATH": str(library().parent),
        "VMISHIM_PYTHON": sys.executable,
        "VMISHIM_CONFIG": str(config),
        "HOME": str(config.parent),
    }
    return {**os.environ, **ours, **(more or {})}
