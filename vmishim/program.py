"""Run a compiled LibVMI program, with ours in place of LibVMI's ``libvmi.so.0``: for that program only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from vmishim import isolated
from vmishim.errors import LibvmiError
from vmishim.script import COMPAT, INHERITED, Inherited

FOLDER = COMPAT / "capi"
LIBRARY = FOLDER / "libvmi.so.0"
"""The library; an installation without a compiler lacks it."""
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Settings:
    """What the library is told by environment variables, see `vmishim.capi`.

    :ivar abi: version of LibVMI that the program was compiled for; empty: 0.15
    :ivar poll: the program may ask for events and wait for them
    :ivar stats: print at the end what it took
    """

    abi: str = ""
    poll: bool = False
    stats: bool = False


def find(name: str) -> str | None:
    """The compiled program that a shell would run for ``name``; None if it is something else."""
    path = name if os.sep in name or Path(name).is_file() else shutil.which(name)
    try:
        with open(path or name, "rb") as file:
            return os.path.abspath(path or name) if file.read(4) == _ELF else None
    except OSError:
        return None


def missing() -> str:
    """Why there is no library, and how to build it; empty if there is one."""
    if LIBRARY.is_file():
        return ""
    build = FOLDER / "build.py"
    command = " ".join(isolated.file(build))
    return f"libvmi.so.0, for compiled programs, is not built; with gcc and python3-dev installed, run: {command}"


def environment(inherited: Inherited, settings: Settings) -> dict[str, str]:
    """Our environment, and what a program needs to use our library.

    :raises LibvmiError: there is no library
    """
    if lacking := missing():
        raise LibvmiError(lacking)
    folders = (str(FOLDER), os.environ.get("LD_LIBRARY_PATH"))
    ours = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)),
        "VMISHIM_PYTHON": sys.executable,
        INHERITED: json.dumps(asdict(inherited)),
    }
    if settings.abi:
        ours["VMISHIM_LIBVMI_ABI"] = settings.abi
    if settings.poll:
        ours["VMISHIM_LIBVMI_EVENTS"] = "poll"
    if settings.stats:
        ours["VMISHIM_LIBVMI_STATS"] = "1"
    return {**os.environ, **ours}


def become(path: str, arguments: Sequence[str], inherited: Inherited, settings: Settings) -> NoReturn:
    """Run a program in place of this process.

    :raises LibvmiError: there is no library
    :raises OSError: the program cannot be started
    """
    os.execve(path, [path, *arguments], environment(inherited, settings))  # noqa: S606 (no shell, as meant)


def run(path: str, arguments: Sequence[str], inherited: Inherited, settings: Settings) -> int:
    """Run a program and wait for it. Signals from the terminal are the program's.

    :returns: its exit status; 128 and the signal that ended it, as a shell has it
    :raises LibvmiError: there is no library
    :raises OSError: the program cannot be started
    """
    with (
        _deaf(),
        subprocess.Popen([path, *arguments], env=environment(inherited, settings), restore_signals=True) as child,
    ):
        status = child.wait()
    return 128 - status if status < 0 else status


@contextmanager
def _deaf() -> Iterator[None]:
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _nothing(number: int, frame: object) -> None:
    """A handler, which a program that is started does not inherit, as it would inherit that a signal is ignored."""
