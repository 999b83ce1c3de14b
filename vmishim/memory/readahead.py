"""Reads ahead of an IDS: a read of a list's head walks the list in the guest, and the rest is answered from that walk.

Nothing is declared by the IDS. What it reads beside a known node, or behind a pointer of one, is learned the second
time (`_learn`), fetched at once for all nodes, and comes along with every later walk. A chain of dependent reads that
nobody declared is learned as a list of its own (`_follow`).

Freshness (docs/freshness.md): reading a head begins a new snapshot, unless it is the second look of the same listing;
no byte is served that is older than `STALE` seconds; between `hold` and `release` everything is as of one hold.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from struct import Struct

from vmishim.errors import FaultError
from vmishim.memory.listings import NODES_MAX, Place
from vmishim.memory.pages import Pages
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR
from vmishim.memory.remote import Remote
from vmishim.memory.snapshot import (
    RING,
    TAGS,
    WORD,
    Column,
    Field,
    Fields,
    Hop,
    Known,
    Path,
    Snapshot,
    Stage,
)
from vmishim.wire.messages import Chunk
from vmishim.wire.plan import HEADS_MAX, Kind, Plan, Step, Take, Text

log = logging.getLogger(__name__)

STALE = 1.0
"""Seconds after which a snapshot is forgotten outside a hold; LibVMI's KVM driver keeps pages as long (its page cache's
age limit in libvmi/cache.c)."""
LEARN_MAX = 256
"""Bytes of the largest read that is learned as a field; larger ones are asked for one by one."""
TEXT = 64
"""Bytes that are brought of a string at first; `LEARN_MAX` of one that turned out longer."""
ARRAY, UNTYPED = 4096, 256
"""Bytes above a pointer within which a read is taken for one of what it points to: for a pointer to pointers, and for
one to void or characters. What any other points to is as large as its type says."""
DEPTH = 8
"""Pointers from a node that are followed."""
CHAINS = 16
"""Lists learned from chains of reads that are kept; the one learned first makes room."""
CHAIN_LENGTH = 3
"""Links of a chain of dependent reads after which it is taken for a list."""
CHAIN_WORTH = 8
"""Nodes from which on such a list is worth a walk of its own."""
COMPANIONS = 32
"""Single reads of a listing that are remembered, to be brought along once they come again."""
RUN = 4
"""Reads one behind the other after which they are taken for an array that is read through."""
RUN_BYTES, RUN_BYTES_MAX = 4096, 1 << 18
"""Bytes brought of such an array at first and at most; each time twice as many, as the kernel's own read-ahead does."""


