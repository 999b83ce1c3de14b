"""No command runs code of another user as root: in a folder that anyone may write to, with sudo's usual rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ground.hostile import plant, ran
from vmishim import isolated
from vmishim.guests import local
from vmishim.inject.clang import compile_core
from vmishim.libvmi import Libvmi

ENTRY = str(Path(sys.executable).with_name("vmishim"))
SCRIPT = Path(__file__).parents[2] / "compat" / "examples" / "process_list.py"
PROGRAM = """
#include "vmlinux.h"
#include "inject.h"
SEC("syscall") int run(void *context) { __u64 one = 1; EMIT(&one, sizeof(one)); return 0; }
"""
COMMANDS = {
    "ps": ["ps", "--local", "--json"],
    "lsmod": ["lsmod", "--local", "--json"],
    "ss": ["ss", "--local", "--json"],
    "watch": ["watch", "--local", "--interval", "0.1"],
    "doctor": ["doctor", "--local"],
    "run": ["run", "--local", "{script}", "any"],
    "compare": ["compare", "--local", "--runs", "1", "-o", "{tmp}/compare", "{script}", "any"],
    "offsets": ["offsets", "--headers", "/usr/src/none"],
    "bundle": ["bundle", "-o", "{tmp}/agent.pyz"],
}
"""Every command that starts a process, and the one that packs what root will run in a guest."""


def sudo(hostile: dict[str, str]) -> dict[str, str]:
    """The environment that sudo passes on: sudoers(5), env_reset with the default env_keep, and secure_path."""
    kept = {"COLORTERM", "DISPLAY", "HOSTNAME", "LANG", "LANGUAGE", "LINES", "LS_COLORS", "COLUMNS", "TERM", "TZ"}
    passed = {name: value for name, value in hostile.items() if name in kept or name.startswith("LC_")}
    return passed | {
        "PATH": isolated.SYSTEM_PATH, "HOME": "/root", "LOGNAME": "root", "USER": "root", "SHELL": "/bin/sh",
        "SUDO_USER": "mallory", "SUDO_UID": "1000", "SUDO_GID": "1000", "SUDO_COMMAND": "vmishim",
    }  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; every variable that names code names it."""
    folder = plant(tmp_path / "hostile")
    monkeypatch.chdir(folder)
    for name in ("PYTHONPATH", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "CPATH"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("PATH", f"{folder}:.::/usr/sbin:/usr/bin:/sbin:/bin")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_no_code_of_the_working_folder(name: str, hostile: Path, tmp_path: Path) -> None:
    command = [ENTRY, *(word.format(script=SCRIPT, tmp=tmp_path) for word in COMMANDS[name])]
    environment = sudo(dict(os.environ))
    if name == "watch":
        # Its first screen is enough.
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            child.terminate()
    else:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert ran(hostile) == set()
        # No such headers; and processes that come and go make listings differ.
        assert done.returncode in {"offsets": (1,), "compare": (0, 1)}.get(name, (0,)), done.stderr
    assert ran(hostile) == set()


def test_the_agent_of_this_machine_takes_no_code_from_variables(hostile: Path) -> None:
    """Also if they reach us, as ``sudo -E`` lets them."""
    with local.guest() as target, Libvmi.over(target) as vmi:
        assert vmi.vmi.profile.release == os.uname().release
    assert ran(hostile) == set()


def test_compilers_are_never_those_of_the_working_folder(hostile: Path) -> None:
    assert compile_core(PROGRAM).startswith(b"\x7fELF")
    assert ran(hostile) == set()
