"""Page tables made by hand in a small physical memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.errors import FaultError
from vmishim.memory.pagetable import canonical, entries, pages, walk

ROOT = 0x10_0000
PRESENT, LARGE, NO_EXECUTE = 1, 1 << 7, 1 << 63
C_BIT = 1 << 47


class Memory:
    """Physical memory in which tables can be set up."""

    def __init__(self, levels: int = 4, encrypted: int = 0) -> None:
        self.levels = levels
        self.encrypted = encrypted
        self.tables: dict[int, bytearray] = {ROOT: bytearray(4096)}

    def read(self, address: int, count: int) -> bytes:
        table = self.tables.get(address & ~0xFFF)
        if table is None:
            raise FaultError(address)
        return bytes(table[address & 0xFFF :][:count])

    def map(self, virtual: int, physical: int, size: int = 4096, flags: int = PRESENT) -> None:
        table, last = ROOT, {4096: 1, 2 << 20: 2, 1 << 30: 3}[size]
        for level in range(self.levels, 0, -1):
            at = (virtual >> (12 + 9 * (level - 1))) % 512 * 8
            entry = self.tables[table][at : at + 8]
            if level == last:
                value = physical | self.encrypted | flags | (LARGE if level > 1 else 0) | NO_EXECUTE
                self.tables[table][at : at + 8] = value.to_bytes(8, "little")
                return
            if not any(entry):
                new = ROOT + 4096 * len(self.tables)
                self.tables[new] = bytearray(4096)
                self.tables[table][at : at + 8] = (new | self.encrypted | 0x63).to_bytes(8, "little")
                table = new
            else:
                table = int.from_bytes(entry, "little") & 0x000F_FFFF_FFFF_F000 & ~self.encrypted


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("size", [4096, 2 << 20, 1 << 30])
@given(st.integers(0, (1 << 57) - 1), st.integers(0, (1 << 40) - 1))
def test_an_address_is_found_where_it_was_mapped(levels: int, size: int, virtual: int, physical: int) -> None:
    memory = Memory(levels)
    memory.map(virtual, physical & -size, size)
    found = walk(memory.read, ROOT, virtual, levels)
    assert found.physical == physical & -size | virtual % size
    assert found.size == size
    assert len(found.entries) == levels - {4096: 0, 2 << 20: 1, 1 << 30: 2}[size]
    values = [entry.value for entry in found.entries] + [0, 0]
    assert entries(ROOT, virtual, values, size, levels) == found.entries
    with pytest.raises(FaultError):
        walk(memory.read, ROOT, virtual ^ size, levels)


def test_the_error_names_the_virtual_address() -> None:
    memory = Memory()
    memory.map(0x1000, 0x5000, flags=0)
    with pytest.raises(FaultError) as error:
        walk(memory.read, ROOT, 0x1234)
    assert error.value.address == 0x1234
    with pytest.raises(FaultError) as error:
        walk(memory.read, 0xDEAD000, 0x1234)  # no table at all
    assert error.value.address == 0x1234


def test_flags_of_a_root_and_bits_above_the_tables_are_ignored() -> None:
    memory = Memory()
    memory.map(0xFFFF_8880_0000_1000, 0x5000)
    assert walk(memory.read, ROOT | 0xFFF, 0x0000_8880_0000_1010).physical == 0x5010


def test_protnone_is_not_present() -> None:
    memory = Memory()
    memory.map(0x1000, 0x5000, flags=1 << 8)
    with pytest.raises(FaultError):
        walk(memory.read, ROOT, 0x1000)


def test_flags_of_a_large_page_are_no_address() -> None:
    memory = Memory()
    memory.map(0x4000_0000, 0x20_0000, 2 << 20, flags=PRESENT | 1 << 12)  # the PAT bit
    assert walk(memory.read, ROOT, 0x4000_0123).physical == 0x20_0123


def test_the_encryption_bit_is_not_part_of_the_address() -> None:
    memory = Memory(encrypted=C_BIT)
    memory.map(0x1000, 0x5000)
    assert walk(memory.read, ROOT | C_BIT, 0x1008, encrypted=C_BIT).physical == 0x5008
    assert [page.physical for page in pages(memory.read, ROOT, encrypted=C_BIT)] == [0x5000]
    with pytest.raises(FaultError):
        walk(memory.read, ROOT, 0x1008)


@pytest.mark.parametrize("levels", [4, 5])
def test_every_page_is_listed_in_order(levels: int) -> None:
    memory = Memory(levels)
    top = canonical((1 << (12 + 9 * levels)) - 4096, levels)
    for address, size in ((0x1000, 4096), (0x4000_0000, 2 << 20), (0x8000_0000, 1 << 30), (top, 4096)):
        memory.map(address, 0x4000_0000, size)
    assert [(page.address, page.size) for page in pages(memory.read, ROOT, levels)] == [
        (0x1000, 4096),
        (0x4000_0000, 2 << 20),
        (0x8000_0000, 1 << 30),
        (top, 4096),
    ]
    assert top == 0xFFFF_FFFF_FFFF_F000
    for page in pages(memory.read, ROOT, levels):
        assert walk(memory.read, ROOT, page.address, levels) == page


def test_a_table_that_cannot_be_read_maps_nothing() -> None:
    memory = Memory()
    memory.map(0x1000, 0x5000)
    memory.tables.popitem()
    assert list(pages(memory.read, ROOT)) == []
    assert list(pages(memory.read, 0xDEAD000)) == []


def test_a_table_that_refers_to_itself_ends() -> None:
    memory = Memory()
    memory.tables[ROOT][0:8] = (ROOT | PRESENT).to_bytes(8, "little")
    assert walk(memory.read, ROOT, 0).physical == ROOT
    assert [page.address for page in pages(memory.read, ROOT)] == [0]


@given(st.integers(0, (1 << 64) - 1), st.sampled_from([4, 5]))
def test_canonical(address: int, levels: int) -> None:
    bits = 12 + 9 * levels
    found = canonical(address, levels)
    assert found % (1 << bits) == address % (1 << bits)
    assert found >> (bits - 1) in (0, (1 << (65 - bits)) - 1)
    assert canonical(found, levels) == found


def test_other_levels_do_not_exist() -> None:
    with pytest.raises(ValueError, match="levels"):
        walk(Memory().read, ROOT, 0, 0)
