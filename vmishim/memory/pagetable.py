"""x86-64 page tables, four and five levels: addresses in, physical addresses out.

Pure: physical memory comes from a callable, which raises ``FaultError`` where there is none.

Source: Intel SDM volume 3, 4.5 "4-level paging and 5-level paging".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from typing import NamedTuple

from vmishim.errors import FaultError

ReadPhysical = Callable[[int, int], bytes]
"""``read(physical address, count)`` gives exactly ``count`` bytes or raises ``FaultError``."""

PRESENT, LARGE = 1 << 0, 1 << 7
FRAME = 0x000F_FFFF_FFFF_F000
"""Bits 12 to 51 of an entry: the physical address of what it refers to."""
ENTRY_SIZE, ENTRIES = 8, 512
TABLES_MAX = 1 << 16
"""Page tables that ``pages`` reads, 256 MiB of them: a hostile guest's can point to one another."""
_TABLE = Struct("<512Q")


class Entry(NamedTuple):
    """One page-table entry, as the guest has it."""

    location: int
    """Its physical address."""
    value: int
    """All 64 bits, flags included."""


class Translation(NamedTuple):
    """What a virtual address translates to."""

    address: int
    """The virtual address asked for."""
    physical: int
    """The guest physical address it stands for."""
    size: int
    """Bytes of the page around it: 4 KiB, 2 MiB or 1 GiB."""
    entries: tuple[Entry, ...]
    """The page-table entries used, from the root down; fewer for a large page."""


def canonical(address: int, levels: int = 4) -> int:
    """Sign-extend from the highest bit that ``levels`` of tables translate, as an unsigned 64-bit address."""
    top = 1 << (12 + 9 * levels - 1)
    address &= (top << 1) - 1
    return address if address < top else address | (1 << 64) - (top << 1)


def walk(read: ReadPhysical, root: int, address: int, levels: int = 4, encrypted: int = 0) -> Translation:
    """Translate one address.

    :param root: physical address of the top table (CR3; its low 12 bits are ignored)
    :param address: virtual address; bits above those that are translated are ignored, as LibVMI does
    :param levels: 4 or 5
    :param encrypted: bits of an entry that do not belong to the address (the C-bit of a guest under AMD SEV)
    :raises FaultError: ``address`` is not mapped, or one of its page tables cannot be read
    """
    frame = FRAME & ~encrypted
    table = root & frame
    entries: list[Entry] = []
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        location = table + (address >> shift) % ENTRIES * ENTRY_SIZE
        try:
            value = int.from_bytes(read(location, ENTRY_SIZE), "little")
        except FaultError:
            raise FaultError(address) from None
        if not value & PRESENT:
            raise FaultError(address)
        entries.append(Entry(location, value))
        table = value & frame
        if level == 1 or (level < 4 and value & LARGE):
            within = (1 << shift) - 1
            # In a large page's entry the bits below its alignment are flags (PAT) or reserved.
            return Translation(address, table & ~within | address & within, within + 1, tuple(entries))
    raise ValueError(f"page tables have 4 or 5 levels, not {levels}")


def entries(
    root: int, address: int, values: Iterable[int], size: int, levels: int = 4, encrypted: int = 0
) -> tuple[Entry, ...]:
    """The entries that lead to ``address``, with their locations.

    :param values: their values, from the root down; values after the page's own entry are ignored
    :param size: bytes of the page; other parameters as of ``walk``
    """
    frame = FRAME & ~encrypted
    table, found = root & frame, []
    last = (size.bit_length() - 13) // 9 + 1
    for level, value in zip(range(levels, last - 1, -1), values, strict=False):
        found.append(Entry(table + (address >> (12 + 9 * (level - 1))) % ENTRIES * ENTRY_SIZE, value))
        table = value & frame
    return tuple(found)


def pages(read: ReadPhysical, root: int, levels: int = 4, encrypted: int = 0) -> Iterator[Translation]:
    """Every page that is mapped below ``root``, in the order of addresses, kernel and user half alike.

    Parameters as of ``walk``. A table that cannot be read counts as empty. The tables of a hostile guest can point to
    one another and so map 2^25 pages.

    :raises ValueError: more than ``TABLES_MAX`` tables
    """
    left = TABLES_MAX

    def limited(address: int, count: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {TABLES_MAX} page tables")
        return read(address, count)

    return _pages(limited, root & FRAME & ~encrypted, 0, levels, levels, encrypted, ())


def _pages(
    read: ReadPhysical, table: int, base: int, level: int, levels: int, encrypted: int, above: tuple[Entry, ...]
) -> Iterator[Translation]:
    try:
        values = _TABLE.unpack(read(table, _TABLE.size))
    except FaultError:
        return
    if not any(values):
        return
    shift = 12 + 9 * (level - 1)
    for index, value in enumerate(values):
        if not value & PRESENT:
            continue
        address = base | index << shift
        entries = (*above, Entry(table + index * ENTRY_SIZE, value))
        below = value & FRAME & ~encrypted
        if level == 1 or (level < 4 and value & LARGE):
            size = 1 << shift
            yield Translation(canonical(address, levels), below & ~(size - 1), size, entries)
        else:
            yield from _pages(read, below, address, level - 1, levels, encrypted, entries)
