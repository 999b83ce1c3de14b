"""Other people's scripts on this machine, see `tests.ground.listings`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ground import listings
from tests.until import until
from vmishim.guests import local
from vmishim.guests.agent import AgentGuest, connect
from vmishim.guests.domains import Domain


class Here:
    """This machine, with processes of its own."""

    others = True

    def __init__(self, domain: Domain, planted: ExitStack) -> None:
        self._domain, self._planted = domain, planted

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def run(self, *command: str) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()

    def spawn(self, *command: str, count: int = 1) -> set[int]:
        children = [subprocess.Popen(command) for _ in range(count)]
        for child in children:
            self._planted.callback(child.wait)
            self._planted.callback(child.kill)
        return {child.pid for child in children}

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        until(condition, what=what)

    def guest(self) -> AgentGuest:
        return connect(self._domain, "batch")


@pytest.fixture(scope="module")
def domain() -> Iterator[Domain]:
    with local.agent() as domain:
        yield domain


@pytest.fixture
def machine(domain: Domain) -> Iterator[Here]:
    with ExitStack() as planted:
        yield Here(domain, planted)


class TestHere(listings.Listings): ...
