"""Single reads that go with a listing, such as a table's mask or a counter."""

from __future__ import annotations

from collections import OrderedDict

COMPANION_MAX = 256
"""Bytes of the largest single read that comes along with a listing."""
COMPANIONS = 32
"""Single reads of a listing that are remembered, to be brought along once they come again."""

Read = tuple[int, int]
"""Address and count."""


class Companions:
    """Single reads of one listing. One that was met in two listings comes along with the next walk; what came is used
    once, for a short time: if you read it again, you wait for it to change."""

    def __init__(self) -> None:
        self._met: OrderedDict[Read, bool] = OrderedDict()
        """True for those that were met more than once."""
        self._brought: dict[Read, bytes] = {}
        self._until = 0.0

    def meet(self, read: Read) -> None:
        """A single read was answered by the guest."""
        if read[1] > COMPANION_MAX:
            return
        self._met[read] = read in self._met
        self._met.move_to_end(read)
        if len(self._met) > COMPANIONS:
            self._met.popitem(last=False)

    @property
    def wanted(self) -> list[Read]:
        """Those to bring along."""
        return [read for read, again in self._met.items() if again]

    def bring(self, brought: dict[Read, bytes], until: float) -> None:
        """Take in what came along, to be used before ``until``."""
        self._brought, self._until = brought, until

    def take(self, read: Read) -> tuple[bytes, float] | None:
        """What came along for a read, once, and until when it is good."""
        data = self._brought.pop(read, None)
        if data is None:
            return None
        if read in self._met:
            self._met.move_to_end(read)
        return data, self._until
