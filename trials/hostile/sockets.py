"""Hostile frames between a real IDS and a real agent: each answer is right or an error, and the agent lives on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trials.hostile import Saboteur, Tally, resident
from trials.hostile.relay import Relay
from vmishim.client import Remote
from vmishim.errors import LinkError
from vmishim.guests import local
from vmishim.link import Link
from vmishim.wire.keys import PrivateKey, PublicKey, load_private

TIMEOUT = 0.4
"""Seconds that the IDS waits: a dropped frame costs half of that."""
DELAY = 0.02
"""Seconds that a frame is delayed."""
TEXT = 256
"""Bytes of kernel memory that do not change: code of ``vsnprintf``."""


@dataclass(frozen=True)
class Agent:
    """A real agent of this machine."""

    endpoint: str
    key: PrivateKey
    """The IDS's."""
    public: PublicKey
    """The agent's."""
    pid: int

    def link(self, endpoint: str = "", timeout: float = 5.0) -> Link:
        """A link to the agent, or to ``endpoint``, which leads to it."""
        return Link(endpoint or self.endpoint, self.key, self.public, timeout)


@contextmanager
def running(*options: str) -> Iterator[Agent]:
    """An agent of this machine. :raises LinkError: none can run here"""
    before = _children()
    with local.agent(*options) as entry:
        (pid,) = _children() - before
        yield Agent(entry.agent, load_private(Path(entry.key)), PublicKey.from_text(entry.agent_key), pid)


def _children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


class Meddler:
    """For a `Relay`: alters, drops, delays, replays and reorders frames.

    :param alone: how likely a frame and its answer are left alone
    """

    def __init__(self, seed: int, alone: float = 0.25) -> None:
        self.tally = Tally()
        self._alone = alone
        self._saboteur = Saboteur(seed)
        self._before = b""

    def __call__(self, frame: bytes, ask: Callable[[bytes], bytes]) -> Sequence[bytes]:
        saboteur = self._saboteur
        chance = saboteur.random.random() / (1 - self._alone)
        if chance < 0.5:
            change, altered = saboteur.altered(frame)
            self.tally.changes[change] += 1
            return [ask(altered)]
        if chance < 0.505:
            self.tally.changes["dropped"] += 1
            return []
        reply = ask(frame)
        saboteur.seen += (frame, reply)
        before, self._before = self._before, reply
        if chance < 0.51:
            self.tally.changes["dropped"] += 1
            return []
        if chance < 0.85:
            change, altered = saboteur.altered(reply)
            self.tally.changes[change] += 1
            return [altered]
        if chance < 0.9:
            self.tally.changes["reordered"] += 1
            return [before]
        if chance < 0.95:
            self.tally.changes["doubled"] += 1
            return [reply, reply]
        if chance < 1:
            self.tally.changes["delayed"] += 1
            time.sleep(DELAY)
        return [reply]


@dataclass
class Outcome:
    """What the IDS received."""

    tally: Tally
    right: int = 0
    errors: int = 0
    longest: float = 0.0
    """Seconds of the longest exchange."""
    ids: tuple[int, int] = (0, 0)
    """The IDS's memory in KiB, after the first tenth and at the end."""
    agent: tuple[int, int] = (0, 0)
    """The agent's memory, likewise."""

    def __str__(self) -> str:
        return (
            f"{self.tally}; {self.right:,} right answers, {self.errors:,} errors, none took longer than "
            f"{self.longest:.2f} s; memory of the IDS {self.ids[0]:,} -> {self.ids[1]:,} KiB, of the agent "
            f"{self.agent[0]:,} -> {self.agent[1]:,} KiB"
        )


def sockets(frames: int, seed: int, agent: Agent) -> Outcome:
    """Ask the agent until at least ``frames`` hostile frames were sent.

    :raises LinkError: the agent does not answer in the end, or gives another answer than in the beginning
    """
    meddler = Meddler(seed)
    outcome = Outcome(meddler.tally)
    with agent.link() as link:
        remote = Remote(link.exchange)
        (code,) = remote.symbols(["vsnprintf"])
        assert code is not None
        truth = remote.read(code, TEXT)
    with Relay(agent.endpoint, meddler) as relay, agent.link(relay.endpoint, TIMEOUT) as link:
        remote = Remote(link.exchange)
        while meddler.tally.frames < frames and relay.failed is None:
            if not outcome.ids[0] and meddler.tally.frames > frames / 10:
                outcome.ids, outcome.agent = (resident(), 0), (resident(agent.pid), 0)
            at = outcome.right % (TEXT // 2)
            begun = time.monotonic()
            try:
                if remote.read(code + at, TEXT // 2) == truth[at : at + TEXT // 2]:
                    outcome.right += 1
                else:
                    meddler.tally.accepted += 1
            except LinkError:
                outcome.errors += 1
            except Exception:
                meddler.tally.crashed += 1
            outcome.longest = max(outcome.longest, time.monotonic() - begun)
        if relay.failed is not None:
            raise LinkError(f"the agent does not answer any more: {relay.failed!r}")
    outcome.ids, outcome.agent = (outcome.ids[0], resident()), (outcome.agent[0], resident(agent.pid))
    with agent.link() as link:
        if Remote(link.exchange).read(code, TEXT) != truth:
            raise LinkError("memory read through the agent differs from before")
    os.kill(agent.pid, 0)
    return outcome
