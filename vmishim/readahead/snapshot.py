"""What a walk brought, findable by address; and the fields that walks bring."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from struct import Struct
from typing import NamedTuple

from vmishim.memory.reader import KERNEL_FLOOR, PAGE_SIZE
from vmishim.wire.plan import TAKE_MAX, Kind, Load, Op, Plan, PlanError, Step, Take, Text

WORD = 8
"""Bytes of a pointer. A field of this size is kept as an int, every other as bytes."""
BLOCK = 256
"""Bytes that are brought of an array once some of its words in a row were read."""
ROW = 4
"""Words in a row after which they are taken for an array."""
TAGS = (0, 7, 255)
"""Bits that kernel structures keep in pointers: none; the lowest (rbtree, xarray); a maple tree's node type."""
_TAGS_BY_LOW_BITS = (0, 7, 7, 7, 255, 7, 255, 7)
"""A maple tree's pointers have MAPLE_ENODE_NULL (4) set, its root also MAPLE_ROOT_NODE (2) (lib/maple_tree.c)."""


RING = 0
"""`Hop.span` of a ring."""


class Hop(NamedTuple):
    """Follow a pointer, or every pointer of an array, or a ring to its nodes."""

    offset: int
    tags: int = 0
    """Bits of the value that are no part of the pointer."""
    span: int = WORD
    """8 for a pointer; more for an array of so many bytes; `RING` for a ``list_head`` whose nodes are meant."""
    link: int = 0
    """For a ring, where its nodes have their link."""


Path = tuple[Hop, ...]
"""How to get from a node to other memory. ``()`` is the node itself."""
Column = tuple[Path, int, int]
"""Words that were brought: where from, offset, bytes (more than 8: an array, every word of it)."""


class Field(NamedTuple):
    """Memory an IDS reads of every node: ``size`` bytes at ``offset`` from where ``path`` leads."""

    path: Path
    offset: int
    size: int
    text: bool = False
    """Only up to the first NUL."""

    def covers(self, other: Field) -> bool:
        """Whether having this is having ``other``."""
        if self.path != other.path or (self.text and not (other.text and self.offset == other.offset)):
            return False
        return self.offset <= other.offset and self.offset + self.size >= other.offset + other.size

    def parts(self) -> list[Field]:
        """The same in pieces that one operation can copy."""
        starts = range(self.offset, self.offset + self.size, TAKE_MAX)
        return [self._replace(offset=at, size=min(TAKE_MAX, self.offset + self.size - at)) for at in starts]


class Stage(NamedTuple):
    """Fields that one run of a plan collects: those reached from ``root`` by single pointers."""

    root: Path
    """Where its nodes are: ``()`` for the list's own, else what an array or a ring of an earlier stage leads to."""
    ops: tuple[Op, ...]
    places: tuple[tuple[Path, int], ...]
    """What each operation collects: the path from the list's node, and the offset."""


