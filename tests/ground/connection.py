"""An agent in the test's own process: no socket, no encryption, and a test sees each request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

from guest_agent.agent import Agent
from vmishim.link import Link


class Connection:
    """In place of a `Link`: carries requests to an agent in this process, one at a time.

    :param session: what the agent takes for the session
    :ivar requests: the kind of each request
    :ivar before: called before each request with its number, from 1; may change memory, raise, or take its time
    """

    handshakes = 1

    def __init__(self, agent: Agent, session: bytes = b"here") -> None:
        self.agent = agent
        self.requests: list[int] = []
        self.before: Callable[[int], None] = lambda number: None
        self._session = session
        self._lock = threading.Lock()

    def exchange(self, message: bytes) -> bytes:
        with self._lock:
            self.requests.append(message[0])
            self.before(len(self.requests))
            return self.agent.answer(self._session, message)

    def as_link(self) -> Link:
        """The same, for `vmishim.guests.agent.AgentGuest`."""
        return cast(Link, self)

    def renew(self) -> None:
        """For a forked child: another thread of the parent may hold the lock."""
        self._lock = threading.Lock()
        self.before = lambda number: None

    def close(self) -> None:
        self.agent.end(self._session)
