"""Reads ahead of an IDS: a read of a list's head walks the list in the guest, and the rest is answered from that walk.

Nothing is declared by the IDS. What it reads beside a known node, or behind a pointer of one, is learned the second
time (`_learn`), fetched at once for all nodes, and comes along with every later walk. A chain of dependent reads that
nobody declared is learned as a list of its own (`_follow`).

Freshness (docs/freshness.md): each look at a head asks the guest, and the last one before the listing moves on brings
the list; no byte is served that is older than `STALE` seconds; between `hold` and `release` everything is as of one
hold.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from struct import Struct
from typing import Any

from vmishim.client import Remote
from vmishim.errors import FaultError
from vmishim.memory.lifetimes import COMPANION_STALE, STALE
from vmishim.memory.pages import Pages
from vmishim.memory.reader import ADDRESSES, KERNEL, KERNEL_FLOOR, Extent
from vmishim.readahead.catalogue import NODES_MAX, Place
from vmishim.readahead.clock import Clock
from vmishim.readahead.fields import RING, WORD, Field, Fields, Hop, Path, Stage
from vmishim.readahead.patterns import Chains, Run
from vmishim.readahead.pieces import Pieces
from vmishim.readahead.pointees import ARRAY, Pointees
from vmishim.readahead.snapshot import TAGS, Snapshot, is_kernel
from vmishim.wire.messages import AgentError, Chunk
from vmishim.wire.plan import HEADS_MAX, TAKE_MAX, Kind, Plan, Step, Take, Text

log = logging.getLogger(__name__)

LEARN_MAX = 12288
"""Bytes of the largest read that is learned as a field, a whole ``task_struct``; larger ones go one by one."""
COMPANION_MAX = 256
"""Bytes of the largest single read that comes along with a listing."""
TEXT, LONG_TEXT = 64, 256
"""Bytes that are brought of a string: at first, and once it turned out longer."""
DEPTH = 8
"""Pointers from a node that are followed."""
CHAINS = 16
"""Lists learned from chains of reads that are kept; the one learned first makes room."""
CHAIN_WORTH = 8
"""Nodes from which on such a list is worth a walk of its own."""
FRUITLESS_MAX = 1024
"""Chains that are remembered as not worth one."""
COMPANIONS = 32
"""Single reads of a listing that are remembered, to be brought along once they come again."""


class Listing:
    """One list, what is wanted of its nodes, and its last walk."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fields = Fields(place.fields)
        self.snapshot: Snapshot | None = None
        self.entrance = Pieces()
        """The doors' pointers, and all of the head's own node. What has a door in it is kept out of what is known:
        reading it means something."""
        self.beyond = Pieces()
        """The nodes one step from the head, likewise: reading one says that the listing has moved on."""
        self.edges: tuple[tuple[int, int], ...] = ()
        """Where these are, as (start, end); empty once the listing has moved on."""
        self.looks: Counter[int] = Counter()
        """Times each door was looked at since the listing last moved on, by its number."""
        self.habit: Counter[int] = Counter()
        """The same, of the listing before: with the last of so many looks the list comes."""
        self.passed = -1
        """Number of the door that was read last since the walk: those behind it are part of the same listing."""
        self.peeked = False
        """Whether the head was brought alone, and the list is to be walked when the listing moves on."""
        self.visitor = 0
        """The thread that began it."""
        self.empty: dict[int, int] = {}
        """For a table, what its heads hold when they are empty."""
        self.filled = False
        """Whether a head of which the last walk said nothing is empty."""
        self.seen: set[tuple[Path, int]] = set()
        """Fields that were met once."""
        self.companions: OrderedDict[tuple[int, int], bool] = OrderedDict()
        """Single reads, address and count, that go with this listing; true for those met more than once, which come
        along."""
        self.brought: dict[tuple[int, int], bytes] = {}
        """Those that came with the last walk, each until it is read: who reads it again waits for it to change."""
        self.brought_at = 0.0
        self.expires = 0.0
        self.hurried = 0.0
        """The `expires` at which a table's empty heads were forgotten while another thread had the lock."""
        self.forgotten = False
        """Whether the snapshot's memory was forgotten since; where its nodes were is not."""
        self.walks = 0
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """What walks the list and brings its own fields; made anew when one was learned."""
        ops = self.fields.stages[0].ops
        if self._plan is None or self._plan.ops is not ops:
            self._plan = self.place.plan(ops)
        return self._plan

    def touches(self, address: int, count: int) -> bool:
        """Whether a read is of what is one step from the head."""
        return any(start < address + count and address < end for start, end in self.edges)

    def clear(self) -> None:
        """Forget the last walk, not what was learned."""
        self.snapshot, self.entrance, self.beyond = None, Pieces(), Pieces()
        self.edges, self.peeked, self.brought = (), False, {}


