"""Other people's scripts in the lab VM, see `tests.ground.listings`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.ground import listings
from vmishim.guests.agent import AgentGuest

pytestmark = pytest.mark.long  # tests/local has the same scenes


class There:
    """The lab VM, with processes of its own in the container."""

    others = False

    def __init__(self, lab: LabVM, agent: InstalledAgent) -> None:
        self._lab, self._agent = lab, agent
        self.planted: set[int] = set()

    def read(self, path: str) -> bytes:
        return self._lab.read(path)

    def run(self, *command: str) -> str:
        return self._lab.run(*command).stdout.decode()

    def spawn(self, *command: str, count: int = 1) -> set[int]:
        started = self._lab.spawn(*command, count=count)
        self.planted |= started
        return started

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        self._lab.wait_until(condition, what)

    def guest(self) -> AgentGuest:
        return self._agent.connect()


@pytest.fixture
def machine(lab: LabVM, agent: InstalledAgent) -> Iterator[There]:
    there = There(lab, agent)
    yield there
    if there.planted:
        lab.kill(there.planted)


class TestThere(listings.Listings): ...
