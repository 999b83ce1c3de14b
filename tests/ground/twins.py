"""A kernel and its double: memory that is planted in both, plans that are run on both, answers that must be equal."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from guest_agent.agent import Agent
from lab.planter import Planter, Stores
from tests.ground.buffer import Buffer, BufferKernel
from tests.ground.connection import Connection
from tests.ground.walks import Ground, Walked
from vmishim.guests.agent import AgentGuest
from vmishim.wire.plan import Plan, Step


class Mirror(Buffer):
    """A buffer at the address of planted kernel memory; what is written to it goes to both.

    :ivar equal: whether both are known to hold the same
    """

    def __init__(self, planted: Planter) -> None:
        super().__init__(planted.address, planted.size)
        self.equal = True
        self._planted = planted
        planted.clear()

    def write(self, at: int, data: bytes) -> None:
        super().write(at, data)
        self._planted.write(at, data)

    @contextlib.contextmanager
    def stirring(self, rounds: Sequence[Stores]) -> Iterator[list[int]]:
        """In the kernel alone: when which word is stored is up to chance."""
        self.equal = False
        try:
            with self._planted.stirring(rounds) as done:
                yield done
        finally:
            self.clear()
            self.equal = True


class Twins(Ground):
    """A kernel to plant lists in; each walk is repeated over the mirror and compared, record for record.

    :param mirror: the kernel's planted memory
    :param guest: reads the kernel
    """

    def __init__(self, mirror: Mirror, guest: AgentGuest, another: Callable[[], AgentGuest]) -> None:
        super().__init__(mirror, guest, another)
        self.mirror = mirror
        self.kernel = BufferKernel(mirror)
        self.double = AgentGuest("double", Connection(Agent(self.kernel.as_kernel())).as_link(), "scalar")
        self.compared = itertools.count()

    def walk(self, plan: Plan, heads: Sequence[int] = ()) -> Walked:
        walked = super().walk(plan, heads)
        if self.mirror.equal:
            for ours, theirs in zip(self.double.remote.walk(plan, heads), walked.chunks, strict=True):
                # What the head held is reported of rings only; and each agent numbers its own walks.
                head = theirs.head if plan.step in (Step.RING, Step.RING_NODE) else ours.head
                assert replace(ours, walk=bool(ours.walk)) == replace(theirs, walk=bool(theirs.walk), head=ours.head)
                assert ours.head == head
            next(self.compared)
        return walked
