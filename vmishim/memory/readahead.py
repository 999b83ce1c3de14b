"""Reads ahead of an IDS: a read of a list's head walks the list in the guest, and the rest is answered from that walk.

Nothing is declared by the IDS. What it reads beside a known node, or behind a pointer of one, is learned the second time
(`_learn`), fetched at once for all nodes, and comes along with every later walk. A chain of dependent reads that nobody
declared is learned as a list of its own (`_follow`).

Freshness (docs/freshness.md): reading a head begins a new snapshot, unless it is the second look of the same listing;
no byte is served that is older than `STALE` seconds; between `hold` and `release` everything is as of one hold.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque

from vmishim.errors import FaultError
from vmishim.memory.listings import Place
from vmishim.memory.reader import KERNEL
from vmishim.memory.remote import KERNEL_FLOOR, Remote
from vmishim.memory.snapshot import Cells, Field, Fields, Path, Snapshot
from vmishim.wire.plan import HEADS_MAX, Op, Plan, Step, Take, Text

log = logging.getLogger(__name__)

STALE = 1.0
"""Seconds after which a snapshot is forgotten outside a hold; LibVMI's KVM driver keeps pages as long (its page cache's
age limit in libvmi/cache.c)."""
LEARN_MAX = 256
"""Bytes of the largest read that is learned as a field; larger ones are asked for one by one."""
REACH = 4096
"""Bytes from a pointer within which a read is taken for one of what it points to."""
CHAINS = 16
"""Lists learned from chains of reads that are kept; the one longest unused makes room."""
CHAIN_LENGTH = 3
"""Links of a chain of dependent reads after which it is taken for a list."""
HELD_MAX = 64 << 20
"""Bytes of single reads a hold remembers; what is past that is refused, since two answers of one hold may not differ."""


class Listing:
    """One list, what is wanted of its nodes, and its last walk."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.fields = Fields(place.fields)
        self.snapshot: Snapshot | None = None
        self.entrance: dict[int, bytes] = {}
        """What the doors hold. Kept out of the cells: reading one means something."""
        self.beyond: dict[int, bytes] = {}
        """The links one step from the head, likewise: reading one says that the listing has moved on."""
        self.looks = 0
        """Times the head was read in this listing."""
        self.expires = 0.0
        self.problems: list[str] = []
        """What the last walk met: chains cut short, cycles, changes underneath."""
        self.walks = 0

    def clear(self) -> None:
        """Forget the last walk, not what was learned."""
        self.snapshot, self.entrance, self.beyond, self.looks = None, {}, {}, 0


