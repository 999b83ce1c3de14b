"""Compile ``libvmi.so.0`` for the Python that runs this file: ``python -I build.py [OUTPUT]``.

Needs a C compiler (``CC``, or gcc or clang), the headers of that Python, and its shared library: on Debian and Ubuntu
the packages gcc and python3-dev. Needs nothing but the standard library, and is no module of ``vmishim``: the build of
the wheel runs it before there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libvmi.so.0"
SOURCES = ("libvmi.c", "refused.c", "peparse.c", "python.c")
FLAGS = (
    *(
        "-std=gnu11",
        "-O2",
        "-g1",
        "-fno-strict-aliasing",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ),
    # What was started in the library, Python, cannot be unloaded.
    *("-Wl,-soname,libvmi.so.0", "-Wl,-z,nodelete", "-Wl,-z,now", "-Wl,-z,relro", "-Wl,--no-undefined"),
)


class BuildError(Exception):
    """It cannot be built; the text says what is missing."""


def build(output: Path = LIBRARY, *options: str) -> Path:
    """Compile it.

    :param options: more for the compiler
    :raises BuildError: something is missing, or the compiler failed
    """
    command = [_compiler(), *FLAGS, *options, *_python(), "-o"]
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the place where it will be: a program that has the old one loaded keeps it.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        made = Path(folder, output.name)
        sources = [str(HERE / name) for name in SOURCES]
        done = subprocess.run(
            [*command, str(made), *sources, *_libraries()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()] or [
                done.stderr.strip()
            ]
            raise BuildError(f"{command[0]} failed: {said[0]}")
        made.chmod(0o755)
        made.replace(output)
    return output


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "gcc-12", "clang-16", "cc")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C compiler is installed: apt install gcc")


def _python() -> list[str]:
    """Where the headers are, and which interpreter this is."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise BuildError(f"there is no {include}/Python.h: apt install python3-dev")
    return [f"-I{include}", f'-DVMISHIM_PYTHON="{_interpreter()}"']


def _interpreter() -> str:
    """The interpreter, in whose environment the library looks for vmishim if its own place says nothing."""
    return sys.executable


def _libraries() -> list[str]:
    name, version = str(sysconfig.get_config_var("LDLIBRARY")), sysconfig.get_config_var("LDVERSION")
    folder = Path(str(sysconfig.get_config_var("LIBDIR")))
    if not sysconfig.get_config_var("Py_ENABLE_SHARED") or not (folder / name).exists():
        raise BuildError(
            f"{sys.executable} has no shared library libpython{version}.so, which a C program needs: use the system's "
            "Python (apt install python3-dev), or one that was configured with --enable-shared"
        )
    path = [] if folder in map(Path, ("/usr/lib", "/usr/lib/x86_64-linux-gnu")) else [f"-Wl,-rpath,{folder}"]
    return [f"-L{folder}", f"-lpython{version}", *path, "-ldl", "-lpthread"]


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY))
    except BuildError as error:
        sys.exit(f"libvmi.so.0 was not built: {error}")