class Fields:
    """The fields a walk brings along, and how they are collected. Grows; never past what a plan can hold."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self._fields: list[Field] = []
        self._whole: frozenset[Field] = frozenset()
        self.stages: tuple[Stage, ...] = (Stage((), (), ()),)
        for field in fields:
            self.add(field)

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields)

    @property
    def whole(self) -> frozenset[Field]:
        """The fields as they are brought, without what they cover."""
        return self._whole

    def __contains__(self, field: Field) -> bool:
        return any(field == known or known.covers(field) for known in self._fields)

    def add(self, field: Field) -> bool:
        """Bring ``field`` along from now on. False when there is no room for it."""
        if field in self:
            return True
        fields = self._grown([known for known in self._fields if not field.covers(known)], field)
        stages = []
        for root in sorted({_root(known.path) for known in fields}, key=len):
            stage = _compile(root, [known for known in fields if _root(known.path) == root])
            if stage is None:
                return False
            stages.append(stage)
        if not stages or stages[0].root:
            stages.insert(0, Stage((), (), ()))
        self._fields, self._whole, self.stages = fields, frozenset(fields), tuple(stages)
        return True

    @staticmethod
    def _grown(fields: list[Field], new: Field) -> list[Field]:
        """``fields`` and ``new``; a row of words becomes a block, and a block that was read to its end a larger one."""
        path, offset, size, text = new
        if size != WORD or text:
            return [*fields, new]
        for known in fields:
            if known.path == path and known.size >= BLOCK and known.offset + known.size == offset:
                if known.size * 2 > TAKE_MAX:
                    break
                return _replace(fields, known, known._replace(size=known.size * 2))
        row = [Field(path, offset - back * WORD, WORD) for back in range(1, ROW)]
        if all(field in fields for field in row):
            block = Field(path, row[-1].offset, BLOCK)
            return [*(field for field in fields if not block.covers(field)), block]
        return [*fields, new]


def _replace(fields: list[Field], old: Field, new: Field) -> list[Field]:
    """A block grew: paths that go through it go through the larger one."""

    def moved(path: Path) -> Path:
        through = (old.offset, old.size)
        return tuple(
            hop._replace(span=new.size) if path[:at] == old.path and (hop.offset, hop.span) == through else hop
            for at, hop in enumerate(path)
        )

    return [field._replace(path=moved(field.path)) for field in fields if not new.covers(field)] + [new]


def _root(path: Path) -> Path:
    for end in range(len(path), 0, -1):
        if path[end - 1].span != WORD:
            return path[:end]
    return ()


def _compile(root: Path, fields: Sequence[Field]) -> Stage | None:
    """The operations that collect ``fields`` from ``root``; None when that is more than a plan can hold."""
    depth = len(root)
    paths = sorted({field.path[:end] for field in fields for end in range(depth + 1, len(field.path) + 1)}, key=len)
    registers: dict[Path, int] = {root: 0} | {path: number for number, path in enumerate(paths, 1)}
    ops: list[Op] = [Load(registers[path], registers[path[:-1]], path[-1].offset, path[-1].tags) for path in paths]
    places = [(path[:-1], path[-1].offset) for path in paths]
    loaded = set(places)
    for path, offset, size, text in fields:
        if size <= WORD and (path, offset) in loaded:
            continue
        ops.append((Text if text else Take)(registers[path], offset, size))
        places.append((path, offset))
    try:
        Plan(0, Step.SELF, tuple(ops))
    except PlanError:
        return None
    return Stage(root, tuple(ops), tuple(places))


def is_kernel(word: int) -> bool:
    """Whether a word may point into the kernel. Its last page is no memory: there stand error codes (IS_ERR_VALUE)."""
    return KERNEL_FLOOR <= word < (1 << 64) - 4096


class Snapshot:
    """What a walk brought: memory byte for byte as a read at that instant would have given it.

    :ivar words: eight bytes each, by exact address
    :ivar cells: everything else, by exact address
    :ivar columns: the words of each `Column`, in order of the walk
    :ivar nodes: addresses of the nodes in order of the walk, by the root of the stage that found them: ``()`` for the
        list's own
    """

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.columns: dict[Column, list[int]] = {}
        self.nodes: dict[Path, list[int]] = {(): []}
        self._blocks: dict[Column, list[bytes]] = {}
        self._sorted: dict[tuple[Column | Path, int], list[int]] = {}

    def add(self, plan: Plan, stage: Stage, records: bytes) -> Iterator[tuple[int, int, int]]:
        """Take in a chunk that ``plan``, made of ``stage``, brought.

        :returns: (address or value, head number, kind) of each record
        """
        # Column by column, and hardly a loop in Python: each listing is thousands of these values.
        columns = plan.columns(records)
        heads = zip(columns[0], columns[2], columns[3], strict=True)
        if any(columns[3]):
            own = [kind == Kind.NODE for kind in columns[3]]
            columns = [list(compress(column, own)) for column in columns]
        if not columns[0]:
            return heads
        nodes, faults = columns[0], columns[1]
        if plan.step != Step.SELF:
            self.nodes.setdefault(stage.root, []).extend(nodes)
            self._sorted.pop((stage.root, 0), None)
        bases: dict[Path, Sequence[int]] = {stage.root: nodes}
        some_missing = any(faults)
        for number, (op, (path, offset)) in enumerate(zip(plan.ops, stage.places, strict=True)):
            starts, values = bases[path], columns[4 + number]
            if isinstance(op, Load):
                pointers = [value & ~op.tags for value in values] if op.tags else values
                bases[(*path, Hop(offset, op.tags))] = pointers
            if some_missing:
                bit = 1 << number
                there = [not fault & bit for fault in faults]
                starts, values = list(compress(starts, there)), list(compress(values, there))
            addresses = list(map(offset.__add__, starts)) if offset else starts
            if isinstance(op, Load) or (isinstance(op, Take) and op.size == WORD):
                self.words.update(zip(addresses, values, strict=True))
                self.columns.setdefault((path, offset, WORD), []).extend(values)
                self._touch((path, offset, WORD))
                continue
            if isinstance(op, Text):
                # The helper ends what it cut with a NUL of its own: the last byte is not memory's.
                values = [text[: text.find(0) + 1] if 0 in text[:-1] else text[:-1] for text in values]
            elif op.size > WORD and op.size % WORD == 0:
                self._blocks.setdefault((path, offset, op.size), []).extend(values)
                self._touch((path, offset, op.size))
            self.cells.update(zip(addresses, values, strict=True))
        return heads

    @property
    def candidates(self) -> list[Column]:
        """Columns whose words may be pointers that an IDS follows."""
        return [*self.columns, *self._blocks]

    def pointers(self, column: Column, tags: int) -> list[int]:
        """What those of a column's words point to that have just such tags; sorted, each once."""
        key = (column, tags)
        if key not in self._sorted:
            values: Iterable[int] = self.columns.get(column, ())
            if column in self._blocks:
                unpack = Struct(f"<{column[2] // WORD}Q").unpack
                values = (word for block in self._blocks[column] for word in unpack(block))
            found = {value & ~tags for value in values if is_kernel(value) and _TAGS_BY_LOW_BITS[value & 7] == tags}
            self._sorted[key] = sorted(found)
        return self._sorted[key]

    def _touch(self, column: Column) -> None:
        for tags in TAGS:
            self._sorted.pop((column, tags), None)

    def addresses(self, path: Path) -> list[int]:
        """Where a path leads, from all nodes."""
        if path in self.nodes:
            return self.nodes[path]
        hop = path[-1]
        return self.pointers((path[:-1], hop.offset, hop.span), hop.tags)

    def node_near(self, root: Path, address: int, before: int, after: int) -> int | None:
        """The node found by the stage of ``root`` that ``address`` lies in: at most ``before`` bytes below it, or less
        than ``after`` above."""
        key = (root, 0)
        if key not in self._sorted:
            self._sorted[key] = sorted(set(self.nodes[root]))
        return _near(self._sorted[key], address, before, after)

    def pointer_near(self, column: Column, tags: int, address: int, reach: int) -> int | None:
        """The closest address at or below ``address``, less than ``reach`` away, that ``column`` points to."""
        return _near(self.pointers(column, tags), address, 0, reach)