class Listing:
    """One list, what is wanted of its nodes, and its last walk."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fields = Fields(place.fields)
        self.snapshot: Snapshot | None = None
        self.entrance: dict[int, int] = {}
        """Pointers that the doors hold. Kept out of what is known: reading one means something."""
        self.beyond: dict[int, int] = {}
        """Links one step from the head, likewise: reading one says that the listing has moved on."""
        self.looks: Counter[int] = Counter()
        """Times each door was read in this listing."""
        self.empty: dict[int, int] = {}
        """For a table, what its heads hold when they are empty."""
        self.companions: OrderedDict[tuple[int, int], bool] = OrderedDict()
        """Single reads, address and count, that go with this listing; true for those met more than once, which come
        along."""
        self.expires = 0.0
        self.walks = 0

    def clear(self) -> None:
        """Forget the last walk, not what was learned."""
        self.snapshot, self.entrance, self.beyond = None, {}, {}
        self.looks.clear()


class ReadAhead:
    """A reader stacked on the agent. Safe for threads: hits take no lock.

    :param remote: the agent
    :param places: lists that are known from the start

    :ivar words: kernel memory known right now, eight bytes by exact address
    :ivar cells: the same for everything else
    """

    def __init__(self, remote: Remote, places: Sequence[Place]) -> None:
        self._remote = remote
        self._pages = Pages(remote)
        self._lock = threading.RLock()
        self._known = Known()
        self.words, self.cells = self._known.words, self._known.cells
        self.listings: OrderedDict[int, Listing] = OrderedDict()
        self._doors: dict[int, Listing] = {}
        self._holding = False
        self._seen: set[tuple[int, Path, int]] = set()
        self._recent: deque[tuple[int, int]] = deque(maxlen=8)
        self._chains: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()
        self._fruitless: set[int] = set()
        self._current: Listing | None = None
        """The listing that was begun last."""
        self._run = _Run()
        self._types = _Types(remote)
        self._clock = _Clock(self)
        for place in places:
            self._install(Listing(place))
        _living.add(self)

    # ---- the contract ------------------------------------------------------------------------------------------------

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`. With ``text``, fewer bytes may come, the last of them NUL."""
        with self._lock:
            if space != KERNEL:
                return self._pages.read(address, count, space)
            if count <= 0:
                return b""
            listing = self._doors.get(address)
            if listing is not None:
                return self._enter(listing, address, count)
            data = self._find(address, count, text)
            if data is not None:
                return data
            if address < KERNEL_FLOOR:
                raise FaultError(address)
            return self._miss(address, count, text)

    def hold(self) -> None:
        """From now on everything is as of one hold."""
        with self._lock:
            self._forget()
            self._pages.hold()
            self._holding = True

    def release(self) -> None:
        """End the hold; the next read asks the guest."""
        with self._lock:
            self._holding = False
            self._pages.release()
            self._forget()

    def flush(self) -> None:
        """Forget all memory, not what was learned."""
        with self._lock:
            self._pages.flush()
            self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self._recent.clear()
        self._chains.clear()
        self._run = _Run()
        for listing in self.listings.values():
            listing.clear()

    # ---- lists -------------------------------------------------------------------------------------------------------

    def _install(self, listing: Listing) -> None:
        self.listings[listing.place.start or listing.place.doors[0]] = listing
        for door in listing.place.doors:
            self._doors[door] = listing

    def _enter(self, listing: Listing, address: int, count: int) -> bytes:
        """A door was read: a new listing begins, unless this is its second look at the head."""
        if self._holding:
            fresh = listing.snapshot is not None
        else:
            # Scripts read the head twice before they move on (LibVMI's own process-list.py does), rarely more often.
            fresh = bool(listing.beyond) and listing.looks[address] < 2 and time.monotonic() < listing.expires
        if not fresh:
            self._walk(listing)
        self._current = listing
        listing.looks[address] += 1
        data = b""
        while len(data) < count and (word := listing.entrance.get(address + len(data))) is not None:
            data += word.to_bytes(WORD, "little")
        if len(data) >= count:
            return data[:count]
        return self._single(address, count)

    def _walk(self, listing: Listing) -> None:
        """Take a new snapshot of a list."""
        if listing.place.table is not None and not listing.place.start:
            self._settle(listing)
        place = listing.place
        if listing.snapshot is not None:  # what a table holds when it is empty is written over
            self._known.drop(listing.snapshot.words, listing.snapshot.cells)
        listing.clear()
        snapshot = listing.snapshot = Snapshot()
        own, *others = listing.fields.stages
        self._walk_list(listing, snapshot, own)
        for stage in others:
            (self._walk_rings if stage.root[-1].span == RING else self._gather)(snapshot, stage)
        self.words.update(listing.empty)
        self._publish(listing)
        listing.walks += 1
        listing.expires = time.monotonic() + STALE
        if not self._holding:
            self._clock.start()
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
        place = listing.place
        plan = place.plan(stage.ops)
        before = -1
        found: dict[int, bytes] = {}
        reads = [read for read, again in listing.companions.items() if again and read[0] not in self._doors]
        for chunk in self._remote.walk(plan, reads=reads, found=found):
            for value, head, kind in snapshot.add(plan, stage, chunk.bulk):
                if place.table is not None and head != before:
                    address = place.start + head * place.stride
                    if kind == Kind.FAULT:
                        self.words.pop(address, None)
                        listing.empty.pop(address, None)
                    else:
                        snapshot.words[address] = value if kind == Kind.HEAD else value + place.link - place.bias
                before = head
        _report(place.name, chunk)
        for address, data in found.items():
            if len(data) == WORD:
                snapshot.words[address] = int.from_bytes(data, "little")
            else:
                snapshot.cells[address] = data
        nodes, words = snapshot.nodes[()], snapshot.words
        beyond: list[int] = []
        if place.step in (Step.RING, Step.RING_NODE):
            listing.entrance = {place.start: chunk.head[0], place.start + WORD: chunk.head[1]}
            beyond = [chunk.head[0], chunk.head[1] + WORD]
        elif place.table is not None:
            empty = listing.empty | {place.table[0]: place.start - place.table[2]}
            listing.entrance = {door: words.get(door, empty[door]) for door in place.doors if door in empty}
            second = place.start + place.stride
            if second in empty:
                words.setdefault(second, empty[second])
                beyond = [second]
        elif nodes:
            listing.entrance = {place.start: nodes[0] + place.link - place.bias}
            beyond = [nodes[0] + place.link]
        listing.beyond = {
            address: words[address] for address in beyond if address in words and address not in listing.entrance
        }

    def _gather(self, snapshot: Snapshot, stage: Stage) -> None:
        """Collect fields wherever a path leads."""
        heads = sorted({head for head in snapshot.addresses(stage.root) if head >= KERNEL_FLOOR})
        for some in _portions(heads):
            plan = Plan(0, Step.SELF, stage.ops, heads=len(some), stride=0)
            for chunk in self._remote.walk(plan, some):
                snapshot.add(plan, stage, chunk.bulk)

    def _walk_rings(self, snapshot: Snapshot, stage: Stage) -> None:
        """Walk the rings that hang from the nodes."""
        path, hop = stage.root[:-1], stage.root[-1]
        snapshot.nodes[stage.root] = []
        heads = sorted({base + hop.offset for base in snapshot.addresses(path) if base >= KERNEL_FLOOR})
        for some in _portions(heads):
            plan = Plan(0, Step.RING, stage.ops, heads=len(some), stride=0, link=hop.link, max_nodes=NODES_MAX)
            ends: dict[int, list[int]] = {}
            for chunk in self._remote.walk(plan, some):
                for node, number, kind in snapshot.add(plan, stage, chunk.bulk):
                    if kind == Kind.NODE:
                        ends.setdefault(number, [node + hop.link, 0])[1] = node + hop.link
            if _report("rings", chunk):
                continue  # whose ends are not known for sure
            for number, head in enumerate(some):
                snapshot.words[head], snapshot.words[head + WORD] = ends.get(number, (head, head))

    def _publish(self, listing: Listing) -> None:
        """Know what a snapshot has, but for what means something when it is read."""
        snapshot = listing.snapshot
        assert snapshot is not None
        for address in (*listing.entrance, *listing.beyond):
            snapshot.words.pop(address, None)
        self._known.update(snapshot.words, snapshot.cells)
        for address in (*listing.entrance, *listing.beyond):
            self.words.pop(address, None)  # of a table, where it is empty

    def _drop(self, listing: Listing) -> None:
        """Know a listing's memory no more."""
        if listing.snapshot is not None:
            self._known.drop(listing.snapshot.words, listing.snapshot.cells)
            self._known.drop(listing.empty, ())

    def _find(self, address: int, count: int, text: bool) -> bytes | None:
        """Memory a snapshot or the hold has."""
        for listing in self.listings.values():
            if address in listing.beyond:
                self._move_on(listing)
        if text:
            cell = self.cells.get(address)
            if cell is not None and 0 in cell:
                return cell
        return self._known.read(address, count)

    def _move_on(self, listing: Listing) -> None:
        self.words.update(listing.beyond)
        if listing.snapshot is not None:
            listing.snapshot.words.update(listing.beyond)
        listing.beyond = {}

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
            if not self._holding and time.monotonic() >= listing.expires:
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
        ahead = self._run.bytes_ahead(address, count)
        if ahead:
            return self._read_on(address, count, ahead)
        data = self._single(address, count)
        self._accompany(address, count)
        if count == WORD:
            self._follow(address, int.from_bytes(data, "little"))
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
            self._types.ask(listing)
            for column in listing.snapshot.candidates:
                path, offset, span = column
                if span != WORD and Field(path, offset, span) not in listing.fields.whole:
                    continue  # an array that has since become part of a larger one
                reach = self._types.reach(listing, column) if len(path) < DEPTH else 0
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
        if field in listing.fields:
            return False  # it comes along already: here it could not be read
        key = (id(listing), field.path, field.offset)
        if key not in self._seen:
            self._seen.add(key)  # once may be a look at one node only
            return False
        if not listing.fields.add(field):
            return False
        # A row of words may have become an array; what is fetched is what comes along from now on.
        path, offset, size, text = next((known for known in listing.fields if known.covers(field)), field)
        op = (Text if text else Take)(0, offset, size)
        self._gather(snapshot, Stage(path, (op,), ((path, offset),)))
        self._publish(listing)
        return True

    def _learn_rings(self, listing: Listing, snapshot: Snapshot, fields: Sequence[Field]) -> bool:
        """The head of a ring that hangs from a node was read: bring the rings of all nodes."""
        root = fields[0].path
        wanted = [Field(root[:-2], root[-2].offset, WORD), *fields]
        if not all(listing.fields.add(field) for field in wanted):
            return False
        self._walk_rings(snapshot, next(stage for stage in listing.fields.stages if stage.root == root))
        self._publish(listing)
        return True

    def _accompany(self, address: int, count: int) -> None:
        """A single read that comes up in one listing after the other comes along with the walk."""
        listing = self._current
        if listing is None or count > LEARN_MAX or time.monotonic() >= listing.expires:
            return
        read = address, count
        listing.companions[read] = read in listing.companions
        listing.companions.move_to_end(read)
        if len(listing.companions) > COMPANIONS:
            listing.companions.popitem(last=False)

    def _follow(self, address: int, value: int) -> None:
        """Watch single pointer reads: ``p = read(p + k)``, again and again, is a list."""
        for before, pointer in self._recent:
            distance = address - pointer
            if -ARRAY < distance < ARRAY:
                length, start = self._chains.pop((before, distance), (0, before))
                if length + 1 >= CHAIN_LENGTH:
                    self._chains.clear()
                    self._recent.clear()
                    self._learn_chain(start, distance)
                    return
                self._chains[address, distance] = length + 1, start
                if len(self._chains) > 64:
                    self._chains.popitem(last=False)
        if value >= KERNEL_FLOOR:
            self._recent.append((address, value))

    def _learn_chain(self, start: int, bias: int) -> None:
        if start in self._fruitless:
            return
        reach = ARRAY // 4
        name = f"chain at {start:#x}"
        place = Place(name, start, Step.CHAIN, 0, reach, reach, (Field((), 0, WORD),), bias=bias, max_nodes=1 << 16)
        learned = [at for at, listing in self.listings.items() if listing.place.step == Step.CHAIN]
        if len(learned) >= CHAINS:
            gone = self.listings.pop(learned[0])
            for door in gone.place.doors:
                self._doors.pop(door, None)
            self._drop(gone)
        listing = Listing(place)
        self._walk(listing)
        self._move_on(listing)
        if listing.snapshot is not None and len(listing.snapshot.nodes[()]) >= CHAIN_WORTH:
            self._install(listing)
        else:  # a few pointers that happen to lie alike; what was brought is forgotten with the rest
            self._run.brought(listing.snapshot.words if listing.snapshot else {}, {})
            self._fruitless.add(start)

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
            for door in [*self._doors, *(at for listing in self.listings.values() for at in listing.beyond)]:
                found.pop(door, None)
            self._run.brought(found, {})
        else:
            self._run.brought({}, {address: data})
        self._known.update(self._run.words, self._run.cells)
        if not self._holding:
            self._clock.start()
        return data[:count]

    # ---- single reads ------------------------------------------------------------------------------------------------

    def _single(self, address: int, count: int) -> bytes:
        """Ask the agent; within a hold, ask once for each page, so that no two answers differ."""
        return (self._pages if self._holding else self._remote).read(address, count)

    # ---- expiry ------------------------------------------------------------------------------------------------------

    def expire(self) -> float | None:
        """Forget memory older than `STALE`. Returns seconds until the next is due, None for never."""
        with self._lock:
            if self._holding:
                return None
            now = time.monotonic()
            due: list[float] = []
            for listing in self.listings.values():
                if listing.snapshot is None or not (listing.snapshot.words or listing.snapshot.cells):
                    continue
                if listing.expires > now:
                    due.append(listing.expires - now)
                    continue
                self._drop(listing)
                # Where the nodes were stays: a listing that goes on is known again by it.
                listing.snapshot.words, listing.snapshot.cells, listing.beyond = {}, {}, {}
            if self._run.words or self._run.cells:
                if self._run.expires > now:
                    due.append(self._run.expires - now)
                else:
                    self._known.drop(self._run.words, self._run.cells)
                    self._run = _Run()
            return max(0.001, min(due)) if due else None


