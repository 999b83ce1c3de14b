"""A guest's memory for drgn: two segments, of virtual and of physical addresses, over a page cache."""

from __future__ import annotations

import drgn

from vmishim.errors import FaultError
from vmishim.memory.pagecache import PageCache
from vmishim.memory.reader import ADDRESSES, PHYSICAL

HALF = 1 << 63
"""Where the kernel's half of the address space begins."""
FRAME = (1 << 47) - 1
"""Bits of a physical address. drgn takes bits 12 to 51 of a page-table entry for the address, but in a confidential VM
bit 47 or 51 says that the page is encrypted (the C-bit), and such a VM has no memory so high."""


class Segments:
    """What drgn calls to read memory.

    :param cache: the guest's memory
    :param page_offset: where its direct map begins, 0 if unknown; then physical memory is asked for as such
    :param memory_size: end of the highest RAM, 0 if unknown
    """

    def __init__(self, cache: PageCache, page_offset: int, memory_size: int) -> None:
        self._cache = cache
        self._page_offset = page_offset
        self._memory_size = memory_size

    def register(self, prog: drgn.Program) -> None:
        """Read all of the program's memory by them."""
        prog.add_memory_segment(0, ADDRESSES - 1, self.read_physical, physical=True)
        prog.add_memory_segment(0, HALF, self.read_virtual, physical=False)
        prog.add_memory_segment(HALF, HALF - 1, self.read_virtual, physical=False)

    def read_virtual(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        """Kernel memory. :raises drgn.FaultError: it cannot be read"""
        try:
            return self._cache.read(address, count)
        except FaultError as fault:
            raise _fault(fault.address) from None

    def read_physical(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        """Guest physical memory. :raises drgn.FaultError: there is no RAM, or it cannot be read"""
        address &= FRAME
        if self._memory_size and address + count > self._memory_size:
            raise drgn.FaultError("the guest has no memory at this physical address", max(address, self._memory_size))
        try:
            if self._page_offset:
                return self._cache.read(self._page_offset + address, count)
            return self._cache.read(address, count, PHYSICAL)
        except FaultError as fault:
            raise _fault(fault.address - self._page_offset) from None


def _fault(address: int) -> drgn.FaultError:
    return drgn.FaultError("the guest has no readable memory at this address", address)
