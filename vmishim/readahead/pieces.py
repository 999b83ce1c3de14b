"""Memory in pieces, found by address and put together again."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import repeat
from operator import gt

from vmishim.memory.reader import PAGE_SIZE
from vmishim.readahead.fields import WORD
from vmishim.wire.plan import TAKE_MAX


class Pieces:
    """Kernel memory in pieces.

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

    def refresh(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
        """Know these where the same is known already; forget other pieces that have one of ``words`` in them."""
        for at in self.words.keys() & words.keys():
            self.words[at] = words[at]
        for at, cell in list(self.cells.items()):
            if at in cells:
                self.update({}, {at: cells[at]})
            elif any(inside in words for inside in range(at & -WORD, at + len(cell), WORD)):
                self.drop((), (at,))

    def drop(self, words: Iterable[int], cells: Iterable[int]) -> None:
        """Forget these."""
        # Without a loop in Python: each listing drops what the one before it brought, thousands of words.
        deque(map(self.words.pop, words, repeat(None)), 0)
        deque(map(self.cells.pop, cells, repeat(None)), 0)
        self._starts = None

    def clear(self) -> None:
        """Forget everything."""
        self.words.clear()
        self.cells.clear()
        self._starts = []

    def keep_first_answers(self, words: dict[int, int], cells: dict[int, bytes]) -> None:
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
            words[at] = int.from_bytes(self.overlay(at, words[at].to_bytes(WORD, "little")), "little")
        for at, cell in cells.items():
            if at // PAGE_SIZE in pages or (at + len(cell)) // PAGE_SIZE in pages:
                cells[at] = self.overlay(at, cell)

    def overlay(self, address: int, data: bytes) -> bytes:
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


def agree(words: dict[int, int], cells: dict[int, bytes]) -> None:
    """Make pieces that came together say the same of each byte, which may have changed between two reads of it.

    :param words: at multiples of their size, as in all but packed structures; others may disagree
    """
    starts = sorted(cells)
    ends = [at + len(cells[at]) for at in starts]
    if not any(map(gt, ends, starts[1:])) and not any(
        word in words for at, end in zip(starts, ends, strict=True) for word in range(at & -WORD, end, WORD)
    ):
        return  # as a rule; the rest is slow
    start, end, cover = 0, 0, b""
    for at in sorted(words.keys() | cells.keys()):
        if at in cells:
            cells[at] = cell = cover[at - start : at - start + len(cells[at])] + cells[at][max(0, end - at) :]
            if at + len(cell) > end:
                start, end, cover = at, at + len(cell), cell
        if at in words:
            word = words[at].to_bytes(WORD, "little")
            word = cover[at - start : at - start + WORD] + word[max(0, end - at) :]
            words[at] = int.from_bytes(word, "little")
            if at + WORD > end:
                start, end, cover = at, at + WORD, word