class _Types:
    """What words point to, by the guest's BTF: a read is taken for one of a structure only where such a structure
    is."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._pointees: dict[str, list[int] | None] = {}

    def ask(self, listing: Listing) -> None:
        """Learn in one request about all of a listing's columns that are not known yet."""
        snapshot = listing.snapshot
        if snapshot is None or not listing.place.struct:
            return
        while True:  # a column is typed once what leads to it is
            asked = [self._question(listing.place, path, offset) for path, offset, _ in snapshot.candidates]
            unknown = sorted({question for question in asked if question and question not in self._pointees})
            if not unknown:
                return
            self._pointees.update(zip(unknown, self._remote.pointees(unknown), strict=True))

    def reach(self, listing: Listing, column: Column) -> int:
        """Bytes above where a column points to that belong to what is there; 0 when its words are no pointers."""
        path, offset, _ = column
        question = self._question(listing.place, path, offset)
        if not question:
            return UNTYPED
        pointee = self._pointees.get(question)
        if pointee is None:
            return 0
        size = pointee[1]
        return size if size > WORD else ARRAY if size == WORD else UNTYPED

    def _question(self, place: Place, path: Path, offset: int) -> str:
        """How to ask for the word at ``offset`` of what ``path`` leads to; empty when its type is not known, as
        behind a ``void *``."""
        of_type = place.struct
        if not of_type:
            return ""
        for at, hop in enumerate(path):
            ring = next((struct for _, fields, struct, _ in place.inner if fields[0].path == path[: at + 1]), None)
            if ring is not None:
                of_type = ring
                continue
            pointee = self._pointees.get(f"{of_type} {hop.offset}")
            if pointee is None or pointee[1] <= 1:
                return ""
            of_type = f"#{pointee[0]}"
        return f"{of_type} {offset}"


