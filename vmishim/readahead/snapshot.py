"""What a walk brought: memory by address, the nodes, and the words that may be pointers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from struct import Struct
from typing import Any

from vmishim.memory.reader import KERNEL_FLOOR
from vmishim.readahead.fields import WORD, Column, Hop, Path, Stage
from vmishim.wire.plan import Kind, Load, Plan, Step, Take, Text

TAGS = (0, 7, 255)
"""Bits that kernel structures keep in pointers: none; the lowest (rbtree, xarray); a maple tree's node type."""
_TAGS_BY_LOW_BITS = (0, 7, 7, 7, 255, 7, 255, 7)
"""A maple tree's pointers have MAPLE_ENODE_NULL (4) set, its root also MAPLE_ROOT_NODE (2) (lib/maple_tree.c)."""


def is_kernel(word: int) -> bool:
    """Whether a word may point into the kernel. Its last page is not memory: those are error codes (IS_ERR_VALUE)."""
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

    def bare(self) -> Snapshot:
        """The same nodes and columns without their memory: what is added to it is added to both, memory apart."""
        bare = Snapshot()
        bare.columns, bare.nodes = self.columns, self.nodes
        bare._blocks, bare._sorted = self._blocks, self._sorted
        return bare

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
        if plan.step != Step.SELF:
            self.nodes.setdefault(stage.root, []).extend(columns[0])
            self._sorted.pop((stage.root, 0), None)
        self.put(stage, columns)
        return heads

    def put(self, stage: Stage, columns: list[list[Any]]) -> None:
        """Take in what was collected of a stage's nodes, see `vmishim.wire.plan.Plan.columns`."""
        nodes, faults = columns[0], columns[1]
        bases: dict[Path, Sequence[int]] = {stage.root: nodes}
        some_missing = any(faults)
        for number, (op, (path, offset)) in enumerate(zip(stage.ops, stage.sources, strict=True)):
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
                last = op.size - 1
                values = [text[: at + 1] if 0 <= (at := text.find(0)) < last else text[:-1] for text in values]
            elif op.size > WORD and op.size % WORD == 0:
                self._blocks.setdefault((path, offset, op.size), []).extend(values)
                self._touch((path, offset, op.size))
            self.cells.update(zip(addresses, values, strict=True))

    @property
    def candidates(self) -> list[Column]:
        """Columns whose words may be pointers that an IDS follows."""
        return [*self.columns, *self._blocks]

    def pointers(self, column: Column, tags: int) -> list[int]:
        """What those of a column's words point to that have just such tags; sorted, each once."""
        key = (column, tags)
        if key not in self._sorted:
            values = self.words_of(column)
            found = {value & ~tags for value in values if is_kernel(value) and _TAGS_BY_LOW_BITS[value & 7] == tags}
            self._sorted[key] = sorted(found)
        return self._sorted[key]

    def words_of(self, column: Column) -> Iterable[int]:
        """All words of a column."""
        values: Iterable[int] = self.columns.get(column, ())
        if column in self._blocks:
            unpack = Struct(f"<{column[2] // WORD}Q").unpack
            values = (word for block in self._blocks[column] for word in unpack(block))
        return values

    def _touch(self, column: Column) -> None:
        for tags in TAGS if self._sorted else ():
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

    def pointer_near(self, column: Column, tags: int, address: int, reach: int, before: int = 0) -> int | None:
        """The closest address at or below ``address``, less than ``reach`` away, that ``column`` points to; else the
        closest above, at most ``before`` away."""
        return _near(self.pointers(column, tags), address, before, reach)


def _near(addresses: list[int], address: int, before: int, after: int) -> int | None:
    at = bisect_right(addresses, address)
    if at and address - addresses[at - 1] < after:
        return addresses[at - 1]
    if before and at < len(addresses) and addresses[at] - address <= before:
        return addresses[at]
    return None
