"""What a script reads behind pointers, where no field of a list explains it: in the next pass it is brought at once.

The path up to the root of a file system, a tree, or a ring that hangs from a node may be longer than any field reaches.
A pass over such memory begins at a list, or at an address that nothing led to, such as a symbol's. What is read from
there on, pointer by pointer, is its trail. The next pass most likely takes the same one, so its first read on the trail
brings all of it, in one request. What has changed by then is not on the trail, and is read alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from struct import Struct

from vmishim.memory.lifetimes import STALE
from vmishim.readahead.fields import BLOCK, WORD
from vmishim.readahead.snapshot import Snapshot, is_kernel
from vmishim.readahead.store import Batch

LINE = 64
"""Bytes that are brought together: a cache line. None crosses a page."""
ABOVE, BELOW = 4096, 1024
"""Bytes from where a pointer points within which a read is taken for one behind it. Below it too, since many pointers
lead to a member, such as a ``list_head``."""
IMAGE, IMAGE_ABOVE = 0xFFFF_FFFF_8000_0000, 256
"""From here on are the kernel's image and its modules (Documentation/arch/x86/x86_64/mm.rst), where scripts read
variables by their symbols: a read counts as one behind a pointer only so many bytes above it."""
READS_MAX = 1 << 16
"""Reads of one trail."""
READ_MAX = 1024
"""Bytes of the largest of them, but for arrays."""
TRAILS = 32
"""Trails that begin at no list; the one not used for the longest time makes room."""
STARTS_MAX = 1024
"""Words that are kept of where a trail, and those that it took in, begin."""
SWEEP_WORTH = 512
"""Reads from which on a trail is looked through for what no pointer leads to any more."""
_UNIT, _IMAGE_UNIT = 10, 8
_UNITS, _IMAGE_UNITS = range(-(BELOW >> _UNIT), (ABOVE >> _UNIT) + 1), range((IMAGE_ABOVE >> _IMAGE_UNIT) + 1)
"""Distance in units from a pointer to what is near it."""
_WORDS = Struct(f"<{LINE // WORD}Q")


class Trail:
    """What is read from one beginning on.

    :ivar batch: what was brought of it in this pass, in the store
    """

    def __init__(self) -> None:
        self.batch = Batch()
        self._start: tuple[int, ...] = ()
        self._words: dict[int, None] = {}
        self._cells: dict[int, int] = {}
        self._new: dict[int, int] = {}
        """Met in this pass; 0 bytes for a word."""
        self._near: set[int] = set()
        """Where the pointers on the trail point to, see `unit_of`."""
        self._worth_sweeping = SWEEP_WORTH
        self._until = 0.0

    def __len__(self) -> int:
        return len(self._words) + len(self._cells) + len(self._new)

    def begin(self, now: float) -> None:
        """A pass begins: what was met in the one before is brought from now on."""
        for address, count in self._new.items():
            if count:
                self._cells[address] = max(count, self._cells.get(address, 0))
            else:
                self._words[address] = None
        self._new.clear()
        self._until = now + STALE

    def start(self, data: bytes) -> None:
        """Take in what is where it begins."""
        self._start = words(data)
        self._point(self._start)

    def meet(self, address: int, data: bytes, text: bool) -> None:
        """A read behind a pointer was answered by the guest."""
        if len(data) > READ_MAX or len(self) >= READS_MAX:
            return
        if text and 0 in data:
            self._new[address] = data.index(0) + 1
        else:
            self._new[address] = 0 if len(data) == WORD and address % WORD == 0 and not text else len(data)
            self._point(words(data))

    def meet_all(self, known: Mapping[int, int], cells: Mapping[int, bytes]) -> None:
        """The same of many."""
        if len(self) + len(known) + len(cells) > READS_MAX:
            return
        self._new.update(dict.fromkeys(known, 0))
        self._point(known.values())
        for at, cell in cells.items():
            if len(cell) >= BLOCK and len(cell) % WORD == 0 and at % WORD == 0:  # an array
                self._new.update(dict.fromkeys(range(at, at + len(cell), WORD), 0))
                self._point(words(cell))
            else:
                self._new[at] = len(cell)

    def absorb(self, other: Trail) -> None:
        """Take in a trail that turned out to be part of this one."""
        other.begin(0.0)
        if len(self) + len(other) <= READS_MAX:
            self._words.update(other._words)
            self._cells.update(other._cells)
            self._near |= other._near
            self._start = tuple(dict.fromkeys((*other._start, *self._start)))[:STARTS_MAX]

    def has(self, address: int, count: int, now: float) -> bool:
        """Whether an earlier pass read this, and the one under way began less than a second ago."""
        on_it = address in self._words if count == WORD else address in self._cells
        return on_it and self.is_under_way(now)

    def is_under_way(self, now: float) -> bool:
        """Whether the last pass began less than a second ago."""
        return now < self._until

    def leads_to(self, address: int) -> bool:
        """Whether a pointer on the trail points near ``address``."""
        unit = unit_of(address)
        return any(unit - distance in self._near for distance in _units(unit))

    def missing(self, known: Mapping[int, int], cells: Mapping[int, bytes]) -> tuple[list[int], dict[int, int]]:
        """What is not known of the trail: addresses of words, and of everything else with its bytes."""
        wanted = {at: count for at, count in self._cells.items() if len(cells.get(at, b"")) < count}
        return [at for at in self._words if at not in known], wanted

    def lose(self, known: Iterable[int], cells: Iterable[int]) -> None:
        """Take off what cannot be read any more."""
        for at in known:
            self._words.pop(at, None)
        for at in cells:
            self._cells.pop(at, None)

    def sweep(self, snapshot: Snapshot, known: Mapping[int, int]) -> None:
        """Once the trail has grown, take off what no pointer leads to any more: neither one of ``snapshot`` nor one on
        the trail."""
        if len(self) < self._worth_sweeping:
            return
        left: dict[int, list[int]] = {}
        for at in self._words:
            left.setdefault(unit_of(at), []).append(at)
        self._near = {unit_of(at) for nodes in snapshot.nodes.values() for at in nodes}
        for column in snapshot.candidates:
            self._point(snapshot.words_of(column))
        self._point(self._start)
        todo, kept = list(self._near), set[int]()
        while todo:  # each unit once: the guest decides what leads where
            unit = todo.pop()
            for near in _units_of(unit):
                led = left.pop(near, [])
                kept.update(led)
                new = {unit_of(value) for at in led if is_kernel(value := known.get(at, 0))} - self._near
                self._near |= new
                todo += new
        self._words = {at: None for at in self._words if at in kept}
        self._cells = {at: count for at, count in self._cells.items() if self.leads_to(at)}
        self._worth_sweeping = 2 * len(self) + SWEEP_WORTH

    def _point(self, values: Iterable[int]) -> None:
        self._near.update(unit_of(value) for value in values if is_kernel(value))


class Trails:
    """The trails that begin at no list, by the address that they begin at. Iterates with the one used last first."""

    def __init__(self) -> None:
        self._trails: OrderedDict[int, Trail] = OrderedDict()

    def __iter__(self) -> Iterator[Trail]:
        return reversed(self._trails.values())

    def at(self, address: int) -> Trail | None:
        """The one that begins at ``address``."""
        return self._trails.get(address)

    def add(self, address: int, data: bytes, now: float) -> None:
        """Begin one where nothing led to, and ``data`` was read, if that may lead on."""
        if len(data) > READ_MAX or not any(map(is_kernel, words(data))):
            return
        trail = self._trails[address] = Trail()
        trail.begin(now)
        trail.start(data)
        if len(self._trails) > TRAILS:
            self._trails.popitem(last=False)

    def use(self, address: int) -> None:
        """The one that begins at ``address`` was used."""
        self._trails.move_to_end(address)

    def end(self, address: int) -> Trail | None:
        """Something else begins at ``address``, or leads there. Returns the trail that began there."""
        return self._trails.pop(address, None)


def unit_of(pointer: int) -> int:
    """Which 1 KiB of memory a pointer points to; in the image, which 256 bytes. No two units have the same number."""
    return pointer >> (_IMAGE_UNIT if pointer >= IMAGE else _UNIT)


def _units(unit: int) -> range:
    """How far from a unit, or up to it, another is near it."""
    return _IMAGE_UNITS if unit >= IMAGE >> _IMAGE_UNIT else _UNITS


def _units_of(unit: int) -> Iterator[int]:
    """The units that are near a pointer into ``unit``."""
    return (unit + distance for distance in _units(unit))


def words(data: bytes) -> tuple[int, ...]:
    """The whole words of what was read."""
    return Struct(f"<{len(data) // WORD}Q").unpack_from(data)


def lines_of(known: Iterable[int], cells: Mapping[int, int]) -> list[int]:
    """Addresses of the lines that hold these words and cells, sorted."""
    lines = {at & -LINE for at in known}
    for at, count in cells.items():
        lines.update(range(at & -LINE, at + count, LINE))
    return sorted(lines)


def cut(
    lines: Mapping[int, bytes], wanted: Iterable[int], cells: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, bytes]]:
    """The words and cells, as far as ``lines`` has them."""
    unpacked = {at: _WORDS.unpack(data) for at, data in lines.items()}
    found = {at: unpacked[at & -LINE][at % LINE // WORD] for at in wanted if at & -LINE in unpacked}
    whole: dict[int, bytes] = {}
    for at, count in cells.items():
        parts = [lines.get(line, b"") for line in range(at & -LINE, at + count, LINE)]
        if all(parts):
            whole[at] = b"".join(parts)[at % LINE :][:count]
    return found, whole
