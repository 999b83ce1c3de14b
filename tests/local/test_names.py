"""Names of open files, as the kernel itself gives them in ``/proc/PID/fd``: every kind that a process can make here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import until

ROOT = Path(__file__).parents[2]
VMISHIM = str(Path(sys.executable).with_name("vmishim"))
OPEN = ROOT / "tests" / "ground" / "every_file.py"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The pid of a process that has every kind open."""
    folder = tmp_path_factory.mktemp("files")
    with subprocess.Popen([sys.executable, "-I", OPEN, folder]) as child:
        until((folder / "open").exists, what="the files to be open")
        yield child.pid
        child.terminate()


def test_each_has_the_name_that_proc_shows(opened: int) -> None:
    truth = {
        int(number): os.fsencode(os.readlink(f"/proc/{opened}/fd/{number}"))
        .removesuffix(b" (deleted)")
        .decode(errors="backslashreplace")
        for number in os.listdir(f"/proc/{opened}/fd")
    }
    kinds = {name.partition("[")[0].partition("/")[0] for name in truth.values()}
    assert {"anon_inode:", "net:", "pipe:", "socket:", ""} <= kinds
    assert any("memfd" in name for name in truth.values())
    command = [VMISHIM, "run", "--local", str(ROOT / "compat" / "ids" / "open_files.py"), "any", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # programs of deleted files may run here
    listing = json.loads(done.stdout)["listing"]
    assert {entry["fd"]: entry["path"] for entry in listing if entry["pid"] == opened} == truth
