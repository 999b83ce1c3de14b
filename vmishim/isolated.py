"""Child processes that run only code of this installation and of the system.

``python -m`` puts the working folder before everything else, ``PYTHONPATH`` any folder, and ``PATH`` may name folders
that others can write: as root, each would run code of another user. So every child is started through this module.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[1])
"""The folder that has this package, and ``guest_agent`` beside it."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""sudo's usual ``secure_path``."""
KEPT = {"LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "TMPDIR", "TZ"}
"""Variables of ours that a child gets: none decides which code it runs."""

# Our folder comes after the standard library, so that no package there can replace a module of it, and before other
# packages, so that the child gets this very installation. `sys` is built in: nothing is imported before.
_START = """\
import sys
folder, module = sys.argv[1:3]
del sys.argv[1:3]
found = (at for at, path in enumerate(sys.path) if path.endswith("-packages"))
sys.path.insert(next(found, len(sys.path)), folder)
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def module(name: str, *arguments: str, folder: str = FOLDER) -> list[str]:
    """The command that runs a module of ours in isolated mode: without the working folder, ``PYTHON*`` variables and
    the user's own packages.

    :param folder: has the module's package
    """
    return [sys.executable, "-I", "-c", _START, folder, name, *arguments]


def script_runner(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours which then runs a user's script: without the working folder, but with the
    user's packages and ``PYTHONPATH``, which ``python SCRIPT`` has too."""
    return [sys.executable, "-P", "-c", _START, FOLDER, name, *arguments]


def file(path: str | Path, *arguments: str) -> list[str]:
    """The command that runs a Python file of ours in isolated mode, without the file's own folder too."""
    return [sys.executable, "-I", os.path.abspath(path), *arguments]


def environment() -> dict[str, str]:
    """A child's environment: language and time zone are ours, ``PATH`` is the system's, and there is nothing else."""
    return {name: value for name, value in os.environ.items() if name in KEPT} | {"PATH": SYSTEM_PATH}


def tool(name: str, *folders: str) -> str | None:
    """The absolute path of a program on the ``PATH``, or in one of more ``folders``; None if there is none.

    Relative folders are skipped, and those that belong to, or can be written by, another user than root and us.
    """
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), *folders):
        if os.path.isabs(folder) and _is_ours(folder) and (found := shutil.which(name, path=folder)):
            return found
    return None


def _is_ours(folder: str) -> bool:
    try:
        status = os.stat(folder)
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & stat.S_IWOTH
