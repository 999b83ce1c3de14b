"""What LibVMI's calls take and return besides numbers and bytes: access contexts, pages, registers.

Source: ``libvmi.libvmi`` of the libvmi 3.7.1 Python bindings.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

from vmishim.libvmi.constants import PageMode, TranslateMechanism, X86Reg


class AccessContext:
    """An address and what it is relative to.

    :param tr_mechanism: how to translate; decides which of the other parameters count
    :param addr: physical address (``NONE``), or virtual address (``PROCESS_DTB``, ``PROCESS_PID``)
    :param ksym: name of a kernel symbol (``KERNEL_SYMBOL``)
    :param dtb: physical address of the page tables (``PROCESS_DTB``)
    :param pid: process whose page tables are used (``PROCESS_PID``); 0 is the kernel
    :raises RuntimeError: ``tr_mechanism`` is not a ``TranslateMechanism``, or ``ksym`` is needed and not a string

    Source: ``access_context_t``.
    """

    def __init__(
        self,
        tr_mechanism: TranslateMechanism = TranslateMechanism.NONE,
        addr: int = 0,
        ksym: str | None = None,
        dtb: int = 0,
        pid: int = 0,
    ) -> None:
        if not isinstance(tr_mechanism, TranslateMechanism):
            raise RuntimeError("must specify a valid TranslateMechanism")
        self.tr_mechanism = tr_mechanism
        if tr_mechanism is TranslateMechanism.KERNEL_SYMBOL:
            if not isinstance(ksym, str):
                raise RuntimeError("ksym must be a string")
            self.ksym = ksym
        self.addr = addr
        self.dtb = dtb
        self.pid = pid

    def to_ffi(self) -> SimpleNamespace:
        """The fields under their names in C. There is no C library here, so this is a plain object."""
        if self.tr_mechanism is TranslateMechanism.KERNEL_SYMBOL:
            return SimpleNamespace(translate_mechanism=self.tr_mechanism.value, ksym=self.ksym.encode())
        return SimpleNamespace(
            translate_mechanism=self.tr_mechanism.value,
            addr=unsigned(self.addr),
            dtb=unsigned(self.dtb),
            pid=signed_32(self.pid),
        )


class PageInfo:
    """One mapped page, as ``Libvmi.get_va_pages`` lists it.

    :ivar vaddr: virtual address of its start
    :ivar dtb: the page tables that map it
    :ivar paddr: physical address of its start
    :ivar size: its bytes: 4 KiB, 2 MiB or 1 GiB
    """

    def __init__(self, cffi_pageinfo: Any) -> None:
        self.vaddr: int = cffi_pageinfo.vaddr
        self.dtb: int = cffi_pageinfo.dtb
        self.paddr: int = cffi_pageinfo.paddr
        self.size: int = cffi_pageinfo.size


class PageEntries(NamedTuple):
    """The page-table entries that lead to a page: where each is, and its bits. 0 where a large page needs none.

    Source: ``page_info_t.x86_ia32e``; ``pml5e`` is ours.
    """

    pte_location: int = 0
    pte_value: int = 0
    pgd_location: int = 0
    pgd_value: int = 0
    pdpte_location: int = 0
    pdpte_value: int = 0
    pml4e_location: int = 0
    pml4e_value: int = 0
    pml5e_location: int = 0
    pml5e_value: int = 0


class PageLookup(NamedTuple):
    """The result of ``Libvmi.pagetable_lookup_extended``. Source: ``page_info_t``."""

    vaddr: int
    """The virtual address asked for."""
    paddr: int
    """Its physical address."""
    size: int
    """Bytes of the page."""
    pt: int
    """The page tables that were used."""
    x86_ia32e: PageEntries
    """The entries that lead to the page."""
    pm: int = PageMode.IA32E.value
    """Page mode of the translation."""
    naddr: int = 0
    nsize: int = 0
    npt: int = 0
    npm: int = 0
    """Nested translation, which is not used: all 0."""


class X86Registers:
    """The registers of one x86 virtual CPU, one attribute each, all 0 at first. Source: ``x86_registers_t``."""

    __slots__ = (
        "cr0",
        "cr2",
        "cr3",
        "cr4",
        "cs_arbytes",
        "dr7",
        "fs_base",
        "gs_base",
        "msr_efer",
        "msr_lstar",
        "msr_star",
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
        "rax",
        "rbp",
        "rbx",
        "rcx",
        "rdi",
        "rdx",
        "rflags",
        "rip",
        "rsi",
        "rsp",
        "sysenter_cs",
        "sysenter_eip",
        "sysenter_esp",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)


class Registers:
    """Registers of a virtual CPU, read and set like a dictionary by ``X86Reg``.

    ``Libvmi`` returns none, since no agent knows another CPU's registers; scripts may still build one.

    :param regs: an object with the registers under ``.x86``; default: all 0
    """

    def __init__(self, regs: Any = None) -> None:
        self.cffi_regs = regs or SimpleNamespace(x86=X86Registers())

    def __getitem__(self, index: X86Reg) -> int:
        """:raises RuntimeError: ``index`` is not an ``X86Reg``, or a register that is not kept"""
        return int(getattr(self.cffi_regs.x86, self._name(index)))

    def __setitem__(self, index: X86Reg, value: int) -> None:
        """:raises RuntimeError: ``index`` is not an ``X86Reg``, or a register that is not kept"""
        name = self._name(index)
        setattr(self.cffi_regs.x86, name, unsigned(value))

    def _name(self, index: X86Reg) -> str:
        if not isinstance(index, X86Reg):
            raise RuntimeError("Must be an X86Reg enum value")
        name = index.name.lower()
        if not hasattr(self.cffi_regs.x86, name):
            raise RuntimeError(f"Unknown field {name} in regs.x86")
        return name

    def __str__(self) -> str:
        """One ``name = 0x...`` a line."""
        regs = self.cffi_regs.x86
        return "\n".join(f"{name} = {getattr(regs, name):#x}" for name in dir(regs) if not name.startswith("_"))


def unsigned(value: int, bits: int = 64) -> int:
    """``value`` as C takes it. :raises OverflowError: out of range. :raises TypeError: not an integer."""
    number = operator.index(value)
    if number >> bits:
        raise OverflowError("can't convert negative int to unsigned" if number < 0 else "int too big to convert")
    return number


def signed_32(value: int) -> int:
    """``value`` as C's ``vmi_pid_t`` takes it. :raises OverflowError: out of range. :raises TypeError: not a number."""
    number = operator.index(value)
    if not -(1 << 31) <= number < 1 << 31:
        raise OverflowError(f"integer {number} does not fit '32-bit int'")
    return number
