"""What is known of kernel memory, and until when.

Memory comes in batches, each forgotten as a whole when its time is over. Two policies say what a new byte is worth:
outside a hold the newest is the answer (`Live`), within a hold the first one is (`Held`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import PAGE_SIZE, MemoryReader
from vmishim.readahead.clock import Clock
from vmishim.readahead.fields import WORD
from vmishim.readahead.head import Event, Head
from vmishim.readahead.pieces import Pieces, agree
from vmishim.wire.plan import TAKE_MAX

PAGE_BITS = PAGE_SIZE.bit_length() - 1
Withheld = Callable[[], Iterable[int]]
"""Addresses that never become known, since reading them is an event."""


CLEAR_MAX = 1 << 14
"""Pieces up to which all are forgotten at once where nothing else is known, in a tenth of the time. More leave room for
as many behind, which the next walk of a large table would have to make again (10 ms for 262,144 heads)."""


class Batch:
    """Memory that came together and is forgotten together.

    :ivar words, cells: see `Pieces`
    :ivar until: when it is forgotten, by the store's clock
    """

    __slots__ = ("_wide", "cells", "until", "words")

    def __init__(self, words: dict[int, int] | None = None, until: float = 0.0) -> None:
        self.words: dict[int, int] = {} if words is None else words
        self.cells: dict[int, bytes] = {}
        self.until = until
        self._wide: set[int] | None = None

    def clear(self) -> None:
        """Own nothing."""
        self.words, self.cells, self._wide = {}, {}, None

    def add(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Take in what came, which is the batch's own from now on if it is the first."""
        self._wide = None
        if self.words or self.cells:
            self.words.update(words)
            self.cells.update(cells)
        else:
            self.words, self.cells = words, cells

    @property
    def wide_pages(self) -> set[int]:
        """Numbers of the pages in which a link may begin that lies in a piece wider than a word, at least in part."""
        if self._wide is None:
            sizes = list(map(len, self.cells.values()))
            spans = [(at - WORD, at + size - 1) for at, size in zip(self.cells, sizes, strict=True) if size > WORD]
            self._wide = {low >> PAGE_BITS for low, _ in spans} | {high >> PAGE_BITS for _, high in spans}
            for low, high in spans if max(sizes, default=0) > PAGE_SIZE else ():
                self._wide.update(range(low >> PAGE_BITS, high >> PAGE_BITS))
        return self._wide

    def wide(self, pages: set[int]) -> list[int]:
        """Addresses of the pieces wider than a word in which a link may be that begins in one of ``pages``."""
        return [
            at
            for at, cell in self.cells.items()
            if len(cell) > WORD
            and not pages.isdisjoint(range((at - WORD) >> PAGE_BITS, ((at + len(cell) - 1) >> PAGE_BITS) + 1))
        ]


