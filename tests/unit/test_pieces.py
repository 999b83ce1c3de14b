"""What is known of memory, piece by piece, throughout a hold."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from vmishim.readahead.fields import WORD
from vmishim.readahead.pieces import Pieces, agree

BASE = 0xFFFF888000000FC0
"""Pieces lie around the end of a page."""
pieces = st.lists(st.tuples(st.integers(0, 127), st.sampled_from([1, 4, WORD, WORD, 16, 40])), max_size=6)


@given(st.lists(pieces, min_size=1, max_size=5))
@example([[(57, WORD)], [(64, 1)]])
@example([[(64, 1)], [(57, WORD)]])
def test_a_byte_that_was_known_once_stays_what_it_was(batches: list[list[tuple[int, int]]]) -> None:
    """Each batch is read of memory that has changed altogether since the one before."""
    known = Pieces()
    was: dict[int, int] = {}
    for instant, batch in enumerate(batches, 1):
        words = {BASE + at: int.from_bytes(bytes([instant]) * WORD, "little") for at, size in batch if size == WORD}
        cells = {BASE + at: bytes([instant]) * size for at, size in batch if size != WORD}
        for at, size in [*((at, WORD) for at in words), *((at, len(cell)) for at, cell in cells.items())]:
            for byte in range(at, at + size):
                was.setdefault(byte, instant)
        known.keep_first_answers(words, cells)
        known.update(words, cells)
        for address, word in known.words.items():
            assert word.to_bytes(WORD, "little") == bytes(was[byte] for byte in range(address, address + WORD))
        for address, cell in known.cells.items():
            assert cell == bytes(was[byte] for byte in range(address, address + len(cell)))
    everything = range(BASE - 8, BASE + 200)
    assert known.overlay(everything[0], bytes(len(everything))) == bytes(was.get(byte, 0) for byte in everything)


@given(
    words=st.dictionaries(st.integers(0, 5).map(WORD.__mul__), st.integers(0, (1 << 64) - 1), max_size=4),
    cells=st.dictionaries(st.integers(0, 40), st.binary(min_size=1, max_size=24), max_size=4),
)
def test_pieces_that_came_together_agree_afterwards(words: dict[int, int], cells: dict[int, bytes]) -> None:
    """Each byte of two pieces has one value, one that some piece had; what lies in one piece only stays."""
    before: dict[int, set[int]] = {}
    for at, piece in [*cells.items(), *((at, word.to_bytes(8, "little")) for at, word in words.items())]:
        for i, byte in enumerate(piece):
            before.setdefault(at + i, set()).add(byte)
    sizes = {at: len(cell) for at, cell in cells.items()}
    agree(words, cells)
    after: dict[int, int] = {}
    for at, piece in [*cells.items(), *((at, word.to_bytes(8, "little")) for at, word in words.items())]:
        for i, byte in enumerate(piece):
            assert after.setdefault(at + i, byte) == byte
    assert {at: len(cell) for at, cell in cells.items()} == sizes
    assert after.keys() == before.keys()
    assert all(byte in before[at] for at, byte in after.items())
