"""Reads ahead of an IDS: a read of a list's head walks the list in the guest, and the rest is answered from that walk.

The IDS declares nothing. What it reads beside a known node, or behind a pointer of one, is learned the second time
(`learning`), fetched at once for all nodes, and comes along with every later walk. A chain of dependent reads that
nobody declared is learned as a list of its own.

What a read of a head means is a table (`head`), what is known and until when is the store's business (`store`), asking
the guest the walker's (`walker`). `Lists` joins them; here are the lock, and the chain of what a read may be.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from struct import Struct

from vmishim.client import Remote
from vmishim.errors import FaultError
from vmishim.memory.pages import Pages
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, Extent
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.companions import COMPANIONS
from vmishim.readahead.fields import WORD
from vmishim.readahead.head import Action, Event
from vmishim.readahead.learning import explain, leads_to, learn
from vmishim.readahead.listing import Listing
from vmishim.readahead.lists import Lists
from vmishim.readahead.patterns import RUN_BYTES, RUN_BYTES_BEHIND, Chains, Run
from vmishim.readahead.pointees import Pointees
from vmishim.readahead.trails import Trail


class ReadAhead:
    """A reader stacked on the agent. Safe for threads: hits take no lock.

    :param remote: the agent
    :param lists: lists that are known from the start
    :param now: the clock, in seconds
    :param background: whether a thread forgets in time; without one, call `expire` whenever the clock has moved

    :ivar words: kernel memory known right now, eight bytes by exact address; always the same object
    :ivar cells: the same for everything else
    :ivar listings: each list by the address of its head
    """

    def __init__(
        self,
        remote: Remote,
        lists: Sequence[KernelList],
        *,
        now: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._remote, self._now = remote, now
        self._lock = threading.RLock()
        self._pages = Pages(remote, now=now)
        self._lists = Lists(remote, self._pages, lists, now=now, background=background)
        self._store = self._lists.store
        self.words, self.cells = self._store.words, self._store.cells
        self.listings = self._lists.by_address
        self._pointees = Pointees(remote)
        self._chains, self._run = Chains(), Run()
        self._current: Listing | None = None
        """The listing that began last."""
        _living.add(self)

    # ---- the contract ------------------------------------------------------------------------------------------------

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`. With ``text``, fewer bytes may come, the last of them NUL."""
        with self._lock:
            if space != KERNEL:
                return self._pages.read(address, count, space)
            if count <= 0:
                return b""
            self._lists.notice_expiry()
            look = self._look(address, count, text)
            if look is not None:
                return self._store.answer(address, look)
            known = self._known(address, count, text)
            if known is not None:
                return known
            if address < KERNEL_FLOOR:
                raise FaultError(address)
            for attempt in (self._companion, self._head_node, self._node, self._trail, self._array):
                data = attempt(address, count, text)
                if data is not None:
                    return self._store.answer(address, data)
            return self._store.answer(address, self._unexplained(address, count, text))

    def learned(self, extents: Iterable[Extent]) -> None:
        """Know what came from elsewhere, such as an injected program, as if it had been read ahead."""
        with self._lock:
            self._lists.learned(extents)

    def hold(self) -> None:
        """From now on everything is as of one hold."""
        with self._lock:
            self._forget(Event.HOLD)
            self._pages.hold()
            self._store.hold()

    def release(self) -> None:
        """End the hold; the next read asks the guest."""
        with self._lock:
            self._store.release()
            self._pages.release()
            self._forget(Event.RELEASE)

    def flush(self) -> None:
        """Forget all memory, not what was learned."""
        with self._lock:
            self._pages.flush()
            self._forget(Event.FLUSH)

    def expire(self) -> None:
        """Forget memory whose time is over. Does not wait for a thread that waits for the guest."""
        self._store.expire()

    def after_fork(self) -> None:
        """Start again in a forked child; a hold goes on there."""
        whole = self._lock.acquire(blocking=False)  # or another thread of the parent had it, and left things half done
        self._lock = threading.RLock()
        self._store.after_fork()
        if self._store.held and whole:
            return
        self._pages.after_fork()
        if self._store.held:
            self._pages.flush()
        self._forget(Event.FLUSH)

    def _forget(self, event: Event) -> None:
        self._store.clear()
        self._chains.clear()
        self._run = Run()
        self._lists.tell_all(event)

    # ---- what a read may be ------------------------------------------------------------------------------------------

    def _look(self, address: int, count: int, text: bool) -> bytes | None:
        """A head is read, by itself or within its node."""
        found = self._lists.head_in(address, count, text)
        if found is None:
            return None
        listing, head_address = found
        self._current = listing
        head, number = listing.head, listing.head_number(head_address)
        event = self._store.policy.look(head, number, threading.get_ident())
        if self._lists.tell(listing, event) is Action.PEEK:
            return self._lists.peek(listing, address, count)
        head.last_head = number
        if count > WORD:
            self._lists.notice_neighbour(listing, address, count)
        data = listing.apart.head.read(address, count)
        return data if data is not None else self._single(address, count)

    def _known(self, address: int, count: int, text: bool) -> bytes | None:
        """Memory that is known."""
        for listing in self._lists:
            self._lists.notice_neighbour(listing, address, count)
        if text:
            cell = self.cells.get(address)
            if cell is not None and 0 in cell:
                return cell
        data = self._store.read(address, count)
        for listing in self._lists if data is None else ():
            if listing.kernel_list.is_head_node(address):
                data = listing.apart.head.read(address, count)
                if data is not None:
                    data = self._store.answer(address, data)
        return data

    def _companion(self, address: int, count: int, text: bool) -> bytes | None:
        """A single read that came along with a listing; with several, the last one's, and none is used again."""
        came = [found for listing in self._lists if (found := listing.companions.take((address, count)))]
        if not came:
            return None
        data, until = max(came, key=itemgetter(1))
        if self._now() >= until:
            return None  # it is read like any other
        self._begin_trail(address, data)
        return data

    def _head_node(self, address: int, count: int, text: bool) -> bytes | None:
        """The node that a head is in, of which nothing is known: many a listing begins with it."""
        for listing in self._lists:
            if listing.kernel_list.is_head_node(address) and listing.head.knows(Event.HEAD_NODE):
                self._lists.tell(listing, Event.HEAD_NODE)
                self._current = listing
                return self._known_or_single(address, count, text)
        return None

    def _node(self, address: int, count: int, text: bool) -> bytes | None:
        """A node that a walk met, or what one points to: learn the field, or walk again where the walk is too old."""
        explained = explain(self._lists, self._pointees, address, count, text)
        if explained is None:
            return None
        listing, field = explained
        if self._lists.tell(listing, Event.NODE) is Action.LEARN:
            lesson = learn(listing, field)
            if lesson is None:
                own = self._lists.trails.end(address)
                if own is not None:
                    listing.trail.absorb(own)
                return self._behind(listing.trail, address, count, text)
            self._lists.fetch(listing, lesson)
        return self._known_or_single(address, count, text)

    def _trail(self, address: int, count: int, text: bool) -> bytes | None:
        """What an earlier pass read behind a pointer: bring all that it read."""
        if self._lists.trails.at(address) is not None and not self._take_in(address):
            return None  # a pass begins here
        trail = next((trail for trail in self._trails() if trail.has(address, count, self._now())), None)
        return self._behind(trail, address, count, text) if trail is not None else None

    def _array(self, address: int, count: int, text: bool) -> bytes | None:
        """An array that is read through: bring what comes next with what was asked for."""
        if not self._store.policy.reads_arrays_ahead:
            return None
        trail = self._run.trail if self._run.goes_on(address) else self._trail_to(address)
        self._run.trail = trail
        ahead = self._run.bytes_ahead(address, count, RUN_BYTES_BEHIND if trail is not None else RUN_BYTES)
        if not ahead:
            return None
        try:
            data = self._remote.read(address, ahead)
        except FaultError as fault:
            data = fault.data
        if len(data) < count:
            return self._single(address, count)
        whole = len(data) // WORD
        if count == WORD and address % WORD == 0:
            values = Struct(f"<{whole}Q").unpack_from(data)
            words = dict(zip(range(address, address + whole * WORD, WORD), values, strict=True))
            if trail is not None:
                trail.meet_all(words, {})
            self._lists.keep(words, {}, trail)
        else:
            self._lists.keep({}, {address: data}, trail)
        self._run.go_on(address + (whole * WORD or len(data)))
        return data[:count]

    def _unexplained(self, address: int, count: int, text: bool) -> bytes:
        """Anything else: read it alone. It may go with a listing, be on a trail, or be a link of a chain."""
        data = self._single(address, count)
        trail = None
        if not self._begin_trail(address, data):
            trail = self._trail_to(address)
            if trail is not None:
                trail.meet(address, data, text)
            elif not text:
                self._lists.trails.add(address, data, self._now())
        if self._current is not None and self._current.head.is_walked and (trail is None or len(trail) < COMPANIONS):
            self._current.companions.meet((address, count))
        if count == WORD:
            found = self._chains.follow(address, int.from_bytes(data, "little"))
            if found is not None and found[0] not in self._chains.fruitless:
                start, bias = found
                if not self._lists.try_chain(start, bias, self._trail_to(start)):
                    self._chains.dismiss(start)
        return data

    def _begin_trail(self, address: int, data: bytes) -> bool:
        """Begin a pass, where a trail begins at ``address``, unless something else leads there by now."""
        trail = self._lists.trails.at(address)
        if trail is None or self._take_in(address):
            return False
        self._lists.trails.use(address)
        trail.start(data)
        self._lists.begin(trail)
        return True

    def _take_in(self, address: int) -> bool:
        """Make the trail that begins at ``address`` part of another one, if a pass is under way that leads there."""
        trail = self._lists.trails.at(address)
        other = self._trail_to(address, trail)
        if trail is None or other is None or not other.is_under_way(self._now()):
            return False
        self._lists.trails.end(address)
        other.absorb(trail)
        return True

    def _trails(self) -> Iterator[Trail]:
        """Trails that a read may be on, the most likely first."""
        if self._current is not None:
            yield self._current.trail
        yield from self._lists.trails
        for listing in self._lists:
            if listing is not self._current:
                yield listing.trail

    def _trail_to(self, address: int, besides: Trail | None = None) -> Trail | None:
        """The trail that a read is on, since a pointer of known memory leads there; one ``besides`` another."""
        listing = self._current
        if listing is not None and (listing.trail.leads_to(address) or leads_to(listing, address)):
            return listing.trail
        found = (trail for trail in self._lists.trails if trail is not besides and trail.leads_to(address))
        return next(found, None)

    def _behind(self, trail: Trail, address: int, count: int, text: bool) -> bytes:
        """A read on a trail: from what an earlier pass over it read, or alone."""
        if trail.has(address, count, self._now()):
            self._lists.follow(trail)
            known = self._known(address, count, text)
            if known is not None:
                return known
        data = self._single(address, count)
        trail.meet(address, data, text)
        return data

    def _known_or_single(self, address: int, count: int, text: bool) -> bytes:
        data = self._known(address, count, text)
        return data if data is not None else self._single(address, count)

    def _single(self, address: int, count: int) -> bytes:
        """Ask the guest; within a hold, once for each page."""
        return self._store.policy.source.read(address, count)


_living: weakref.WeakSet[ReadAhead] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child has no clock thread, and locks as other threads of its parent left them."""
    for reader in list(_living):
        reader.after_fork()


os.register_at_fork(after_in_child=_after_fork)
