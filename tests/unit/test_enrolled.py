"""A lab VM to play with is enrolled as long as it runs, and takes no other guest's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab import enrolled as module
from lab.agent import InstalledAgent
from lab.enrolled import check, enrolled
from vmishim import cli
from vmishim.commands import CommandError
from vmishim.guests import domains
from vmishim.wire.keys import generate, load_private


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A VM that has an agent; nothing of it is booted."""
    agent = InstalledAgent("tcp://127.0.0.1:5555", generate(), generate().public, generate().public)
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "new" / "domains.toml"))
    monkeypatch.setattr(module, "install", lambda vm: agent)
    monkeypatch.setattr(module, "plant", lambda vm: {7: "worker"})
    return SimpleNamespace(ram=tmp_path / "ram", agent=agent)


def test_it_is_enrolled_until_the_block_ends(vm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with enrolled(vm, "play"):
        entry = domains.find("play")
        assert (entry.agent, entry.agent_key) == (vm.agent.endpoint, vm.agent.public.text)
        assert entry.ramfile == str(vm.ram)
        assert load_private(entry.key) == vm.agent.private
        said = capsys.readouterr().out
        assert all(f"vmishim {command} play" in said for command in ("ps", "ss", "watch", "doctor"))
    assert domains.load() == {}
    assert not Path(entry.key).exists()


def test_what_an_earlier_lab_left_behind_is_replaced(vm: Any) -> None:
    with enrolled(vm, "play"):
        left = domains.path().read_text()
    domains.path().write_text(left)  # as if it had been killed
    check("play")
    with enrolled(vm, "play"):
        assert domains.find("play").agent == vm.agent.endpoint
    assert domains.load() == {}


def test_it_may_be_forgotten_before_it_ends(vm: Any) -> None:
    with enrolled(vm, "play"):
        assert cli.main(["forget", "play"]) == 0
    assert domains.load() == {}


def test_the_name_of_another_guest_is_refused(vm: Any) -> None:
    with enrolled(vm, "other"):
        pass
    text = f'[play]\nagent = "tcp://10.0.0.5:5555"\nagent_key = "{vm.agent.public.text}"\nkey = "~/key"\n'
    domains.path().write_text(text)
    with pytest.raises(CommandError, match="already has an entry play; choose another name"):
        check("play")
    with pytest.raises(CommandError), enrolled(vm, "play"):
        pass
    assert domains.path().read_text() == text
