"""Patterns in reads that nothing explains: an array that is read through, a chain of pointers that is followed."""

from __future__ import annotations

from collections import OrderedDict, deque

from vmishim.memory.reader import KERNEL_FLOOR
from vmishim.readahead.trails import Trail

RUN = 4
"""Reads one behind the other from which on they count as an array that is read through."""
RUN_BYTES, RUN_BYTES_MAX = 4096, 1 << 18
"""Bytes brought of such an array at first and at most; each time twice as many, as the kernel's own read-ahead does."""
RUN_BYTES_BEHIND = 512
"""Bytes brought at first of an array that a pointer leads to, in a structure: those of an ``xa_node``'s slots."""
CHAIN_LENGTH = 3
"""Links of a chain of dependent reads from which on it counts as a list."""
CHAIN_REACH = 4096
"""Bytes from where a pointer points within which the next link of a chain is looked for."""
FRUITLESS_MAX = 1024
"""Chains that are remembered as not worth a walk."""
REMEMBERED = 64
"""Beginnings of chains that are remembered."""


class Run:
    """Reads one behind the other.

    :ivar trail: the trail that led to the first of them
    """

    def __init__(self) -> None:
        self._next = -1
        self._length = 0
        self._bytes = RUN_BYTES
        self.trail: Trail | None = None

    def bytes_ahead(self, address: int, count: int, first: int = RUN_BYTES) -> int:
        """How many bytes to bring at a read of ``count`` bytes that nothing explains; 0 for just those.

        :param first: how many of an array that is new
        """
        if address == self._next:
            self._length += 1
        else:
            self._length, self._bytes = 1, first
        self._next = address + count
        if self._length < RUN:
            return 0
        ahead = max(count, self._bytes)
        self._bytes = min(self._bytes * 2, RUN_BYTES_MAX)
        return ahead

    def goes_on(self, address: int) -> bool:
        """Whether a read at ``address`` is behind the last one."""
        return address == self._next

    def go_on(self, address: int) -> None:
        """The array was brought up to ``address``, and is read on from there."""
        self._next = address


class Chains:
    """Single pointer reads. ``p = read(p + k)``, again and again, is a list.

    :ivar fruitless: where chains begin that turned out not to be worth a walk
    """

    def __init__(self) -> None:
        self.fruitless: OrderedDict[int, bool] = OrderedDict()
        self._recent: deque[tuple[int, int]] = deque(maxlen=8)
        self._lengths: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()

    def follow(self, address: int, value: int) -> tuple[int, int] | None:
        """Note that ``value`` was read at ``address``. Returns where a chain began, and the distance from where its
        pointers point to the next link, once it is long enough."""
        for before, pointer in self._recent:
            distance = address - pointer
            if -CHAIN_REACH < distance < CHAIN_REACH:
                length, start = self._lengths.pop((before, distance), (0, before))
                if length + 1 >= CHAIN_LENGTH:
                    self.clear()
                    return start, distance
                self._lengths[address, distance] = length + 1, start
                if len(self._lengths) > REMEMBERED:
                    self._lengths.popitem(last=False)
        if value >= KERNEL_FLOOR:
            self._recent.append((address, value))
        return None

    def dismiss(self, start: int) -> None:
        """Remember that a chain is not worth a walk."""
        self.fruitless[start] = True
        if len(self.fruitless) > FRUITLESS_MAX:
            self.fruitless.popitem(last=False)

    def clear(self) -> None:
        """Forget the reads, not which chains are not worth a walk."""
        self._recent.clear()
        self._lengths.clear()