def _near(addresses: list[int], address: int, before: int, after: int) -> int | None:
    at = bisect_right(addresses, address)
    if at and address - addresses[at - 1] < after:
        return addresses[at - 1]
    if before and at < len(addresses) and addresses[at] - address <= before:
        return addresses[at]
    return None


class Known:
    """Kernel memory known right now.

    :ivar words: eight bytes each, by exact address: the hit path of pointer reads
    :ivar cells: everything else, by exact address: the hit path of other reads
    """

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self._starts: list[int] | None = []

    def update(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Know these."""
        self.words.update(words)
        if cells:
            self.cells.update(cells)
            self._starts = None

    def drop(self, words: Iterable[int], cells: Iterable[int]) -> None:
        """Know these no more."""
        # Without a loop in Python: each listing drops what the one before it brought, thousands of words.
        deque(map(self.words.pop, words, repeat(None)), 0)
        deque(map(self.cells.pop, cells, repeat(None)), 0)
        self._starts = None

    def clear(self) -> None:
        """Know nothing."""
        self.words.clear()
        self.cells.clear()
        self._starts = []

    def prevail(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Take out of these what is known, and lay over the rest what is known of it: no byte says anything else."""
        if not self.words and not self.cells:
            return
        for at in words.keys() & self.words.keys():
            del words[at]
        for at in [at for at in cells.keys() & self.cells.keys() if len(cells[at]) <= len(self.cells[at])]:
            del cells[at]
        last = WORD - 1
        pages = {at // PAGE_SIZE for at in self.words} | {(at + last) // PAGE_SIZE for at in self.words}
        pages |= {at // PAGE_SIZE for start, cell in self.cells.items() for at in (start, start + len(cell))}
        for at in [at for at in words if at // PAGE_SIZE in pages or (at + last) // PAGE_SIZE in pages]:
            words[at] = int.from_bytes(self.over(at, words[at].to_bytes(WORD, "little")), "little")
        for at, cell in cells.items():
            if at // PAGE_SIZE in pages or (at + len(cell)) // PAGE_SIZE in pages:
                cells[at] = self.over(at, cell)

    def over(self, address: int, data: bytes) -> bytes:
        """``data``, read at ``address``, with what is known laid over it."""
        end = address + len(data)
        near = range(address - WORD + 1, end)
        known = {at: self.words[at].to_bytes(WORD, "little") for at in near if at in self.words}
        starts = self._sorted_starts()
        some = starts[bisect_right(starts, address - TAKE_MAX) : bisect_right(starts, end - 1)]
        laid = bytearray(data)
        for at, piece in (*known.items(), *((at, self.cells[at]) for at in some)):
            low, high = max(at, address), min(at + len(piece), end)
            if low < high:
                laid[low - address : high - address] = piece[low - at : high - at]
        return bytes(laid)

    def read(self, address: int, count: int) -> bytes | None:
        """``count`` bytes at ``address``, when all are known; put together from what is."""
        data = b""
        while len(data) < count:
            part = self._from(address + len(data), count - len(data))
            if not part:
                return None
            data += part
        return data[:count]

    def _from(self, address: int, wanted: int) -> bytes:
        """Known bytes from ``address`` on, to the end of the cell that has most of them, or enough; none is b""."""
        aligned = address if address in self.words else address & -WORD
        word = self.words.get(aligned)
        best = word.to_bytes(WORD, "little")[address - aligned :] if word is not None else b""
        cell = self.cells.get(address, b"")
        if not cell and len(best) < wanted:
            starts = self._sorted_starts()
            at = bisect_right(starts, address)
            # Cells may overlap: a string, and the block it stands in.
            for start in starts[max(0, at - 4) : at]:
                inside = self.cells.get(start, b"")[address - start :]
                if len(inside) > len(cell):
                    cell = inside
        return cell if len(cell) > len(best) else best

    def _sorted_starts(self) -> list[int]:
        if self._starts is None:  # built when first needed: most reads start where a cell starts
            self._starts = sorted(self.cells)
        return self._starts
