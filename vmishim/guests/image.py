"""Where kernel images are in a guest's RAM, according to the guest's own page tables.

Version texts and symbol tables can be in any process's memory, in any number. But a process cannot map its memory where
the kernel maps its image, and the tables that map the image are part of the image. So they are found first, near a
version text, and everything else is searched only in what they map.

Source: ``init_top_pgt``, ``level3_kernel_pgt`` and ``level2_kernel_pgt`` in ``arch/x86/kernel/head_64.S``.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, Protocol

from vmishim.errors import FaultError, LibvmiError
from vmishim.memory.pagetable import ENTRIES, ENTRY_SIZE, FRAME, LARGE, PRESENT
from vmishim.memory.reader import PAGE_SIZE

REGION = 64 << 20
"""The tables are within this many bytes of the version text: an image with everything built in is smaller."""
BLOCK = 2 << 20
"""Bytes that one entry of ``level2_kernel_pgt`` maps, and the alignment of an image."""
TABLES_MAX = 256
"""Page tables that could map an image. There is one for each kernel; hostile memory could hold any number."""
_TABLE = Struct("<512Q")
_LAST = PAGE_SIZE - ENTRY_SIZE


class Image(NamedTuple):
    """Guest physical memory that page tables map as a kernel's image."""

    start: int
    end: int


class Memory(Protocol):
    """A guest's RAM. `vmishim.guests.ramfile.Ram` is one."""

    @property
    def encrypted(self) -> int: ...
    def read(self, address: int, count: int) -> bytes: ...
    def words(self, start: int, end: int, at: int) -> Iterator[tuple[int, list[int]]]: ...


class Images:
    """The images in a guest's RAM, found region by region as they are asked for.

    :param ram: the RAM, whose parts must be where they belong whenever this is asked
    """

    def __init__(self, ram: Memory) -> None:
        self._ram = ram
        self._frame = FRAME & ~ram.encrypted
        self._tables: set[int] = set()
        self._regions: dict[int, dict[int, set[Image]]] = {}

    def at(self, physical: int) -> Iterator[Image]:
        """The images that hold this address, maybe some twice. Each region is searched when all before it are used up.

        :raises LibvmiError: ``OS``: too much of the memory looks like page tables of a kernel
        """
        number = physical // REGION
        for near in (number, number - 1, number + 1):
            if near not in self._regions:
                self._regions[near] = self._search(near * REGION)
            yield from self._regions[near].get(physical // BLOCK, ())

    def _search(self, start: int) -> dict[int, set[Image]]:
        """By number of a block: the images whose tables are in the region from ``start`` on."""
        blocks: dict[int, set[Image]] = {}
        for top, words in self._ram.words(max(start, 0), max(start + REGION, 0), _LAST):
            for number, word in enumerate(words):
                level3 = word & self._frame
                if word & (PRESENT | LARGE) == PRESENT and abs(level3 - top - number * PAGE_SIZE) < REGION:
                    self._add(level3, blocks)
        return blocks

    def _add(self, level3: int, blocks: dict[int, set[Image]]) -> None:
        """Add the images that the table below ``level3`` maps, if it is a kernel's."""
        try:
            entry = self._entry(level3 + (ENTRIES - 2) * ENTRY_SIZE)
            level2 = entry & self._frame
            if entry & (PRESENT | LARGE) != PRESENT or abs(level2 - level3) >= REGION or level2 in self._tables:
                return
            self._tables.add(level2)
            if len(self._tables) > TABLES_MAX:
                raise LibvmiError(
                    f"OS: gave up: more than {TABLES_MAX} pages of the guest's memory look like a kernel's page tables"
                )
            for image in self._images(level2):
                for block in range(image.start // BLOCK, image.end // BLOCK):
                    blocks.setdefault(block, set()).add(image)
        except FaultError:
            return

    def _entry(self, location: int) -> int:
        return int.from_bytes(self._ram.read(location, ENTRY_SIZE), "little")

    def _images(self, level2: int) -> Iterator[Image]:
        """Blocks that a table maps, adjacent ones joined."""
        start = end = -1
        for value in _TABLE.unpack(self._ram.read(level2, PAGE_SIZE)):
            block = self._block(value)
            if block == end and end >= 0:
                end += BLOCK
                continue
            if start >= 0:
                yield Image(start, end)
            start, end = (block, block + BLOCK) if block >= 0 else (-1, -1)
        if start >= 0:
            yield Image(start, end)

    def _block(self, value: int) -> int:
        """Where the block is that an entry maps, also page by page; -1: none is."""
        if not value & PRESENT:
            return -1
        if value & LARGE:
            return value & self._frame & -BLOCK
        try:
            pages = _TABLE.unpack(self._ram.read(value & self._frame, PAGE_SIZE))
        except FaultError:
            return -1
        starts = ((page & self._frame) - number * PAGE_SIZE for number, page in enumerate(pages) if page & PRESENT)
        return next((start for start in starts if start >= 0 and not start % BLOCK), -1)