class Live:
    """Outside a hold: newer bytes take the place of older ones, and are forgotten in time."""

    reads_arrays_ahead = True
    """Whether an array that is read through is brought ahead of the reads."""

    def __init__(self, source: MemoryReader) -> None:
        self.source = source
        """Answers single reads."""

    def until(self, now: float, seconds: float) -> float:
        """When memory that came ``now`` and is good for ``seconds`` is forgotten."""
        return now + seconds

    def look(self, head: Head, number: int, thread: int) -> Event:
        """Which event a look is, see `Head.look`."""
        return head.look(number, thread)

    def reconcile(self, known: Pieces, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Make what is to be known agree with what is: here it replaces it."""

    def drop(self, known: Pieces, words: Iterable[int], cells: Iterable[int]) -> None:
        """Forget these."""
        known.drop(words, cells)

    def drop_batch(self, known: Pieces, batch: Batch, *, last: bool) -> None:
        """Forget a batch. With the last one goes all that is known, if it is little."""
        if last and len(known.words) + len(known.cells) <= CLEAR_MAX:
            known.clear()
        else:
            known.drop(batch.words, batch.cells)

    def walked(self, known: Pieces, head: Pieces, neighbours: Pieces) -> None:
        """A list was walked. Another list may know its neighbours, as they were before the look."""
        known.drop(neighbours.words, neighbours.cells)

    def answer(self, known: Pieces, withheld: Withheld, address: int, data: bytes) -> bytes:
        """What is answered where ``data`` was read: just that."""
        return data


class Held:
    """Within a hold: a byte that was answered once stays what it was until the hold ends."""

    reads_arrays_ahead = False

    def __init__(self, source: MemoryReader) -> None:
        self.source = source
        """Answers single reads, and keeps whole pages."""

    def until(self, now: float, seconds: float) -> float:
        """Never, within the hold."""
        return math.inf

    def look(self, head: Head, number: int, thread: int) -> Event:
        """A look, of which it does not matter how many there are."""
        return Event.HELD_LOOK

    def reconcile(self, known: Pieces, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Take out of these what is known, lay over the rest what is known of it, and make the rest agree."""
        known.keep_first_answers(words, cells)
        agree(words, cells)

    def drop(self, known: Pieces, words: Iterable[int], cells: Iterable[int]) -> None:
        """Nothing is forgotten."""

    def drop_batch(self, known: Pieces, batch: Batch, *, last: bool) -> None:
        """Nothing is forgotten."""

    def walked(self, known: Pieces, head: Pieces, neighbours: Pieces) -> None:
        """A list was walked. What is read around its head has to agree with what the head was."""
        words, cells = head.words.copy(), head.cells.copy()
        self.reconcile(known, words, cells)
        known.update(words, cells)

    def answer(self, known: Pieces, withheld: Withheld, address: int, data: bytes) -> bytes:
        """Each byte as it was answered before, or else as it was read now; that is its answer from now on."""
        data = known.overlay(address, data)
        # It agrees with all that is known, so there is no need to compare.
        if address in withheld() or len(known.cells.get(address, b"")) >= len(data):
            return data
        if len(data) == WORD:
            known.update({address: int.from_bytes(data, "little")}, {})
        elif len(data) <= TAKE_MAX:
            known.update({}, {address: data})
        return data


class Store:
    """Kernel memory known right now. Safe for threads: each method is short, and none asks the guest.

    :param live: the policy outside a hold
    :param held: the policy within one
    :param withheld: addresses that never become known
    :param now: the clock, in seconds
    :param background: whether a thread forgets in time

    :ivar words: eight bytes each, by exact address; always the same object
    :ivar cells: everything else, likewise
    :ivar policy: the one that holds now
    :ivar due: when `expire` has something to do, or earlier
    :ivar expirations: how often it had
    """

    def __init__(
        self,
        live: Live,
        held: Held,
        withheld: Withheld,
        *,
        now: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._known = Pieces()
        self.words, self.cells = self._known.words, self._known.cells
        self._live, self._held = live, held
        self.policy: Live | Held = live
        self._withheld, self._now, self._background = withheld, now, background
        self._batches: OrderedDict[Batch, None] = OrderedDict()
        """Those that are known; the one due first comes first."""
        self._lock = threading.Lock()
        self._clock = Clock(self)
        self.due = math.inf
        self.expirations = 0

    @property
    def held(self) -> bool:
        """Whether this is a hold."""
        return self.policy is self._held

    def hold(self) -> None:
        """Forget everything. From now on nothing is, and the first answer is the answer."""
        self.clear()
        self.policy = self._held

    def release(self) -> None:
        """End the hold, and forget everything."""
        self.policy = self._live
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()
            self._batches.clear()
            self.due = math.inf

    def open(self, words: dict[int, int] | None = None) -> Batch:
        """A new batch, whose time begins now. It owns ``words``, which are not known by that."""
        now = self._now()
        batch = Batch(words, self.policy.until(now, STALE))
        with self._lock:
            self._batches[batch] = None
            self.due = min(self.due, batch.until)
        if self._background and batch.until < math.inf:
            self._clock.start(batch.until - now)
        return batch

    def renew(self, batch: Batch) -> bool:
        """Let a batch's time begin now. False when it is known no longer."""
        with self._lock:
            if batch not in self._batches:
                return False
            batch.until = self.policy.until(self._now(), STALE)
            self._batches.move_to_end(batch)
            return True

    def put(
        self, batch: Batch, words: dict[int, int], cells: dict[int, bytes], also: dict[int, int] | None = None
    ) -> None:
        """Know these until the batch's time is over, all at once for other threads; nothing if it is.

        :param words, cells: the batch's own from now on; what is withheld is taken out
        :param also: words that another batch owns, where ``words`` has none
        """
        with self._lock:
            if batch not in self._batches:
                return
            known = also | words if also else words
            for at in self._withheld():
                known.pop(at, None)
                cells.pop(at, None)
            self.policy.reconcile(self._known, known, cells)
            batch.add(words, cells)
            self._known.update(known, cells)

    def knows(self, batch: Batch) -> bool:
        """Whether a batch's time is not over."""
        return batch in self._batches

    def drop(self, batch: Batch) -> None:
        """Forget a batch before its time, outside a hold."""
        with self._lock:
            if batch in self._batches:
                self._end(batch)

    def withdraw(self, words: Iterable[int], cells: Iterable[int] = ()) -> None:
        """Forget single addresses, outside a hold, whichever batch they came with."""
        with self._lock:
            self.policy.drop(self._known, words, cells)

    def supersede(self, links: Iterable[int]) -> None:
        """Links are to become known: forget, outside a hold, wider pieces of the pages that they lie in.

        These are another list's, or of an array, and a wide read would find older links in them. A word is replaced by
        the younger one.
        """
        with self._lock:
            older = [batch for batch in self._batches if batch.wide_pages] if not self.held else []
            pages = {link >> PAGE_BITS for link in links} if older else set[int]()
            for batch in older:
                if not pages.isdisjoint(batch.wide_pages):
                    self._known.drop((), batch.wide(pages))

    def walked(self, head: Pieces, neighbours: Pieces) -> None:
        """A list was walked whose head and neighbours are kept apart."""
        with self._lock:
            self.policy.walked(self._known, head, neighbours)

    def expire(self) -> float | None:
        """Forget what is due. Returns seconds until the next batch is, None when nothing is ever due.

        What is forgotten may have been put again by another batch since: that costs a request, and nothing else.
        """
        with self._lock:
            now = self._now()
            while self._batches:
                batch = next(iter(self._batches))
                if batch.until > now:
                    self.due = batch.until
                    return max(0.001, batch.until - now) if batch.until < math.inf else None
                self._end(batch)
                self.expirations += 1
            self.due = math.inf
            return None

    def _end(self, batch: Batch) -> None:
        del self._batches[batch]
        self.policy.drop_batch(self._known, batch, last=not self._batches)
        batch.clear()  # its owner may keep it for long

    def read(self, address: int, count: int) -> bytes | None:
        """``count`` bytes at ``address``, when all are known."""
        with self._lock:
            return self._known.read(address, count)

    def answer(self, address: int, data: bytes) -> bytes:
        """What is answered where ``data`` was read; within a hold it is known from now on."""
        with self._lock:
            return self.policy.answer(self._known, self._withheld, address, data)

    def after_fork(self) -> None:
        """In a forked child, which has no clock thread, and where the lock is as another thread left it."""
        self._lock = threading.Lock()
        self._clock = Clock(self)
