"""What is wanted of a list's nodes: the fields that a walk brings, and how plans collect them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vmishim.wire.plan import TAKE_MAX, Load, Op, Plan, PlanError, Step, Take, Text

WORD = 8
"""Bytes of a pointer. A field of this size is kept as an int, every other as bytes."""
BLOCK = 256
"""Bytes that are brought of an array once some of its words in a row were read."""
ROW = 4
"""Words in a row from which on they count as an array."""
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
    sources: tuple[tuple[Path, int], ...]
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
    sources = [(path[:-1], path[-1].offset) for path in paths]
    loaded = set(sources)
    for path, offset, size, text in fields:
        if size <= WORD and (path, offset) in loaded:
            continue
        ops.append((Text if text else Take)(registers[path], offset, size))
        sources.append((path, offset))
    try:
        Plan(0, Step.SELF, tuple(ops))
    except PlanError:
        return None
    return Stage(root, tuple(ops), tuple(sources))
