"""What one walk brought, findable by address."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from vmishim.memory.remote import KERNEL_FLOOR
from vmishim.wire.plan import OPS_MAX, RECORD_MAX, REGISTERS, Load, Op, Plan, Take, Text

Path = tuple[int, ...]
"""How to get from a node to other memory: the offsets of the pointers to follow. ``()`` is the node itself."""


class Field(NamedTuple):
    """Memory an IDS reads of every node: ``size`` bytes at ``offset`` from where ``path`` leads."""

    path: Path
    offset: int
    size: int
    text: bool = False
    """Only up to the first NUL."""

    def covers(self, other: Field) -> bool:
        """Whether having this is having ``other``."""
        return (
            self.path == other.path
            and not self.text
            and self.offset <= other.offset
            and self.offset + self.size >= other.offset + other.size
        )


class Fields:
    """The fields a walk brings along, and the operations that collect them. Grows; never past what a plan can hold."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self._fields: list[Field] = []
        self.ops: tuple[Op, ...] = ()
        self.places: tuple[tuple[Path, int], ...] = ()
        """What each operation collects: where from, and at which offset."""
        for field in fields:
            self.add(field)

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields)

    def __contains__(self, field: Field) -> bool:
        return any(field == known or known.covers(field) for known in self._fields)

    def add(self, field: Field) -> bool:
        """Bring ``field`` along from now on. False when the plan has no room for it."""
        if field in self:
            return True
        fields = [known for known in self._fields if not field.covers(known)] + [field]
        paths = sorted({path[:end] for known in fields for path in [known.path] for end in range(1, len(path) + 1)}, key=len)
        if len(paths) >= REGISTERS:
            return False
        registers: dict[Path, int] = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
        ops: list[Op] = [Load(registers[path], registers[path[:-1]], path[-1]) for path in paths]
        places = [(path[:-1], path[-1]) for path in paths]
        loaded = set(places)
        for path, offset, size, text in fields:
            if size <= 8 and (path, offset) in loaded:
                continue
            ops.append((Text if text else Take)(registers[path], offset, size))
            places.append((path, offset))
        room = sum(8 if isinstance(op, Load) else op.size for op in ops)
        if len(ops) > OPS_MAX or room > RECORD_MAX - 24:
            return False
        self._fields, self.ops, self.places = fields, tuple(ops), tuple(places)
        return True


class Snapshot:
    """Nodes of a walk and what was collected of them.

    :ivar cells: memory by exact address, byte for byte what a read would have given at the instant of the walk
    """

    def __init__(self) -> None:
        self.cells: dict[int, bytes] = {}
        self.columns: dict[Path, list[int]] = {(): []}
        """Addresses each path led to; nodes under ``()``, in order of the walk."""
        self._sorted: dict[Path, list[int]] = {}

    @property
    def nodes(self) -> list[int]:
        """Addresses of the nodes, in the order of the walk."""
        return self.columns[()]

    def add(self, plan: Plan, places: Sequence[tuple[Path, int]], records: bytes, root: Path = ()) -> list[tuple[int, ...]]:
        """Take in a chunk.

        :param places: what each operation of the plan collects
        :param root: where the plan's nodes lie from ours; ``()`` when they are ours
        :returns: (node, faults, head number) of each record
        """
        rows = list(zip(*plan.records(records), strict=True))
        if not rows:
            return []
        nodes, faults = rows[0], rows[1]
        bases: dict[Path, Sequence[int]] = {root: nodes}
        if root == ():
            self.columns[()] += nodes
            self._sorted.pop((), None)
        anything_missing = any(faults)
        for number, (op, (path, offset)) in enumerate(zip(plan.ops, places, strict=True)):
            column: Sequence[bytes] = rows[4 + number]
            starts: Sequence[int] = bases[path]
            if isinstance(op, Load):
                pointers: Sequence[int] = rows[4 + number]
                bases[(*path, offset)] = pointers
                self.columns.setdefault((*path, offset), []).extend(pointers)
                self._sorted.pop((*path, offset), None)
                column = [pointer.to_bytes(8, "little") for pointer in pointers]
            elif isinstance(op, Text):
                # The helper ends what it cut with a NUL of its own: the last byte is not memory's.
                column = [text[: text.find(0) + 1] if 0 in text[:-1] else text[:-1] for text in column]
            elif op.size == 8:
                self.columns.setdefault((*path, offset), []).extend(int.from_bytes(cell, "little") for cell in column)
                self._sorted.pop((*path, offset), None)
            if anything_missing:
                bit = 1 << number
                there = [not fault & bit for fault in faults]
                starts, column = list(compress(starts, there)), list(compress(column, there))
            self.cells.update(zip([start + offset for start in starts] if offset else starts, column, strict=True))
        return list(zip(rows[0], rows[1], rows[2], strict=True))

    def nearest(self, path: Path, address: int, before: int, after: int) -> int | None:
        """The address ``path`` led to that ``address`` lies beside: at most ``before`` bytes below it, less than ``after``
        above; the closest below first."""
        column = self._sorted.get(path)
        if column is None:
            column = self._sorted[path] = sorted({base for base in self.columns.get(path, ()) if base >= KERNEL_FLOOR})
        at = bisect_right(column, address)
        if at and address - column[at - 1] < after:
            return column[at - 1]
        if before and at < len(column) and column[at] - address <= before:
            return column[at]
        return None


class Cells:
    """Memory known right now. ``exact`` is the hit path's dict; this finds what starts in the middle of a cell, too."""

    def __init__(self) -> None:
        self.exact: dict[int, bytes] = {}
        self._starts: list[int] | None = []

    def update(self, cells: dict[int, bytes]) -> None:
        """Know these."""
        self.exact.update(cells)
        self._starts = None

    def set(self, address: int, data: bytes) -> None:
        """Know this; the longer of two cells that start at one address stays."""
        if len(self.exact.get(address, b"")) < len(data):
            self.exact[address] = data
            self._starts = None

    def drop(self, addresses: Iterable[int]) -> None:
        """Know these no more."""
        for address in addresses:
            self.exact.pop(address, None)
        self._starts = None

    def clear(self) -> None:
        """Know nothing."""
        self.exact.clear()
        self._starts = []

    def read(self, address: int, count: int) -> bytes | None:
        """``count`` bytes at ``address``, when one cell holds them all."""
        cell = self.exact.get(address)
        if cell is not None and len(cell) >= count:
            return cell[:count]
        if self._starts is None:  # built when first needed: most reads start where a cell starts
            self._starts = sorted(self.exact)
        at = bisect_right(self._starts, address)
        # Cells may overlap: a pointer is collected by itself and as part of what stands around it.
        for start in reversed(self._starts[max(0, at - 8) : at]):
            cell = self.exact.get(start)
            if cell is not None and start + len(cell) >= address + count:
                return cell[address - start :][:count]
        return None