class _Run:
    """Reads one behind the other, and what was brought ahead of them."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.expires = 0.0
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

    def brought(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Remember what was brought, to be forgotten in time; the array goes on behind it."""
        self.words |= words
        self.cells |= cells
        self.expires = time.monotonic() + STALE
        self._next = max([self._next, *(at + WORD for at in words), *(at + len(cell) for at, cell in cells.items())])


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


class _Clock:
    """Forgets snapshots when they are due, so that the hit path need not look at the time. Its thread runs only while
    there is something to forget. Everything here happens under the owner's lock."""

    def __init__(self, owner: ReadAhead) -> None:
        self._owner = weakref.ref(owner)
        self._running = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            threading.Thread(target=self._run, name="vmishim-clock", daemon=True).start()

    def _run(self) -> None:
        wait: float | None = STALE
        never = threading.Event()
        while wait is not None:
            never.wait(wait)
            owner = self._owner()
            if owner is None:
                return
            with owner._lock:
                wait = owner.expire()
                self._running = wait is not None
            del owner


_living: weakref.WeakSet[ReadAhead] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child has no clock thread, and locks as other threads of its parent left them."""
    for reader in list(_living):
        reader._lock = threading.RLock()
        reader._clock = _Clock(reader)
        reader.flush()


os.register_at_fork(after_in_child=_after_fork)
