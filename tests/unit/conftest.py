"""Tests of pure code: nothing built is needed, so nothing built is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No eBPF objects, as in a fresh clone."""
    folder: Path = tmp_path_factory.mktemp("guest_agent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmishim.ebpf_objects.resources", Nothing(folder))
        yield


class Nothing:
    """``importlib.resources`` with one empty package."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, package: str) -> Path:
        return self._folder
