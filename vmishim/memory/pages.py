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
            try:
                kept = now, self._reader.read(start, PAGE_SIZE, space)
            except FaultError:
                raise FaultError(wanted, before) from None
            self._pages[start, space] = kept
            if len(self._pages) > PAGES_MAX:
                self._pages.popitem(last=False)
        self._pages.move_to_end((start, space))
        return kept[1]

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