class ReadAhead:
    """A reader stacked on the agent. Safe for threads: hits take no lock.

    :param remote: the agent
    :param places: lists that are known from the start
    """

    def __init__(self, remote: Remote, places: list[Place]) -> None:
        self._remote = remote
        self._lock = threading.RLock()
        self._known = Cells()
        self.cells = self._known.exact
        self.listings: OrderedDict[int, Listing] = OrderedDict()
        self._doors: dict[int, Listing] = {}
        self._holding = False
        self._held: dict[tuple[int, int], bytes] = {}
        self._held_bytes = 0
        self._seen: set[tuple[int, Path, int]] = set()
        self._recent: deque[tuple[int, int]] = deque(maxlen=8)
        self._chains: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()
        self._clock = _Clock(self)
        for place in places:
            self._install(Listing(place))
        _living.add(self)

    # ---- the contract ------------------------------------------------------------------------------------------------

    def read(self, address: int, count: int, space: int = KERNEL) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        with self._lock:
            if space != KERNEL:
                return self._single(address, count, space)
            if count <= 0:
                return b""
            listing = self._doors.get(address)
            if listing is not None:
                return self._enter(listing, address, count)
            data = self._find(address, count)
            if data is not None:
                return data
            if address < KERNEL_FLOOR:
                raise FaultError(address)
            return self._miss(address, count)

    def hold(self) -> None:
        """From now on everything is as of one hold."""
        with self._lock:
            self._forget()
            self._holding = True

    def release(self) -> None:
        """End the hold; the next read asks the guest."""
        with self._lock:
            self._holding = False
            self._forget()

    def flush(self) -> None:
        """Forget all memory, not what was learned."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self._held.clear()
        self._held_bytes = 0
        self._recent.clear()
        self._chains.clear()
        for listing in self.listings.values():
            listing.clear()

    # ---- lists -------------------------------------------------------------------------------------------------------

    def _install(self, listing: Listing) -> None:
        self.listings[listing.place.start] = listing
        for door in listing.place.doors:
            self._doors[door] = listing

    def _enter(self, listing: Listing, address: int, count: int) -> bytes:
        """A door was read: a new listing begins, unless this is its second look at the head."""
        if self._holding:
            fresh = listing.snapshot is not None
        else:
            # Scripts read the head twice before they move on (LibVMI's own process-list.py does), rarely more often.
            fresh = bool(listing.beyond) and listing.looks < 2 and time.monotonic() < listing.expires
        if not fresh:
            self._walk(listing)
            listing.looks = 0
        listing.looks += 1
        data = listing.entrance.get(address, b"")
        if len(data) >= count:
            return data[:count]
        return self._single(address, count, KERNEL)

    def _walk(self, listing: Listing) -> None:
        """Take a new snapshot of a list."""
        place, fields = listing.place, listing.fields
        if listing.snapshot is not None:
            self._known.drop(listing.snapshot.cells)
        listing.clear()
        snapshot = Snapshot()
        plan = place.plan(fields.ops)
        faulted = cycles = torn = 0
        for chunk in self._remote.walk(plan):
            snapshot.add(plan, fields.places, chunk.bulk)
            faulted, cycles, torn = chunk.faulted, chunk.cycles, chunk.torn
        listing.problems = [
            text
            for text, met in (
                (f"stopped at {place.max_nodes} nodes, there are more", chunk.truncated),
                (f"{faulted} chains ended in unreadable memory, the first at {chunk.fault_at:#x}", faulted),
                (f"{cycles} chains loop without meeting their head, the first at {chunk.cycle_at:#x}", cycles),
                (f"{torn} links changed under the walk", torn),
            )
            if met
        ]
        for problem in listing.problems:
            log.warning("%s: %s; reads past that point go to the guest one by one", place.name, problem)
        cells = snapshot.cells
        nodes = snapshot.nodes
        if place.step in (Step.RING, Step.RING_NODE):
            pair = b"".join(pointer.to_bytes(8, "little") for pointer in chunk.head)
            listing.entrance = {place.start: pair, place.start + 8: pair[8:]}
            beyond = [chunk.head[0], chunk.head[1] + 8]
        else:
            first = nodes[0] + place.link - place.bias if nodes else 0
            listing.entrance = {place.start: first.to_bytes(8, "little")}
            beyond = [nodes[0] + place.link] if nodes else []
        for address in place.doors:
            cells.pop(address, None)
        listing.beyond = {address: data for address in beyond if (data := _cell(cells, address))}
        for address in listing.beyond:
            cells.pop(address, None)
        self._known.update(cells)
        listing.snapshot = snapshot
        listing.walks += 1
        listing.expires = time.monotonic() + STALE
        if not self._holding:
            self._clock.start()

    def _find(self, address: int, count: int) -> bytes | None:
        """Memory a snapshot or the hold has."""
        for listing in self.listings.values():
            data = listing.beyond.get(address)
            if data is not None and len(data) >= count:
                self._move_on(listing)
                return data[:count]
        data = self._known.read(address, count)
        if data is None and self._holding:
            data = self._held.get((address, KERNEL), b"")
            return data[:count] if len(data) >= count else None
        return data

    def _move_on(self, listing: Listing) -> None:
        for address, data in listing.beyond.items():
            self._known.set(address, data)
            if listing.snapshot is not None:
                listing.snapshot.cells[address] = data
        listing.beyond = {}

    # ---- learning ----------------------------------------------------------------------------------------------------

    def _miss(self, address: int, count: int) -> bytes:
        """Read what no snapshot has, and learn from it."""
        for listing in self.listings.values():
            field = self._explain(listing, address, count)
            if field is None:
                continue
            if not self._holding and time.monotonic() >= listing.expires:
                # A listing that takes longer than STALE goes on, on fresh memory.
                self._walk(listing)
                self._move_on(listing)
                data = self._find(address, count)
                if data is not None:
                    return data
            elif self._learn(listing, field):
                data = self._find(address, count)
                if data is not None:
                    return data
            return self._single(address, count, KERNEL)
        data = self._single(address, count, KERNEL)
        if count == 8:
            self._follow(address, int.from_bytes(data, "little"))
        return data

    def _explain(self, listing: Listing, address: int, count: int) -> Field | None:
        """Which field of which node a read is, as far as the last walk tells."""
        snapshot = listing.snapshot
        if snapshot is None or count > LEARN_MAX:
            return None
        place = listing.place
        node = snapshot.nearest((), address, place.before, place.after)
        if node is not None:
            return Field((), address - node, count)
        best, closest = None, 0
        for path in snapshot.columns:
            if path:
                base = snapshot.nearest(path, address, 0, REACH)
                if base is not None and base > closest:
                    best, closest = Field(path, address - base, count), base
        return best

    def _learn(self, listing: Listing, field: Field) -> bool:
        """Fetch a field for all nodes at once, the second time it is met. True when it was fetched."""
        snapshot = listing.snapshot
        assert snapshot is not None
        if field in listing.fields:
            return False  # it comes along already: here it could not be read
        key = (listing.place.start, field.path, field.offset)
        if key not in self._seen:
            self._seen.add(key)  # once may be a look at one node only
            return False
        if not listing.fields.add(field):
            return False
        heads = sorted({head for head in snapshot.columns[field.path] if head >= KERNEL_FLOOR})
        op: Op = (Text if field.text else Take)(0, field.offset, field.size)
        cells: dict[int, bytes] = {}
        for first in range(0, len(heads), HEADS_MAX):
            some = heads[first : first + HEADS_MAX]
            plan = Plan(0, Step.SELF, (op,), heads=len(some), stride=0)
            part = Snapshot()
            for chunk in self._remote.walk(plan, some):
                part.add(plan, [((), field.offset)], chunk.bulk)
            cells.update(part.cells)
            if field.size == 8:
                column = [int.from_bytes(cell, "little") for cell in part.cells.values()]
                snapshot.columns.setdefault((*field.path, field.offset), []).extend(column)
        for address in (*listing.entrance, *listing.beyond):
            cells.pop(address, None)
        snapshot.cells.update(cells)
        self._known.update(cells)
        return True

    def _follow(self, address: int, value: int) -> None:
        """Watch single pointer reads: ``p = read(p + k)``, again and again, is a list."""
        for before, pointer in self._recent:
            distance = address - pointer
            if -REACH < distance < REACH:
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
        place = Place(
            f"chain at {start:#x}", start, Step.CHAIN, 0, REACH // 4, REACH // 4, (Field((), 0, 8),), bias, 1 << 16
        )
        learned = [at for at, listing in self.listings.items() if listing.place.step == Step.CHAIN]
        if len(learned) >= CHAINS:
            gone = self.listings.pop(learned[0])
            for door in gone.place.doors:
                del self._doors[door]
            if gone.snapshot is not None:
                self._known.drop(gone.snapshot.cells)
        listing = Listing(place)
        self._install(listing)
        self._walk(listing)
        self._move_on(listing)

    # ---- single reads ------------------------------------------------------------------------------------------------

    def _single(self, address: int, count: int, space: int) -> bytes:
        """Ask the agent; within a hold, ask once."""
        if not self._holding:
            return self._remote.read(address, count, space)
        data = self._held.get((address, space), b"")
        if len(data) < count:
            if self._held_bytes + count > HELD_MAX:
                raise FaultError(address)
            data = data + self._remote.read(address + len(data), count - len(data), space)
            self._held[address, space] = data
            self._held_bytes += count
        return data[:count]

    # ---- expiry ------------------------------------------------------------------------------------------------------

    def expire(self) -> float | None:
        """Forget the cells of snapshots older than `STALE`. Returns seconds until the next is due, None for never."""
        with self._lock:
            if self._holding:
                return None
            now = time.monotonic()
            live = [listing for listing in self.listings.values() if listing.snapshot and listing.snapshot.cells]
            for listing in live:
                if listing.expires <= now and listing.snapshot is not None:
                    self._known.drop(listing.snapshot.cells)
                    listing.snapshot.cells.clear()
                    listing.beyond = {}
            due = [listing.expires - now for listing in live if listing.expires > now]
            return max(0.001, min(due)) if due else None


def _cell(cells: dict[int, bytes], address: int) -> bytes | None:
    """Eight bytes at ``address``: a link's ``next`` starts a cell, its ``prev`` lies in the middle of one."""
    if address in cells:
        return cells[address]
    around = cells.get(address - 8, b"")
    return around[8:16] if len(around) >= 16 else None


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
