"""What a guest says about its hash tables is checked."""

from __future__ import annotations

import struct

import pytest

from vmishim.errors import LinkError
from vmishim.readahead.catalogue import TABLE_HEADS_MAX, KernelList
from vmishim.wire.plan import Step

HOLDER = 0xFFFF888000000000
TABLE = KernelList("tcp", 0, Step.NULLS, 112, 0, 800, (), stride=16, table=(HOLDER, HOLDER + 8, 8))


class Memory:
    """A guest's, of which nothing but the table's holder is there."""

    def __init__(self, pointer: int, mask: int) -> None:
        self.data = struct.pack("<QI", pointer, mask)

    def read(self, address: int, count: int, space: int = 0, *, text: bool = False) -> bytes:
        return self.data[address - HOLDER :][:count]


def test_a_table_is_where_its_holder_says() -> None:
    located = TABLE.located(Memory(0xFFFFC90000005000, TABLE_HEADS_MAX - 1))
    assert (located.start, located.heads) == (0xFFFFC90000005008, TABLE_HEADS_MAX)
    assert located.head_addresses == (HOLDER, 0xFFFFC90000005008)


@pytest.mark.parametrize(
    ("pointer", "mask"),
    [
        (0xFFFFC90000005000, 0xFFFFFFFF),
        (0xFFFFC90000005000, TABLE_HEADS_MAX),
        (0, 0xFFF),
        (0x7F0000000000, 0xFFF),
        (0xFFFFFFFFFFFFFFFF, 0xFFF),
        (0xFFFFFFFFFFFFF000, 0xFFF),
    ],
)
def test_a_table_that_cannot_be_is_an_error(pointer: int, mask: int) -> None:
    """Nothing is allocated for it, and nothing asked of it."""
    with pytest.raises(LinkError, match=rf"'tcp' lies at {pointer + 8:#x} and has {mask + 1:,} chains"):
        TABLE.located(Memory(pointer, mask))
