"""LibVMI's caches: what is added to one is believed until that cache is flushed."""

from __future__ import annotations

from vmishim.libvmi.symbols import Symbols
from vmishim.libvmi.values import signed_32, unsigned
from vmishim.memory.reader import ADDRESSES, PAGE_SIZE

FOREVER = float("inf")
"""Until when what was added by hand is remembered."""


class Caches(Symbols):
    """The calls ``...cache_add`` and ``...cache_flush``."""

    __slots__ = ()

    def v2pcache_flush(self, dtb: int = 0) -> None:
        """Forget translations: those added for ``dtb``, and all page tables that were read.

        :param dtb: page tables; 0, and 2**64 - 1 as LibVMI has it, are all of them

        Source: ``vmi_v2pcache_flush``.
        """
        dtb = 0 if unsigned(dtb) == ADDRESSES - 1 else dtb
        self._pages = {key: page for key, page in self._pages.items() if dtb and key[0] != dtb}
        self._held_pages = {}
        self._target.flush()

    def v2pcache_add(self, va: int, dtb: int, pa: int) -> None:
        """Believe that page tables ``dtb`` map the page of ``va`` to that of ``pa``. Source: ``vmi_v2pcache_add``."""
        self._pages[unsigned(dtb), unsigned(va) & -PAGE_SIZE] = unsigned(pa) & -PAGE_SIZE

    def symcache_flush(self) -> None:
        """Forget symbols that were added or asked for. Source: ``vmi_symcache_flush``."""
        self._symbols = {}
        self._target.profile.forget()

    def symcache_add(self, base_addr: int, pid: int, symbol: str, va: int) -> None:
        """Believe that ``symbol`` is at ``va``.

        :param base_addr: 0 for the kernel, else where the symbol's shared object is mapped
        :param pid: 0 for the kernel, else the process

        Source: ``vmi_symcache_add``.
        """
        symbol.encode()
        owner = self.pid_to_dtb(pid) if signed_32(pid) else 0
        self._symbols[unsigned(base_addr), owner, symbol] = unsigned(va)

    def rvacache_flush(self) -> None:
        """Forget names of addresses that were added. Source: ``vmi_rvacache_flush``."""
        self._names = {}

    def rvacache_add(self, base_addr: int, pid: int, rva: int, symbol: str) -> None:
        """Believe that ``symbol`` is ``rva`` bytes from ``base_addr`` in process ``pid``.

        Source: ``vmi_rvacache_add``; the genuine binding raises ``TypeError``.
        """
        symbol.encode()
        self._names[unsigned(base_addr), self.pid_to_dtb(pid), unsigned(rva)] = symbol

    def pidcache_flush(self) -> None:
        """Forget which page tables belong to which process. Source: ``vmi_pidcache_flush``."""
        self._dtbs = {}

    def pidcache_add(self, pid: int, dtb: int) -> None:
        """Believe that process ``pid`` has its page tables at ``dtb``. Source: ``vmi_pidcache_add``."""
        self._dtbs[signed_32(pid)] = unsigned(dtb), FOREVER

    def pagecache_flush(self) -> None:
        """Forget all memory that was read: the next read asks the guest. Source: ``vmi_pagecache_flush``."""
        self._held_pages = {}
        self._target.flush()
