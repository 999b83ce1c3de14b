"""Patterns in reads that nothing explains: an array that is read through, a chain of pointers that is followed."""

from __future__ import annotations

from collections import OrderedDict, deque

from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import KERNEL_FLOOR

RUN = 4
"""Reads one behind the other after which they are taken for an array that is read through."""
RUN_BYTES, RUN_BYTES_MAX = 4096, 1 << 18
"""Bytes brought of such an array at first and at most; each time twice as many, as the kernel's own read-ahead does."""
CHAIN_LENGTH = 3
"""Links of a chain of dependent reads after which it is taken for a list."""
CHAIN_REACH = 4096
"""Bytes from where a pointer points within which the next link of a chain is looked for."""
REMEMBERED = 64
"""Beginnings of chains that are remembered."""


class Run:
    """Reads one behind the other, and what was brought ahead of them."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, dict[int, int], dict[int, bytes]]] = deque()
        self._next = -1
        self._length = 0
        self._bytes = RUN_BYTES

    def bytes_ahead(self, address: int, count: int) -> int:
        """How many bytes to bring at a read of ``count`` bytes that nothing explains; 0 for just those."""
        if address == self._next:
            self._length += 1
        else:
            self._length, self._bytes = 1, RUN_BYTES
        self._next = address + count
        if self._length < RUN:
            return 0
        ahead = max(count, self._bytes)
        self._bytes = min(self._bytes * 2, RUN_BYTES_MAX)
        return ahead

    @property
    def expires(self) -> float | None:
        """When the first of what was brought is due; None when there is nothing."""
        return self._kept[0][0] if self._kept else None

    def keep(self, now: float, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Remember what was brought, to be forgotten in time: each part in its own."""
        self._kept.append((now + STALE, words, cells))

    def due(self, now: float) -> list[tuple[dict[int, int], dict[int, bytes]]]:
        """What is due."""
        return [(words, cells) for expires, words, cells in list(self._kept) if expires <= now]

    def forget(self, now: float) -> None:
        """Remember no more what is due."""
        while self._kept and self._kept[0][0] <= now:
            self._kept.popleft()

    def go_on(self, address: int) -> None:
        """The array was brought up to ``address``, and is read on from there."""
        self._next = address


class Chains:
    """Single pointer reads. ``p = read(p + k)``, again and again, is a list."""

    def __init__(self) -> None:
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

    def clear(self) -> None:
        """Forget them."""
        self._recent.clear()
        self._lengths.clear()
