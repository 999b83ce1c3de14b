"""Environments of what is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.environment import MissingError, genuine, interpreter


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMISHIM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MissingError) as raised:
        interpreter("no-such-package", "1.0")
    assert str(raised.value).startswith("pip cannot install no-such-package 1.0: No matching distribution found")
    assert "\n" not in str(raised.value)


def test_a_named_interpreter_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMISHIM_GENUINE_PYTHON", "/opt/genuine/bin/python")
    assert genuine() == Path("/opt/genuine/bin/python")
