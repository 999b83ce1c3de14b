"""A stage's operations carried out over lines of memory that were brought before.

What hangs from a list's nodes behind arrays is collected in stages, each of which begins where an earlier one leads: a
request each, and a maple tree has a dozen. Most of it is where it was in the pass before. So those lines are brought
first, all in one request, and a stage asks the guest only about nodes that are not in them. From the pass before come
addresses alone: every byte is of this pass, and only what this pass's own pointers lead to is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, compress
from struct import Struct
from typing import Any

from vmishim.memory.reader import ADDRESSES, KERNEL_FLOOR
from vmishim.readahead.fields import WORD, Stage
from vmishim.readahead.trails import LINE
from vmishim.wire.plan import Kind, Load, Take, Text

LINES_MAX = 4096
"""Lines of one list that are brought so. To look through more takes longer than a request for each stage: of 20,000,
0.1 s, as against 15 requests."""


class Lines:
    """Lines that were brought.

    :param asked: addresses of the lines that the guest was asked for
    :param found: those that can be read
    """

    def __init__(self, asked: Iterable[int], found: Mapping[int, bytes]) -> None:
        self._lines = found
        self._asked = frozenset(asked)
        addresses = chain.from_iterable(range(at, at + LINE, WORD) for at in found)
        words = Struct(f"<{len(found) * LINE // WORD}Q").unpack(b"".join(found.values()))
        self._words = dict(zip(addresses, words, strict=True))
        self._used: set[int] = set()

    @property
    def are_few(self) -> bool:
        """Whether the stages so far wanted no more than `LINES_MAX`."""
        return len(self._used) <= LINES_MAX

    @property
    def used(self) -> list[int]:
        """Addresses of the lines that hold what the stages wanted, whether it can be read or not; none if these are too
        many."""
        return sorted(self._used) if self.are_few else []

    def use(self, stage: Stage, columns: list[list[Any]]) -> None:
        """Note which lines a stage wanted, by what it brought, see `carry_out`."""
        registers = {0: columns[0]}
        for op, values in zip(stage.ops, columns[4:], strict=True):
            addresses = [at for start in registers[op.src] if (at := start + op.offset) >= KERNEL_FLOOR]
            if isinstance(op, Load):
                registers[op.dst] = [value & ~op.tags for value in values] if op.tags else values
            self._used.update([at & -LINE for at in addresses])
            size = WORD if isinstance(op, Load) else op.size
            if size > WORD or any(at % WORD for at in addresses):
                for at in addresses:
                    self._used.update(range(at & -LINE, at + size, LINE))

    def carry_out(self, stage: Stage, nodes: list[int]) -> tuple[list[list[Any]], list[int]]:
        """Collect what a stage wants of its nodes.

        :returns: what a plan of the stage would bring of the nodes whose memory is all here, as
            `vmishim.wire.plan.Plan.columns`; and the other nodes
        """
        if not self._asked:
            return [[] for _ in range(4 + len(stage.ops))], nodes
        here, faults = [True] * len(nodes), [0] * len(nodes)
        registers, slots = {0: nodes}, list[list[Any]]()
        for number, op in enumerate(stage.ops):
            starts = registers[op.src]
            addresses = list(map(op.offset.__add__, starts)) if op.offset else starts
            size = WORD if isinstance(op, Load) else op.size
            is_word = size == WORD and not isinstance(op, Text)
            values: list[Any]
            if isinstance(op, Load) or is_word:
                values = list(map(self._words.get, addresses))
            else:
                values = [self._piece(op, at) for at in addresses]
            for index in [index for index, value in enumerate(values) if value is None]:
                at = addresses[index]
                piece = self._piece(Take(0, 0, WORD), at) if is_word and at % WORD else None
                if piece is not None:
                    values[index] = int.from_bytes(piece, "little")
                    continue
                values[index] = 0 if is_word else bytes(size)
                if self._is_unreadable(at, size):
                    faults[index] |= 1 << number
                else:
                    here[index] = False
            if isinstance(op, Load):
                registers[op.dst] = [value & ~op.tags for value in values] if op.tags else values
            slots.append(values)
        columns: list[list[Any]] = [nodes, faults, list(range(len(nodes))), [Kind.NODE] * len(nodes), *slots]
        if all(here):
            return columns, []
        elsewhere = [node for node, whole in zip(nodes, here, strict=True) if not whole]
        return [list(compress(column, here)) for column in columns], elsewhere

    def _piece(self, op: Take | Text, address: int) -> bytes | None:
        """What an operation copies from an address; None when some of it is not here."""
        line = self._lines.get(address & -LINE)
        if line is None:
            return None
        data = line[address % LINE :][: op.size]
        at = (address & -LINE) + LINE
        is_text = isinstance(op, Text)
        while len(data) < op.size and not (is_text and 0 in data):
            line = self._lines.get(at)
            if line is None:
                return None
            data += line[: op.size - len(data)]
            at += LINE
        if not is_text:
            return data
        end = data.find(0)
        return data[: end if 0 <= end < op.size - 1 else op.size - 1].ljust(op.size, b"\0")

    def _is_unreadable(self, address: int, size: int) -> bool:
        """Whether memory that is not here cannot be read."""
        if not KERNEL_FLOOR <= address <= ADDRESSES - size:
            return True
        return next(at for at in range(address & -LINE, address + size, LINE) if at not in self._lines) in self._asked