class ReadAhead:
    """A reader stacked on the agent. Safe for threads: hits take no lock.

    :param remote: the agent
    :param places: lists that are known from the start
    :param now: the clock, in seconds
    :param background: whether a thread forgets in time; without one, call `expire` whenever the clock has moved

    :ivar words: kernel memory known right now, eight bytes by exact address
    :ivar cells: the same for everything else
    """

    def __init__(
        self,
        remote: Remote,
        places: Sequence[Place],
        *,
        now: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._remote = remote
        self._now, self._background = now, background
        self._pages = Pages(remote, now=now)
        self.lock = threading.RLock()
        self._known = Pieces()
        self.words, self.cells = self._known.words, self._known.cells
        self.listings: OrderedDict[int, Listing] = OrderedDict()
        self._doors: dict[int, Listing] = {}
        self._holding = False
        self._chains = Chains()
        self._fruitless: OrderedDict[int, bool] = OrderedDict()
        self._current: Listing | None = None
        """The listing that was begun last."""
        self._run = Run()
        self._pointees = Pointees(remote)
        self._clock = Clock(self)
        for place in places:
            self._install(Listing(place))
        _living.add(self)

    # ---- the contract ------------------------------------------------------------------------------------------------

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`. With ``text``, fewer bytes may come, the last of them NUL."""
        with self.lock:
            if space != KERNEL:
                return self._pages.read(address, count, space)
            if count <= 0:
                return b""
            listing, door = self._doors.get(address), address
            if listing is None and count > WORD and not text:
                listing, door = self._copied(address, count)
            if listing is not None:
                return self._answered(address, self._enter(listing, door, address, count))
            data = self._find(address, count, text)
            if data is not None:
                return data
            if address < KERNEL_FLOOR:
                raise FaultError(address)
            data = self._companion(address, count)
            return self._answered(address, self._miss(address, count, text) if data is None else data)

    def hold(self) -> None:
        """From now on everything is as of one hold."""
        with self.lock:
            self._forget()
            self._pages.hold()
            self._holding = True

    def release(self) -> None:
        """End the hold; the next read asks the guest."""
        with self.lock:
            self._holding = False
            self._pages.release()
            self._forget()

    def flush(self) -> None:
        """Forget all memory, not what was learned."""
        with self.lock:
            self._pages.flush()
            self._forget()

    def learned(self, extents: Iterable[Extent]) -> None:
        """Know what came by another road, such as an injected program, as if it had been read ahead."""
        with self.lock:
            cells = {address: data for address, data in extents if data and address not in self._doors}
            words = {at: int.from_bytes(data, "little") for at, data in cells.items() if len(data) == WORD}
            self._keep(words, {at: data for at, data in cells.items() if at not in words})

    def _keep(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Know for a while what belongs to no list."""
        for place in [listing.place for listing in self.listings.values() if listing.place.step == Step.RING_NODE]:
            for at in [at for at, data in cells.items() if len(data) > WORD and place.is_head_node(at)]:
                del cells[at]
        self._know(words, cells)
        self._run.keep(self._now(), words, cells)
        if self._background and not self._holding:
            self._clock.start(STALE)

    def after_fork(self) -> None:
        """Begin anew in a forked child; a hold goes on there."""
        whole = self.lock.acquire(blocking=False)  # or another thread of the parent had it, and left things half done
        self.lock = threading.RLock()
        self._clock = Clock(self)
        if self._holding and whole:
            return
        self._pages.after_fork()
        if self._holding:
            self._pages.flush()
        self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self._chains.clear()
        self._run = Run()
        for listing in self.listings.values():
            listing.clear()

    # ---- lists -------------------------------------------------------------------------------------------------------

    def _install(self, listing: Listing) -> None:
        self.listings[listing.place.start or listing.place.doors[0]] = listing
        for door in listing.place.doors:
            self._doors[door] = listing

    def _copied(self, address: int, count: int) -> tuple[Listing | None, int]:
        """The list whose head lies in what is read of its own node, and the door; None when none does."""
        for listing in self.listings.values():
            start = listing.place.start
            if listing.place.is_head_node(address) and address < start + 2 * WORD and start < address + count:
                return listing, start
        return None, 0

    def _enter(self, listing: Listing, door: int, address: int, count: int) -> bytes:
        """A door was read: with this look the list comes, or with one after it, as this script goes."""
        self._current = listing
        if not self._holding:
            number = listing.place.doors.index(door) if listing.place.table else 0  # a ring's two are one head
            listing.looks[number] += 1
            # Another thread's walk is not the beginning of this one's listing.
            ours = bool(listing.edges) and listing.visitor == threading.get_ident()
            if not (ours and number > listing.passed and self._now() < listing.expires):
                # Scripts look more than once (LibVMI's process-list.c does so at the end, its process-list.py before
                # it begins); no two of these looks need lie close together, so none is answered by another's walk.
                if listing.looks[number] < listing.habit[number]:
                    return self._peek(listing, address, count)
                self._walk(listing)
            listing.passed = number
        elif listing.snapshot is None:
            self._walk(listing)
        if count > WORD and listing.touches(address, count):
            self._move_on(listing)
        data = listing.entrance.read(address, count)
        return data if data is not None else self._single(address, count)

    def _peek(self, listing: Listing, address: int, count: int) -> bytes:
        """Bring a head alone, and see to it that the list is walked as soon as anything more of it is read."""
        data = self._remote.read(address, count)
        self._outdate(listing)
        place = listing.place
        if place.table is not None:
            listing.edges = ((place.start, place.start + place.heads * place.stride),)
        else:
            doors = [door for door in place.doors if address <= door <= address + count - WORD]
            links = {int.from_bytes(data[door - address :][:WORD], "little") for door in doors} - {place.start}
            nodes = [link + place.bias - place.link for link in links]
            listing.edges = tuple((node - place.before, node + place.after) for node in nodes)
            fields = [node + field.offset for node in nodes for field in listing.fields]
            self._known.drop(fields, fields)  # another list may know them, of before the look
        listing.expires, listing.peeked = 0.0, True
        return data

    def _walk(self, listing: Listing) -> None:
        """Take a new snapshot of a list."""
        if listing.place.table is not None and not listing.place.start:
            self._settle(listing)
        place = listing.place
        if listing.snapshot is not None:  # what a table holds when it is empty stays, and is written over
            self._known.drop(listing.snapshot.words, listing.snapshot.cells)
        before = listing.snapshot if listing.filled and not listing.forgotten else None
        due = listing.expires
        listing.clear()
        snapshot = Snapshot()
        own, *others = listing.fields.stages
        try:
            self._walk_list(listing, snapshot, own)
            for stage in others:
                (self._walk_rings if stage.root[-1].span == RING else self._gather)(snapshot, stage)
        except BaseException:
            listing.clear()  # half a snapshot is none
            self._known.drop(listing.empty, ())
            raise
        listing.snapshot = snapshot
        listing.expires = self._now() + STALE
        words = snapshot.words
        if listing.filled:
            # At once, or another thread would find a chain empty that is not; and of a large table only those that
            # were not empty before.
            empty = listing.empty
            if before is None or listing.hurried == due:
                words = empty.copy()
            else:
                words = {at: empty[at] for at in empty.keys() & before.words.keys()}
            words.update(snapshot.words)
        else:
            self._known.drop(listing.empty, ())
        self._publish(listing, words, snapshot.cells)
        if self._holding:
            # Here a second look means nothing; and what is read around the head has to agree with the first.
            self._lay(listing.entrance.words.copy(), listing.entrance.cells.copy())
        else:
            # Another list may know them, of before the look.
            self._known.drop(listing.beyond.words, listing.beyond.cells)
        listing.visitor, listing.passed = threading.get_ident(), -1
        listing.walks += 1
        listing.forgotten = False
        if self._background and not self._holding:
            self._clock.start(STALE)
        log.debug("walked %s: %d nodes", place.name, len(snapshot.nodes[()]))

    def _settle(self, listing: Listing) -> None:
        place = listing.place = listing.place.settled(self._remote)
        for door in place.doors:
            self._doors[door] = listing
        if place.step == Step.NULLS:
            ends = range(place.nulls * 2 + 1, (place.nulls + place.heads) * 2 + 1, 2)
            listing.empty = dict(
                zip(range(place.start, place.start + place.heads * place.stride, place.stride), ends, strict=True)
            )

    def _walk_list(self, listing: Listing, snapshot: Snapshot, stage: Stage) -> None:
        place, plan = listing.place, listing.plan
        before = -1
        found: dict[int, bytes] = {}
        reads = [read for read, again in listing.companions.items() if again and read[0] not in self._doors]
        for chunk in self._chunks(plan, reads=reads, found=found):
            records = snapshot.add(plan, stage, chunk.bulk)
            for value, head, kind in records if place.table else ():
                if head != before:
                    address = place.start + head * place.stride
                    if kind == Kind.FAULT:
                        self.words.pop(address, None)
                        listing.empty.pop(address, None)
                    else:
                        pointer = value if kind == Kind.HEAD else value + place.link - place.bias
                        snapshot.words[address] = pointer % ADDRESSES
                before = head
        nodes, words = snapshot.nodes[()], snapshot.words
        if place.step == Step.CHAIN and nodes and chunk.cycle_at == nodes[0] + place.link:
            chunk = replace(chunk, cycles=0)  # no loop, but a ring that a pointer from outside leads into
        whole = not _report(place.name, chunk)
        listing.brought = {(at, len(data)): data for at, data in found.items()}
        listing.brought_at = self._now()
        # Past the end of a walk that was cut short, and where a chain's first node can't be read, no head is empty.
        listing.filled = whole and bool(listing.empty)
        doors: dict[int, int] = {}
        edges: list[int] = []
        if place.step in (Step.RING, Step.RING_NODE):
            if any(chunk.head):
                doors = {place.start: chunk.head[0], place.start + WORD: chunk.head[1]}
                edges = [link - place.link for link in dict.fromkeys(chunk.head) if link != place.start]
        elif place.table is not None:
            heads = listing.empty if listing.filled else {}
            doors = {door: words.get(door, heads.get(door, -1)) for door in place.doors}
            doors[place.table[0]] = place.start - place.table[2]
            doors = {door: value for door, value in doors.items() if value >= 0}
            edges = nodes[:1]
            second = place.start + place.stride
            if place.heads > 1:
                listing.edges = ((second, second + WORD),)
                if second in words or second in heads:
                    listing.beyond.words[second] = words.setdefault(second, heads.get(second, 0))
        elif nodes:
            doors = {place.start: (nodes[0] + place.link - place.bias) % ADDRESSES}
            edges = nodes[:1]
        listing.edges += tuple((node - place.before, node + place.after) for node in edges)
        at = {field.offset for field in listing.fields}
        _copy(snapshot, [node + offset for node in edges for offset in at], listing.beyond)
        if place.step == Step.RING_NODE:
            _copy(snapshot, [place.start - place.link + offset for offset in at], listing.entrance)
        listing.entrance.words.update(doors)

    def _chunks(self, plan: Plan, heads: Sequence[int] = (), **also: Any) -> list[Chunk]:
        """All of a walk, see `Remote.walk`; begun anew, once, where the agent was restarted in the middle of it."""
        try:
            return list(self._remote.walk(plan, heads, **also))
        except AgentError as error:
            if error.code != "walk":
                raise
            return list(self._remote.walk(plan, heads, **also))

    def _gather(self, snapshot: Snapshot, stage: Stage) -> None:
        """Collect fields wherever a path leads."""
        heads = sorted({head for head in snapshot.addresses(stage.root) if head >= KERNEL_FLOOR})
        for some in _portions(heads):
            plan = Plan(0, Step.SELF, stage.ops, heads=len(some), stride=0)
            for chunk in self._chunks(plan, some):
                snapshot.add(plan, stage, chunk.bulk)

    def _walk_rings(self, snapshot: Snapshot, stage: Stage) -> None:
        """Walk the rings that hang from the nodes."""
        path, hop = stage.root[:-1], stage.root[-1]
        snapshot.nodes[stage.root] = []
        heads = sorted({base + hop.offset for base in snapshot.addresses(path) if is_kernel(base + hop.offset)})
        for some in _portions(heads):
            plan = Plan(0, Step.RING, stage.ops, heads=len(some), stride=0, link=hop.link, max_nodes=NODES_MAX)
            ends: dict[int, list[int]] = {}
            for chunk in self._chunks(plan, some):
                for node, number, kind in snapshot.add(plan, stage, chunk.bulk):
                    if kind == Kind.NODE:
                        link = (node + hop.link) % ADDRESSES
                        ends.setdefault(number, [link, 0])[1] = link
            if _report("rings", chunk):
                continue  # whose ends are not known for sure
            for number, head in enumerate(some):
                snapshot.words[head], snapshot.words[head + WORD] = ends.get(number, (head, head))

    def _publish(self, listing: Listing, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Know what was read of a list, but for what means something when it is read, of whatever list."""
        for other in self.listings.values():
            if other.place.step == Step.RING_NODE:
                own = other.place.start - other.place.link
                for field in listing.fields:  # the head's node may be what the nodes of another list point to
                    at = own + field.offset
                    cell = cells.get(at)
                    if cell is not None and at < other.place.start + 2 * WORD and other.place.start < at + len(cell):
                        del cells[at]
                        if other is listing:
                            other.entrance.update({}, {at: cell})
        self._know(words, cells)

    def _answered(self, address: int, data: bytes) -> bytes:
        """What is read at an address; within a hold, of each byte what was answered before, and from now on this."""
        if not self._holding:
            return data
        data = self._known.overlay(address, data)
        # It agrees with all that is known, which may be much: there is no need to compare.
        if address in self._kept() or len(self.cells.get(address, b"")) >= len(data):
            return data
        if len(data) == WORD:
            self._known.update({address: int.from_bytes(data, "little")}, {})
        elif len(data) <= TAKE_MAX:
            self._known.update({}, {address: data})
        return data

    def _know(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Know these, but for what means something when it is read. Takes out of them what is not to be known."""
        for kept in self._kept():
            words.pop(kept, None)
            cells.pop(kept, None)
        self._lay(words, cells)

    def _lay(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        if self._holding:  # what was answered once is the answer
            self._known.keep_first_answers(words, cells)
        self._known.update(words, cells)

    def _kept(self) -> list[int]:
        """Addresses kept out of what is known, since reading them means something."""
        return [
            *self._doors,
            *(
                at
                for listing in self.listings.values()
                if listing.edges
                for at in (*listing.beyond.words, *listing.beyond.cells)
            ),
        ]

    def _drop(self, listing: Listing) -> None:
        """Know a listing's memory no more."""
        if listing.snapshot is not None:
            self._known.drop(listing.snapshot.words, listing.snapshot.cells)
            self._known.drop(listing.empty, ())

    def _outdate(self, listing: Listing) -> None:
        """Forget a list's memory; where its nodes were stays: a listing that goes on is known again by it."""
        self._drop(listing)
        if listing.snapshot is not None:
            listing.snapshot.words, listing.snapshot.cells = {}, {}
        listing.entrance, listing.beyond, listing.edges, listing.forgotten = Pieces(), Pieces(), (), True

    def _find(self, address: int, count: int, text: bool) -> bytes | None:
        """Memory a snapshot or the hold has."""
        for listing in self.listings.values():
            if listing.edges and listing.touches(address, count):
                self._move_on(listing)
        if text:
            cell = self.cells.get(address)
            if cell is not None and 0 in cell:
                return cell
        data = self._known.read(address, count)
        for listing in self.listings.values() if data is None else ():
            if listing.place.is_head_node(address):
                data = listing.entrance.read(address, count)
                if data is not None and self._holding:
                    data = self._known.overlay(address, data)
        return data

    def _move_on(self, listing: Listing) -> None:
        """The listing is past its first node: know that like any other."""
        if listing.peeked:
            self._walk(listing)
        if listing.looks:
            listing.habit, listing.looks = listing.looks, Counter()
        beyond, listing.beyond, listing.edges = listing.beyond, Pieces(), ()
        # What is known of it by now is younger.
        words = {at: word for at, word in beyond.words.items() if at not in self.words}
        cells = {at: cell for at, cell in beyond.cells.items() if at not in self.cells}
        if listing.snapshot is not None:
            listing.snapshot.words.update(words)
            listing.snapshot.cells.update(cells)
        self._publish(listing, words, cells)

    # ---- learning ----------------------------------------------------------------------------------------------------

    def _miss(self, address: int, count: int, text: bool) -> bytes:
        """Read what no snapshot has, and learn from it."""
        for listing in self.listings.values():
            if listing.snapshot is None and listing.place.is_head_node(address):
                # The head's own node comes first in many a listing: this is how it begins.
                self._walk(listing)
                self._current = listing
                data = self._find(address, count, text)
                return data if data is not None else self._single(address, count)
        explained = self._explain(address, count, text)
        if explained is not None:
            listing, field = explained
            if not self._holding and self._now() >= listing.expires:
                # A listing that takes longer than STALE goes on, on fresh memory.
                self._walk(listing)
                if not listing.place.is_head_node(address):
                    self._move_on(listing)
                learned = True
            else:
                learned = self._learn(listing, field)
            if learned:
                data = self._find(address, count, text)
                if data is not None:
                    return data
            return self._single(address, count)
        ahead = 0 if self._holding else self._run.bytes_ahead(address, count)
        if ahead:
            return self._read_on(address, count, ahead)
        data = self._single(address, count)
        self._accompany(address, count)
        if count == WORD:
            chain = self._chains.follow(address, int.from_bytes(data, "little"))
            if chain is not None:
                self._learn_chain(*chain)
        return data

    def _explain(self, address: int, count: int, text: bool) -> tuple[Listing, Field] | None:
        """Which field of which list's nodes a read is, as far as the last walks tell."""
        if count > LEARN_MAX:
            return None
        for listing in self.listings.values():
            if listing.snapshot is None:
                continue
            place = listing.place
            sizes = {fields[0].path: size for _, fields, _, size in place.inner}
            for root in listing.snapshot.nodes:
                node = listing.snapshot.node_near(root, address, place.before, sizes.get(root, place.after))
                if node is not None:
                    return listing, _field(root, address - node, count, text)
        best: tuple[Listing, Field] | None = None
        closest = ARRAY
        for listing in self.listings.values():
            if listing.snapshot is None:
                continue
            self._pointees.ask(listing.place, listing.snapshot)
            for column in listing.snapshot.candidates:
                path, offset, span = column
                if span != WORD and Field(path, offset, span) not in listing.fields.whole:
                    continue  # an array that has since become part of a larger one
                reach = self._pointees.reach(listing.place, column) if len(path) < DEPTH else 0
                for tags in TAGS if reach else ():
                    base = listing.snapshot.pointer_near(column, tags, address, reach)
                    if base is not None and address - base < closest:
                        closest = address - base
                        best = listing, _field((*path, Hop(offset, tags, span)), address - base, count, text)
        return best

    def _learn(self, listing: Listing, field: Field) -> bool:
        """Fetch a field for all nodes at once, the second time it is met. True when it was fetched."""
        snapshot = listing.snapshot
        assert snapshot is not None
        for head, fields, *_ in listing.place.inner:
            if (field.path, field.offset & -16) == (head.path, head.offset & -16) and fields[0] not in listing.fields:
                return self._learn_rings(listing, snapshot, fields)
        if field.text and field in listing.fields:
            field = field._replace(size=LONG_TEXT)  # it was brought, and is longer than that
        parts = [part for part in field.parts() if part not in listing.fields]
        if not parts:
            return False  # it comes along already: here it could not be read
        key = field.path, field.offset
        if key not in listing.seen:
            listing.seen.add(key)  # once may be a look at one node only
            return False
        if not all(listing.fields.add(part) for part in parts):
            return False
        # A row of words may have become an array; what is fetched is what comes along from now on.
        brought = {next(known for known in listing.fields if known.covers(part)) for part in parts}
        places = tuple((known.path, known.offset) for known in brought)
        ops = tuple((Text if known.text else Take)(0, known.offset, known.size) for known in brought)
        with self._added(listing, snapshot) as added:
            self._gather(added, Stage(field.path, ops, places))
        return True

    def _learn_rings(self, listing: Listing, snapshot: Snapshot, fields: Sequence[Field]) -> bool:
        """The head of a ring that hangs from a node was read: bring the rings of all nodes."""
        root = fields[0].path
        wanted = [Field(root[:-2], root[-2].offset, WORD), *fields]
        if not all(listing.fields.add(field) for field in wanted):
            return False
        with self._added(listing, snapshot) as added:
            self._walk_rings(added, next(stage for stage in listing.fields.stages if stage.root == root))
        return True

    @contextmanager
    def _added(self, listing: Listing, snapshot: Snapshot) -> Iterator[Snapshot]:
        """A snapshot to add to. Know what is added, and that only: another list's of the rest may be younger by now."""
        added = copy(snapshot)
        added.words, added.cells = {}, {}
        try:
            yield added
            self._publish(listing, added.words, added.cells)
        finally:
            snapshot.words.update(added.words)
            snapshot.cells.update(added.cells)

    def _accompany(self, address: int, count: int) -> None:
        """A single read that comes up in one listing after the other comes along with the walk."""
        listing = self._current
        if listing is None or count > COMPANION_MAX or self._now() >= listing.expires:
            return
        read = address, count
        listing.companions[read] = read in listing.companions
        listing.companions.move_to_end(read)
        if len(listing.companions) > COMPANIONS:
            listing.companions.popitem(last=False)

    def _companion(self, address: int, count: int) -> bytes | None:
        """What came along with a listing, for its first reader."""
        read = address, count
        for listing in self.listings.values():
            data = listing.brought.pop(read, None)
            if data is not None:
                if read in listing.companions:
                    listing.companions.move_to_end(read)
                if self._holding or self._now() < listing.brought_at + COMPANION_STALE:
                    return data
                return self._single(address, count)
        return None

    def _learn_chain(self, start: int, bias: int) -> None:
        if start in self._fruitless or start in self._doors:
            return
        reach = ARRAY // 4
        name = f"chain at {start:#x}"
        place = Place(name, start, Step.CHAIN, 0, reach, reach, (Field((), 0, WORD),), bias=bias, max_nodes=1 << 16)
        listing = Listing(place)
        self._install(listing)  # so that its door is kept out of what is known
        try:
            self._walk(listing)
        except BaseException:
            self._remove(listing)
            raise
        self._move_on(listing)
        assert listing.snapshot is not None
        if len(listing.snapshot.nodes[()]) < CHAIN_WORTH:  # a few pointers that happen to lie alike
            self._remove(listing)
            self._fruitless[start] = True
            if len(self._fruitless) > FRUITLESS_MAX:
                self._fruitless.popitem(last=False)
            return
        learned = [listing for listing in self.listings.values() if listing.place.step == Step.CHAIN]
        if len(learned) > CHAINS:
            self._remove(learned[0])

    def _remove(self, listing: Listing) -> None:
        """Have a list no more."""
        del self.listings[listing.place.start]
        for door in listing.place.doors:
            del self._doors[door]
        if not self._holding:  # what is of one hold stays
            self._drop(listing)

    def _read_on(self, address: int, count: int, ahead: int) -> bytes:
        """An array is read through: bring what comes next with what was asked for."""
        try:
            data = self._remote.read(address, ahead)
        except FaultError as fault:
            data = fault.data
        if len(data) < count:
            return self._single(address, count)
        whole = len(data) // WORD
        if count == WORD and address % WORD == 0:
            found = dict(
                zip(range(address, address + whole * WORD, WORD), Struct(f"<{whole}Q").unpack_from(data), strict=True)
            )
            self._keep(found, {})
        else:
            self._keep({}, {address: data})
        self._run.go_on(address + (whole * WORD or len(data)))
        return data[:count]

    # ---- single reads ------------------------------------------------------------------------------------------------

    def _single(self, address: int, count: int) -> bytes:
        """Ask the agent; within a hold, ask once for each page."""
        return (self._pages if self._holding else self._remote).read(address, count)

    # ---- expiry ------------------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Forget memory older than `STALE`, while another thread has the lock and waits for the guest."""
        if self._holding:
            return
        now = self._now()
        due = self._run.due(now)
        for listing in list(self.listings.values()):
            snapshot, expires = listing.snapshot, listing.expires
            if expires > now:
                continue
            if listing.hurried != expires:  # of a large table this is the most, and never comes again by itself
                listing.hurried = expires
                due.append((listing.empty, {}))
            due += [] if snapshot is None else [(snapshot.words, snapshot.cells)]
        for words, cells in due:
            for at in list(words):
                self.words.pop(at, None)
            for at in list(cells):
                self.cells.pop(at, None)

    def expire(self) -> float | None:
        """Forget memory older than `STALE`. Returns seconds until the next is due, None for never."""
        with self.lock:
            if self._holding:
                return None
            now = self._now()
            due: list[float] = []
            for listing in self.listings.values():
                if listing.snapshot is None or listing.forgotten:
                    continue
                if listing.expires > now:
                    due.append(listing.expires - now)
                    continue
                self._outdate(listing)
            for words, cells in self._run.due(now):
                self._known.drop(words, cells)
            self._run.forget(now)
            if self._run.expires is not None:
                due.append(self._run.expires - now)
            return max(0.001, min(due)) if due else None


def _copy(snapshot: Snapshot, addresses: Iterable[int], into: Pieces) -> None:
    """Have what a snapshot has at addresses somewhere else too."""
    words, cells = snapshot.words, snapshot.cells
    some = list(addresses)
    into.update({at: words[at] for at in some if at in words}, {at: cells[at] for at in some if at in cells})


def _field(path: Path, offset: int, count: int, text: bool) -> Field:
    return Field(path, offset, TEXT if text else count, text)


def _portions(heads: list[int]) -> Iterator[list[int]]:
    """As many heads as one plan may list."""
    for start in range(0, len(heads), HEADS_MAX):
        yield heads[start : start + HEADS_MAX]


def _report(name: str, chunk: Chunk) -> bool:
    """Log what a walk met. True when there was anything: what it could not bring is then read one by one."""
    met = [
        text
        for text, happened in (
            (f"there are more than {NODES_MAX} nodes", chunk.truncated),
            (f"{chunk.faulted} chains end in unreadable memory, the first at {chunk.fault_at:#x}", chunk.faulted),
            (f"{chunk.cycles} chains loop without meeting their head, the first at {chunk.cycle_at:#x}", chunk.cycles),
        )
        if happened
    ]
    for text in met:
        log.warning("%s: %s; what lies past that is read one by one", name, text)
    if chunk.torn:
        log.info("%s: %d links changed under the walk", name, chunk.torn)
    return bool(met)


_living: weakref.WeakSet[ReadAhead] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child has no clock thread, and locks as other threads of its parent left them."""
    for reader in list(_living):
        reader.after_fork()


os.register_at_fork(after_in_child=_after_fork)
