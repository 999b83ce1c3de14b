"""All lists of a guest: does what their heads say, and tells the store what it may know. Under the reader's lock."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from vmishim.client import Remote
from vmishim.memory.lifetimes import COMPANION_STALE
from vmishim.memory.reader import MemoryReader
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD
from vmishim.readahead.head import Action, Event
from vmishim.readahead.learning import CHAIN_WORTH, CHAINS, Lesson, chain
from vmishim.readahead.listing import Listing
from vmishim.readahead.snapshot import Snapshot
from vmishim.readahead.store import Batch, Held, Live, Store
from vmishim.readahead.trails import Trail, Trails, cut, lines_of
from vmishim.readahead.walker import Walker, nothing_apart
from vmishim.wire.plan import Step


class Lists:
    """The lists of one guest, and what is known of its memory.

    :param remote: the agent
    :param pages: answers single reads within a hold
    :param lists: those that are known from the start
    :param now: the clock, in seconds
    :param background: whether a thread forgets in time

    :ivar by_address: each list by the address of its head
    :ivar trails: those that begin at no list
    """

    def __init__(
        self,
        remote: Remote,
        pages: MemoryReader,
        lists: Sequence[KernelList],
        *,
        now: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._remote, self._now = remote, now
        self._walker = Walker(remote)
        self.store = Store(Live(remote), Held(pages), self._withheld, now=now, background=background)
        self._expirations = 0
        self.by_address: OrderedDict[int, Listing] = OrderedDict()
        self._heads: dict[int, Listing] = {}
        self.trails = Trails()
        for kernel_list in lists:
            self._install(Listing(kernel_list))

    def __iter__(self) -> Iterator[Listing]:
        return iter(self.by_address.values())

    # ---- what happens ------------------------------------------------------------------------------------------------

    def tell(self, listing: Listing, event: Event) -> Action:
        """Tell a head what happened, and do what it says; peeking, answering and learning are left to the caller."""
        action = listing.head.on(event)
        if action in (Action.WALK, Action.WALK_ON):
            try:
                self._walk(listing)
            except BaseException:
                self.tell(listing, Event.FAIL)  # half a walk is not kept
                raise
        if action in (Action.PUBLISH, Action.WALK_ON):
            self._move_on(listing)
        elif action is Action.DROP:
            self._drop(listing)
        elif action is Action.FORGET:
            self._drop(listing)
            listing.snapshot = Snapshot()
            listing.companions.bring({}, 0.0)
        return action

    def tell_all(self, event: Event) -> None:
        """Tell each head the same."""
        for listing in self:
            self.tell(listing, event)

    def notice_neighbour(self, listing: Listing, address: int, count: int) -> None:
        """Tell a head when what is read is one step from it."""
        apart = listing.apart
        if apart.ranges and apart.has_neighbour(address, count) and listing.head.knows(Event.NEIGHBOUR):
            self.tell(listing, Event.NEIGHBOUR)

    def notice_expiry(self) -> None:
        """Tell each head whose walk is too old by now."""
        if self._now() >= self.store.due:
            self.store.expire()
        if self._expirations != self.store.expirations:  # by this thread or by the clock's
            self._expirations = self.store.expirations
            for listing in self:
                if listing.head.knows(Event.EXPIRE) and not self.store.knows(listing.batch):
                    self.tell(listing, Event.EXPIRE)

    def head_in(self, address: int, count: int, text: bool) -> tuple[Listing, int] | None:
        """The list whose head is read, by itself or within its node; and which head."""
        listing = self._heads.get(address)
        if listing is not None:
            return listing, address
        if count > WORD and not text:
            for listing in self:
                if listing.covers_head(address, count):
                    return listing, listing.kernel_list.start
        return None

    # ---- what is done about it ---------------------------------------------------------------------------------------

    def peek(self, listing: Listing, address: int, count: int) -> bytes:
        """Bring the head alone, as `Action.PEEK` says."""
        try:
            data = self._remote.read(address, count)
        except BaseException:
            self.tell(listing, Event.FAIL)
            raise
        self._drop(listing)
        nodes = listing.peek(address, data)
        # Another list may know them, as they were before the look.
        self.store.withdraw([node + field.offset for node in nodes for field in listing.fields])
        self.store.supersede(node + listing.kernel_list.link for node in nodes)
        return data

    def fetch(self, listing: Listing, lesson: Lesson) -> None:
        """Bring what was learned of a list, for all its nodes."""
        # Only what is added becomes known: what another list brought of the rest may be younger.
        more = listing.snapshot.bare()
        self._walker.collect(more, lesson.stage, rings=lesson.rings)
        if listing.lines and not lesson.rings:
            listing.lines += lines_of(more.words, {at: len(cell) for at, cell in more.cells.items()})
        self._publish(listing, more.words, more.cells)

    def begin(self, trail: Trail) -> None:
        """A pass over a trail begins; what was brought of it in the pass before is forgotten."""
        trail.begin(self._now())
        self.store.drop(trail.batch)
        for listing in [listing for listing in self if listing.on is trail]:
            self._remove(listing)

    def follow(self, trail: Trail) -> None:
        """Bring what is not known of a trail."""
        words, cells = trail.missing(self.store.words, self.store.cells)
        words = [at for at in words if self.trails.at(at) is None]
        lines = self._walker.lines(lines_of(words, cells))
        if not self.store.knows(trail.batch):
            trail.batch = self.store.open()
        found, whole = cut(lines, words, cells)
        trail.lose([at for at in words if at not in found], cells.keys() - whole.keys())
        self.store.put(trail.batch, found, whole)
        owner = next((listing for listing in self if listing.trail is trail), None)
        trail.sweep(Snapshot() if owner is None else owner.snapshot, self.store.words)

    def _walk(self, listing: Listing) -> None:
        """Walk a list, and know what its nodes hold."""
        if listing.kernel_list.table is not None and not listing.kernel_list.start:
            listing.locate(listing.kernel_list.located(self._remote))
            self._heads.update(dict.fromkeys(listing.kernel_list.head_addresses, listing))
        before = listing.batch.words if listing.empty_words and self.store.knows(listing.batch) else None
        self.store.drop(listing.batch)  # not the heads that were empty: most still are
        # Let go of the walk before, so that its memory is there for this one.
        listing.batch, listing.snapshot, listing.apart = Batch(), Snapshot(), nothing_apart()
        self.store.drop(listing.trail.batch)
        companions = [read for read in listing.companions.wanted if read[0] not in self._heads]
        result = self._walker.walk(listing.kernel_list, listing.plan, listing.fields, companions, listing.empty_words)
        listing.companions.bring(result.companions, self.store.policy.until(self._now(), COMPANION_STALE))
        listing.lines = self._walker.collect_rest(result.snapshot, listing.fields, listing.lines)
        listing.snapshot, listing.apart = result.snapshot.bare(), result.apart
        listing.batch = self.store.open()
        self.begin(listing.trail)
        # At once with the rest, or another thread would find a chain empty that is not.
        also = self._empty_heads(listing, before) if result.complete else None
        if also is None:
            self.store.drop(listing.empty_heads)
        self.store.supersede(node + listing.kernel_list.link for node in listing.snapshot.nodes[()])
        self._publish(listing, result.snapshot.words, result.snapshot.cells, also)
        self.store.walked(listing.apart.head, listing.apart.neighbours)
        listing.head.walked(threading.get_ident())
        listing.walks += 1

    def _empty_heads(self, listing: Listing, before: dict[int, int] | None) -> dict[int, int] | None:
        """The heads of a walked table that become known as empty, where the walk did not bring them: those not known
        as empty before, or all if nothing was known."""
        words = listing.empty_words
        if not words:
            return None
        if before is not None and self.store.renew(listing.empty_heads):
            return {at: words[at] for at in words.keys() & before.keys()}
        self.store.drop(listing.empty_heads)
        listing.empty_heads = self.store.open(words)
        return words

    def _move_on(self, listing: Listing) -> None:
        """Know a head's neighbours like all other nodes."""
        listing.head.moved_on()
        neighbours, listing.apart = listing.apart.neighbours, listing.apart.moved_on()
        # What is already known of them is younger.
        words = {at: word for at, word in neighbours.words.items() if at not in self.store.words}
        cells = {at: cell for at, cell in neighbours.cells.items() if at not in self.store.cells}
        self._publish(listing, words, cells)

    def _drop(self, listing: Listing) -> None:
        self.store.drop(listing.batch)
        self.store.drop(listing.empty_heads)
        self.store.drop(listing.trail.batch)
        listing.apart = nothing_apart()

    # ---- what becomes known ------------------------------------------------------------------------------------------

    def learned(self, extents: Iterable[tuple[int, bytes]]) -> None:
        """Know memory that did not come from here."""
        cells = {address: data for address, data in extents if data and address not in self._heads}
        words = {at: int.from_bytes(data, "little") for at, data in cells.items() if len(data) == WORD}
        self.keep(words, {at: data for at, data in cells.items() if at not in words})

    def keep(self, words: dict[int, int], cells: dict[int, bytes], trail: Trail | None = None) -> None:
        """Know what belongs to no list; what is on a trail until its next pass begins."""
        for listing in self:
            if listing.kernel_list.step == Step.RING_NODE:
                for at in [at for at in cells if len(cells[at]) > WORD and listing.kernel_list.is_head_node(at)]:
                    del cells[at]
        batch = self.store.open() if trail is None or not self.store.knows(trail.batch) else trail.batch
        if trail is not None:
            trail.batch = batch
        self.store.put(batch, words, cells)

    def _publish(
        self, listing: Listing, words: dict[int, int], cells: dict[int, bytes], also: dict[int, int] | None = None
    ) -> None:
        """Know what came with a list. What has a head in it stays apart: a read of it is a look."""
        for other in self:
            if other.kernel_list.step == Step.RING_NODE:
                own = other.kernel_list.start - other.kernel_list.link
                for field in listing.fields:  # the head's node may be what the nodes of another list point to
                    at = own + field.offset
                    if at in cells and other.covers_head(at, len(cells[at])):
                        cell = cells.pop(at)
                        if other is listing:
                            other.apart.head.update({}, {at: cell})
            if other is not listing and other.apart.ranges:  # or they would become known as they were at its older look
                other.apart.neighbours.refresh(words, cells)
        if listing.on is not None:
            listing.on.meet_all(words, cells)
        self.store.put(listing.batch, words, cells, also)

    def _withheld(self) -> list[int]:
        """Addresses that never become known: heads, and a head's neighbours until the listing moves on."""
        neighbours = [listing.apart.neighbours for listing in self if listing.apart.ranges]
        return [*self._heads, *(at for each in neighbours for at in (*each.words, *each.cells))]

    # ---- which lists there are ---------------------------------------------------------------------------------------

    def try_chain(self, start: int, bias: int, trail: Trail | None) -> bool:
        """Have a chain of reads as a list; until its next pass, if it is on a trail. False when it is not worth it."""
        if start in self._heads:
            return True
        listing = Listing(chain(start, bias))
        listing.on = trail
        self._install(listing)  # so that its head is not known like other words
        try:
            self.tell(listing, Event.LOOK)
        except BaseException:
            self._remove(listing)
            raise
        self.tell(listing, Event.NEIGHBOUR)
        if len(listing.snapshot.nodes[()]) < CHAIN_WORTH:  # a few pointers that happen to lie alike
            self._remove(listing)
            return False
        if trail is not None:
            trail.meet_all(listing.apart.head.words, {})
        self.trails.end(start)
        learned = [each for each in self if each.kernel_list.step == Step.CHAIN]
        if len(learned) > CHAINS:
            self._remove(learned[0])
        return True

    def _install(self, listing: Listing) -> None:
        kernel_list = listing.kernel_list
        self.by_address[kernel_list.start or kernel_list.head_addresses[0]] = listing
        self._heads.update(dict.fromkeys(kernel_list.head_addresses, listing))

    def _remove(self, listing: Listing) -> None:
        del self.by_address[listing.kernel_list.start]
        for address in listing.kernel_list.head_addresses:
            del self._heads[address]
        self._drop(listing)
