"""The agent's one file: it has all that it needs, and runs by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_imports import MODULES, ROOT, imports
from vmishim import cli
from vmishim.bundle import bundle
from vmishim.wire.keys import generate, load_private, save_private


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our private key, where it is looked for."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "vmishim" / "domains.toml"))
    (tmp_path / "vmishim").mkdir()
    save_private(tmp_path / "vmishim" / "key", generate())
    return tmp_path / "vmishim" / "key"


def test_the_bundle_has_all_that_the_agent_imports(tmp_path: Path) -> None:
    needed, waiting = set(), ["guest_agent.__main__"]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in needed:
            needed.add(name)
            waiting += imports(name, by_string=False)
            waiting += [name.rpartition(".")[0]]
    with zipfile.ZipFile(bundle(tmp_path / "agent.pyz")) as made:
        inside = set(made.namelist())
    assert {str(MODULES[name].relative_to(ROOT)) for name in needed} <= inside


def test_the_bundle_runs_by_itself(tmp_path: Path) -> None:
    made = bundle(tmp_path / "agent.pyz")
    # Isolated and elsewhere: nothing of this checkout is on the path.
    done = subprocess.run([sys.executable, "-I", made, "--help"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "agent.pyz serve" in done.stdout


def test_bundle_writes_agent_and_unit_and_says_how(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bundle", "-o", str(tmp_path / "a.pyz")]) == 0
    said = capsys.readouterr().out
    assert load_private(key).public.text in said
    assert "install -D -m 755 a.pyz /usr/lib/vmishim/agent.pyz" in said
    assert os.access(tmp_path / "a.pyz", os.X_OK)
    assert "/usr/lib/vmishim/agent.pyz" in (tmp_path / "vmishim-agent.service").read_text()


def test_a_file_that_cannot_be_written_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bundle", "-o", "/proc/agent.pyz"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("vmishim")
    assert "/proc/agent.pyz" in said.err
