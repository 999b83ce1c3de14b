"""Pages of a guest for front ends that read structures by themselves: drgn, Volatility.

Such a program reads eight bytes at a time, at addresses that only it can foresee. `PageCache` makes few requests of
that: it fetches whole pages, more of them the longer a program reads in sequence; remembers which pages are unreadable;
fetches again, in one request, what was used together before; and takes what a plan brought in advance.

What it promises: no byte and no fault is used for longer than its lifetime after the answer that brought it
(docs/freshness.md). Memory that cannot be read is a `FaultError`, never zeros.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from vmishim.errors import FaultError
from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, PAGE_SIZE, Extent, ScatterReader

PAGES_MAX = 1 << 15
"""Pages remembered, readable or not: 128 MiB at most. The one that was fetched longest ago is dropped."""
EXTENTS_MAX = 64 << 20
"""Bytes kept of what plans brought; the oldest are dropped."""
GROWTH_MAX = 128
"""Most pages of one request for a sequence of reads."""
HOLE_MAX = 4096
"""Most pages of one request that asks where a hole of the module area ends."""
READ_MAX = 256
"""Most pages of one read."""
AGAIN_MAX = 250
"""Pages that are fetched again together: as many as fit into one reply."""
BLOCK = 2 << 20
"""A request brings no page beyond the aligned 2 MiB that the read is in: memory that a confidential VM has not accepted
yet starts at such a boundary at the earliest (``unit_size``, drivers/firmware/efi/unaccepted_memory.c), and it must not
be touched."""
MODULES, FIXMAP = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_FF00_0000
"""Kernel image and modules, then the addresses of device registers (Documentation/arch/x86/x86_64/mm.rst). Holes are
asked about only in the former; elsewhere a page beyond a hole may be a device's, and reading a register may change
it."""

Key = tuple[int, int]
"""Space and number of a page."""
Fetch = Callable[[], Iterable[Extent]]
"""Brings a list by plan. :raises LinkError: the guest could not be asked"""


@dataclass(slots=True)
class _Page:
    fetched: float
    data: bytes | None
    """None: unreadable."""
    used: bool = False


@dataclass(slots=True)
class _Brought:
    """Memory that a plan brought.

    :ivar fetch: what brought it; None if it came in another way
    """

    fetched: float
    data: bytes
    fetch: Fetch | None


class PageCache:
    """A reader that keeps pages. Safe for threads.

    :param reader: where pages come from
    :param lifetime: seconds for which a page is kept; `math.inf` keeps all until `refresh`
    :param now: the clock, in seconds
    """

    def __init__(
        self, reader: ScatterReader, *, lifetime: float = STALE, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._reader = reader
        self._now = now
        self.lifetime = lifetime
        self._pages: OrderedDict[Key, _Page] = OrderedDict()
        self._runs: dict[Key, int] = {}
        self._extents: OrderedDict[int, _Brought] = OrderedDict()
        self._extent_bytes = 0
        self._starts: list[int] | None = None
        self._plans: list[tuple[int, int, Fetch]] = []
        self._held = False
        self._lock = threading.RLock()
        _living.add(self)

    # ---- what a front end uses ---------------------------------------------------------------------------------------

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        within = address % PAGE_SIZE
        if within + count <= PAGE_SIZE:
            # The usual case, without the lock: values in the dictionary are replaced, never changed.
            page = self._pages.get((space, address // PAGE_SIZE))
            if page is not None and page.data is not None and self._is_fresh(page.fetched):
                page.used = True
                return page.data[within : within + count]
        with self._lock:
            return self._read(address, count, space)

    def prefetch(self, addresses: Iterable[int], count: int = 1) -> None:
        """Fetch the pages of kernel memory that hold ``count`` bytes at each of ``addresses``, as far as they are not
        known, together.

        :raises LinkError: the guest could not be asked
        """
        with self._lock:
            wanted: dict[int, None] = {}
            for address in addresses:
                for number in range(address // PAGE_SIZE, (address + max(count, 1) - 1) // PAGE_SIZE + 1):
                    if address >= KERNEL_FLOOR and self._known((KERNEL, number)) is None:
                        wanted[number] = None
            self._scatter(list(wanted))

    def plan(self, address: int, count: int, fetch: Fetch) -> None:
        """Call ``fetch``, and take what it brings, when a read of some of ``count`` bytes of kernel memory at
        ``address`` finds nothing: there begins a list that a front end is about to follow. And again when a read of
        what it brought finds that to be too old.
        """
        self._plans.append((address, address + count, fetch))

    def add(self, extents: Iterable[Extent], fetch: Fetch | None = None) -> None:
        """Take kernel memory that was just read in another way.

        :param fetch: what brought it; what it brought before is forgotten
        """
        extents = list(extents)
        now = self._now()
        with self._lock:
            if fetch is not None:
                for address in [at for at, brought in self._extents.items() if brought.fetch is fetch]:
                    self._extent_bytes -= len(self._extents.pop(address).data)
            for address, data in extents:
                before = self._extents.pop(address, None)
                self._extent_bytes += len(data) - (len(before.data) if before else 0)
                self._extents[address] = _Brought(now, data, fetch)
            while self._extent_bytes > EXTENTS_MAX:
                self._extent_bytes -= len(self._extents.popitem(last=False)[1].data)
            self._starts = None

    def refresh(self) -> None:
        """Answer nothing more from what is known now. What was used together is still fetched together."""
        with self._lock:
            for page in self._pages.values():
                page.fetched = -math.inf
            self._extents.clear()
            self._extent_bytes, self._starts = 0, None

    def hold(self) -> None:
        """Keep all that is read from here on until `release`."""
        with self._lock:
            self.refresh()
            self._held = True

    def release(self) -> None:
        """End the hold."""
        with self._lock:
            self._held = False
            self.refresh()

    # ---- within the lock ---------------------------------------------------------------------------------------------

    def _read(self, address: int, count: int, space: int) -> bytes:
        if space == KERNEL and address < KERNEL_FLOOR:
            raise FaultError(address)
        planned = False
        parts: list[bytes] = []
        at, end = address, address + count
        while at < end:
            number = at // PAGE_SIZE
            page = self._known((space, number))
            if page is None and space == KERNEL:
                brought = self._brought(at)
                if brought is not None and self._is_fresh(brought[0].fetched):
                    parts.append(brought[0].data[brought[1] :][: end - at])
                    at += len(parts[-1])
                    continue
                if not planned and (planned := self._run_plans(at, end, brought[0].fetch if brought else None)):
                    continue
            if page is None:
                page = self._fetch(space, number, (end - 1) // PAGE_SIZE)
            page.used = True
            if page.data is None:
                raise FaultError(at, b"".join(parts))
            part = page.data[at % PAGE_SIZE :][: end - at]
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def _is_fresh(self, fetched: float) -> bool:
        return fetched > -math.inf if self._held else self._now() - fetched < self.lifetime

    def _known(self, key: Key) -> _Page | None:
        page = self._pages.get(key)
        return page if page is not None and self._is_fresh(page.fetched) else None

    def _brought(self, address: int) -> tuple[_Brought, int] | None:
        """What was added that holds ``address``, fresh or not, and where in it that is."""
        if self._starts is None:
            self._starts = sorted(self._extents)
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        brought = self._extents[self._starts[place]]
        within = address - self._starts[place]
        return (brought, within) if within < len(brought.data) else None

    def _run_plans(self, address: int, end: int, again: Fetch | None) -> bool:
        """Bring what begins between two addresses, and ``again`` what was brought before. False if that is nothing."""
        begins = [fetch for low, high, fetch in self._plans if low < end and address < high]
        fetches = dict.fromkeys([*begins, *([again] if again else [])])
        for fetch in fetches:
            self.add(fetch(), fetch)
        return bool(fetches)

    def _fetch(self, space: int, first: int, last: int) -> _Page:
        """The page ``first``, which is not known, and with it what is probably read next, up to ``last`` for sure."""
        key = (space, first)
        was, run = self._pages.get(key), self._runs.pop(key, 0)
        if first == last and was is not None and was.used and space == KERNEL:
            self._scatter([first, *self._used_before(first)])
        elif run < 0 and first * PAGE_SIZE < FIXMAP:
            self._probe(first, min(-2 * run, HOLE_MAX))
        else:
            self._fetch_run(space, first, last, min(2 * run, GROWTH_MAX))
        page = self._known(key)
        if page is None:  # a lifetime shorter than this took
            page = self._pages[key]
        return page

    def _fetch_run(self, space: int, first: int, last: int, grown: int) -> None:
        """Read on from ``first`` until ``last``, or as far as a sequence has ``grown`` within its block. One read, so
        nothing behind the first unreadable page is touched.
        """
        block = (first * PAGE_SIZE // BLOCK + 1) * BLOCK // PAGE_SIZE
        stop = max(min(last + 1, first + READ_MAX), min(first + grown, block))
        stop = next((number for number in range(first + 1, stop) if self._known((space, number))), stop)
        try:
            data = self._reader.read(first * PAGE_SIZE, (stop - first) * PAGE_SIZE, space)
        except FaultError as fault:
            data = fault.data
        now = self._now()
        whole = len(data) // PAGE_SIZE
        for place in range(whole):
            self._keep((space, first + place), _Page(now, data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE]))
        if whole < stop - first:
            self._keep((space, first + whole), _Page(now, None))
            if not whole and MODULES <= first * PAGE_SIZE < FIXMAP and space == KERNEL:
                self._runs[space, first + 1] = -1
        elif whole:
            self._runs[space, stop] = max(whole, grown)

    def _probe(self, first: int, count: int) -> None:
        """Ask which of ``count`` pages from ``first`` on are unreadable, and fetch ``first`` if it is not."""
        numbers = range(first, min(first + count, FIXMAP // PAGE_SIZE))
        there = {at // PAGE_SIZE for at, _ in self._reader.scatter([number * PAGE_SIZE for number in numbers], 8)}
        now = self._now()
        end = next((number for number in numbers if number in there), numbers.stop)
        for number in range(first, end):
            self._keep((KERNEL, number), _Page(now, None))
        if end > first:
            self._runs[KERNEL, end] = first - end
        else:
            self._fetch_run(KERNEL, first, first, 0)

    def _used_before(self, first: int) -> Iterator[int]:
        """Pages that were used in an earlier life, and are not known now: those that were fetched after ``first`` come
        first."""
        old = [
            number
            for (space, number), page in self._pages.items()
            if space == KERNEL and page.used and not self._is_fresh(page.fetched)
        ]
        at = old.index(first)
        return islice(old[at + 1 :] + old[:at], AGAIN_MAX - 1)

    def _scatter(self, numbers: list[int]) -> None:
        """Fetch pages of kernel memory. What does not come is unreadable."""
        if not numbers:
            return
        came = dict(self._reader.scatter([number * PAGE_SIZE for number in numbers]))
        now = self._now()
        for number in numbers:
            self._keep((KERNEL, number), _Page(now, came.get(number * PAGE_SIZE)))

    def _keep(self, key: Key, page: _Page) -> None:
        self._pages[key] = page
        self._pages.move_to_end(key)
        if len(self._pages) > PAGES_MAX:
            self._pages.popitem(last=False)
        if len(self._runs) > PAGES_MAX:
            del self._runs[next(iter(self._runs))]

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.RLock()


_living: weakref.WeakSet[PageCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_living):
        cache.after_fork()


os.register_at_fork(after_in_child=_after_fork)
