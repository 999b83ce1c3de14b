"""Page tables: from virtual addresses to physical ones."""

from __future__ import annotations

from itertools import islice
from struct import Struct
from types import SimpleNamespace

from vmishim.errors import FaultError, failure
from vmishim.libvmi import limits
from vmishim.libvmi.opened import NO_OS, OpenedGuest
from vmishim.libvmi.values import PageEntries, PageInfo, PageLookup, unsigned
from vmishim.memory import pagetable
from vmishim.memory.pagetable import Translation
from vmishim.memory.reader import ADDRESSES, KERNEL, PAGE_SIZE

_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""``__START_KERNEL_map``: the kernel image is mapped here, from physical address ``phys_base`` on."""

_MASKS = ("sme_me_mask", "cc_mask")
"""Kernel variables with the bits of a page-table entry that are no address: AMD SEV's C-bit, set in every private
entry; Intel TDX's shared bit, set in every shared one."""

_SIZES = (1 << 12, 1 << 21, 1 << 30)
"""Bytes of a page."""

_U64 = Struct("<Q")


class PageTables(OpenedGuest):
    """The calls that translate by page tables."""

    __slots__ = ()

    def translate_kv2p(self, vaddr: int) -> int:
        """Physical address of a kernel virtual address.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_translate_kv2p``.
        """
        return self.pagetable_lookup(self._kernel_tables(), vaddr)

    def pagetable_lookup(self, dtb: int, vaddr: int) -> int:
        """Physical address of ``vaddr``, according to the page tables at ``dtb``.

        :param dtb: physical address of the top table, as in CR3
        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_pagetable_lookup``. Pages of 4 KiB, 2 MiB and 1 GiB, four and five levels.
        """
        if self._pages:
            known = self._pages.get((dtb, vaddr & -PAGE_SIZE))
            if known is not None:
                return known | vaddr % PAGE_SIZE
        if not self._holds:
            return self._translate(dtb, vaddr).physical
        held = self._held_pages  # of this hold, whatever another thread does meanwhile
        for size in _SIZES:
            physical = held.get((dtb, size, vaddr & -size))
            if physical is not None:
                return physical | vaddr % size
        found = self._translate(dtb, vaddr)
        # Within a hold a page stays where it is, so its other addresses need no request.
        if len(held) >= limits.HELD_PAGES:
            held.clear()
        held[dtb, found.size, vaddr & -found.size] = found.physical & -found.size
        return found.physical

    def pagetable_lookup_extended(self, dtb: int, vaddr: int) -> PageLookup:
        """As ``pagetable_lookup``, with the page's size and the page-table entries that lead to it.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_pagetable_lookup_extended``.
        """
        found = self._translate(dtb, vaddr)
        levels = ("pml5e", "pml4e", "pdpte", "pgd", "pte")[-self._profile.levels :]
        entries = {}
        for level, entry in zip(levels, found.entries, strict=False):  # a large page has fewer entries
            entries[f"{level}_location"], entries[f"{level}_value"] = entry
        return PageLookup(vaddr, found.physical, found.size, unsigned(dtb), PageEntries(**entries))

    def get_va_pages(self, dtb: int) -> list[PageInfo]:
        """Every page that the page tables at ``dtb`` map, kernel half included, from the highest address down.

        Tables that cannot be read map nothing; that is not an error.

        :raises LibvmiError: ``VMI_FAILURE``: more than ``PAGES_LIMIT`` pages, or too many tables

        Source: ``vmi_get_va_pages``. The genuine binding raises ``AttributeError``.
        """
        pages = pagetable.pages(self._read_physical, unsigned(dtb), self._profile.levels, self._encryption())
        try:
            found = list(islice(pages, limits.PAGES_LIMIT + 1))
        except ValueError as error:
            raise failure(f"the page tables at {dtb:#x} are not valid: {error}") from None
        if len(found) > limits.PAGES_LIMIT:
            raise failure(f"the page tables at {dtb:#x} map more than {limits.PAGES_LIMIT} pages")
        return [
            PageInfo(SimpleNamespace(vaddr=page.address, dtb=dtb, paddr=page.physical, size=page.size))
            for page in reversed(found)
        ]

    def _translate(self, dtb: int, vaddr: int) -> Translation:
        root, vaddr, levels = self._root(dtb), unsigned(vaddr), self._profile.levels
        physical, size, values = self._target.lookup(root, pagetable.canonical(vaddr, levels))
        if not size:
            raise FaultError(vaddr)
        entries = pagetable.entries(root, vaddr, values, size, levels, self._encryption())
        return Translation(vaddr, physical, size, entries)

    def _root(self, dtb: int) -> int:
        """``dtb`` without PCID and flags. :raises FaultError: there can be no page tables."""
        root = unsigned(dtb) & pagetable.FRAME
        if not root or not self._paging:
            raise FaultError(root)
        return root

    def _kernel_tables(self) -> int:
        """Physical address of the kernel's page tables (LibVMI's ``kpgd``)."""
        if not self._os:
            raise failure(NO_OS)
        if not self._kpgd:
            base = _U64.unpack(self._read(self._symbol("phys_base"), 8, KERNEL))[0]
            try:
                top = self._profile.symbol("init_top_pgt")
            except KeyError:  # its name before Linux 4.13
                top = self._symbol("init_level4_pgt")
            self._kpgd = (top - _KERNEL_MAP + base) % ADDRESSES
        return self._kpgd

    def _encryption(self) -> int:
        """Bits of a page-table entry that tell of encryption, and are no address."""
        if self._encrypted < 0:
            mask = 0
            for name in _MASKS:
                try:
                    mask |= _U64.unpack(self._reader.read(self._profile.symbol(name), 8))[0]
                except (KeyError, FaultError):
                    continue
            self._encrypted = mask
        return self._encrypted

    def _direct(self, vaddr: int) -> int:
        """Physical address of kernel memory that is allocated by pages, such as a page table: mostly a subtraction."""
        offset = vaddr - self._profile.page_offset
        if self._profile.page_offset and 0 <= offset < self._profile.memory_size:
            return offset
        return self.translate_kv2p(vaddr)
