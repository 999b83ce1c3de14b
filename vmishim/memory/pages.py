"""Fetch whole pages and keep them, as 00SEVen and MemProcFS do.

The strategy that reading ahead is compared with. It also serves the reads that belong to no list: a process's own
memory, and everything else within a hold.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable

from vmishim.errors import FaultError
from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import KERNEL, PAGE_SIZE, MemoryReader

PAGES_MAX = 16384
"""Most pages kept, 64 MiB; the least recently read one is dropped."""
AHEAD_FACTOR, AHEAD_MAX = 4, 256
"""Physical or process memory that is read in ascending order, as by a program that dumps it, is fetched ahead: with
each page that follows the last ones fetched so many times more of them, up to 1 MiB in a request."""


class Pages:
    """A reader that asks for 4 KiB pages and keeps them for a second, or for the length of a hold. Safe for threads.

    :param reader: where pages come from
    :param now: the clock, in seconds
    """

    def __init__(self, reader: MemoryReader, *, now: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader
        self._now = now
        self._pages: OrderedDict[tuple[int, int], tuple[float, bytes]] = OrderedDict()
        self._lock = threading.RLock()
        self._holding = False
        # What follows the pages fetched last, and how many these were.
        self._next, self._ahead = (-1, KERNEL), 1
        _living.add(self)

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        parts: list[bytes] = []
        done = 0
        with self._lock:
            while done < count:
                at = address + done
                page = self._page(at & -PAGE_SIZE, space, at, b"".join(parts))
                part = page[at % PAGE_SIZE :][: count - done]
                parts.append(part)
                done += len(part)
        return b"".join(parts)

    def _page(self, start: int, space: int, wanted: int, before: bytes) -> bytes:
        now = self._now()
        kept = self._pages.get((start, space))
        if kept is None or not (self._holding or now - kept[0] < STALE):
            data = self._fetch(start, space)
            if len(data) < PAGE_SIZE:
                raise FaultError(wanted, before)
            for at in range(len(data) - len(data) % PAGE_SIZE - PAGE_SIZE, -1, -PAGE_SIZE):
                # Within a hold a page that was answered stays as it was.
                if at == 0 or not self._holding or (start + at, space) not in self._pages:
                    self._pages[start + at, space] = now, data[at : at + PAGE_SIZE]
            while len(self._pages) > PAGES_MAX:
                self._pages.popitem(last=False)
            kept = self._pages[start, space]
        self._pages.move_to_end((start, space))
        return kept[1]

    def _fetch(self, start: int, space: int) -> bytes:
        """The page at ``start``, and those behind it if it follows the last ones; ends where memory cannot be read."""
        self._ahead = min(self._ahead * AHEAD_FACTOR, AHEAD_MAX) if (start, space) == self._next else 1
        try:
            data = self._reader.read(start, self._ahead * PAGE_SIZE, space)
        except FaultError as fault:
            data = fault.data
        self._next = (start + len(data) - len(data) % PAGE_SIZE, space) if space != KERNEL else (-1, KERNEL)
        return data

    def hold(self) -> None:
        """Keep pages until `release`."""
        with self._lock:
            self._pages.clear()
            self._holding = True

    def release(self) -> None:
        """End the hold."""
        with self._lock:
            self._holding = False
            self._pages.clear()

    def flush(self) -> None:
        """Forget all pages."""
        with self._lock:
            self._pages.clear()

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.RLock()


_living: weakref.WeakSet[Pages] = weakref.WeakSet()


def _after_fork() -> None:
    for pages in list(_living):
        pages.after_fork()


os.register_at_fork(after_in_child=_after_fork)
