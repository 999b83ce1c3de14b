"""LibVMI's Python API over a guest reached by vmishim: the class ``Libvmi`` and what belongs to it.

Names, positions, defaults and results are those of the libvmi 3.7.1 bindings; ``docs/libvmi-api.md`` lists every call
and
what becomes of it. Memory is read by a ``Target``: an agent in the guest, or the RAM file of an ordinary VM. This
module is
the one place where unreadable memory and unknown names (``FaultError``, ``KeyError``) turn into LibVMI's
``LibvmiError('VMI_FAILURE')``.
"""

from __future__ import annotations

import operator
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from struct import Struct
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from vmishim.errors import FAILURE, FaultError, LibvmiError, LinkError, UnknownNameError
from vmishim.guests import resolver
from vmishim.guests.domains import Domain, is_endpoint
from vmishim.guests.target import Target
from vmishim.kernel.profile import Profile
from vmishim.libvmi import config as configuration
from vmishim.libvmi.config import MEMBERS, Config, ConfiguredProfile
from vmishim.libvmi.constants import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    MSR,
    VMIOS,
    LibvmiInitError,
    PageMode,
    TranslateMechanism,
    VMIArch,
    VMIConfig,
    VMIInitData,
    VMIMode,
    VMIStatus,
    VMIWinVer,
    X86Reg,
)
from vmishim.libvmi.scalars import Scalars
from vmishim.libvmi.values import (
    AccessContext,
    PageEntries,
    PageInfo,
    PageLookup,
    Registers,
    signed_32,
    unsigned,
)
from vmishim.memory import pagetable
from vmishim.memory.pagetable import Translation
from vmishim.memory.reader import ADDRESSES, KERNEL, PAGE_SIZE, PHYSICAL

if TYPE_CHECKING:
    from vmishim.inject import InjectedProgram

__all__ = [
    "INIT_DOMAINID",
    "INIT_DOMAINNAME",
    "INIT_EVENTS",
    "MSR",
    "VMIOS",
    "AccessContext",
    "Libvmi",
    "LibvmiError",
    "LibvmiInitError",
    "LinkError",
    "PageInfo",
    "PageMode",
    "Registers",
    "TranslateMechanism",
    "VMIArch",
    "VMIConfig",
    "VMIInitData",
    "VMIMode",
    "VMIStatus",
    "VMIWinVer",
    "X86Reg",
    "check",
    "pause",
]

STRING_CHUNK = 256
"""Bytes asked for first when a string is read: a name or a path fits, and one request is enough."""
STRING_LIMIT = 16 << 20
"""Bytes after which a string without an end is refused. LibVMI reads on; a hostile guest could make that last."""
COUNT_LIMIT = 1 << 36
"""Bytes of one read that no host could hold; refused with ``MemoryError``, as the genuine bindings do."""
TASK_LIMIT = 1 << 22
"""Tasks that Linux can have (``PID_MAX_LIMIT``): a longer list is a loop."""
PAGES_LIMIT = 1 << 22
"""Pages that ``get_va_pages`` lists, 16 GiB of the smallest: a hostile guest's tables can go round in circles."""
PID_LIFETIME = 1.0
"""Seconds that a process's dtb is remembered outside of a hold, since numbers are used again."""

_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""``__START_KERNEL_map``: the kernel image is mapped here, from physical address ``phys_base`` on."""

_SWITCHED = 0x1FFF
"""Bits of CR3 that differ while a process runs: PCID, and which half of the pair that page-table isolation makes."""

_U64 = Struct("<Q")


def check(status: int | VMIStatus, error: str = FAILURE) -> None:
    """Raise ``LibvmiError(error)`` unless ``status`` is a success.

    Source: ``libvmi.libvmi.check`` of the Python bindings.
    """
    if VMIStatus(status) is not VMIStatus.SUCCESS:
        raise LibvmiError(error)


@contextmanager
def pause(vmi: Libvmi) -> Iterator[None]:
    """Hold the guest still for the time of a ``with`` block, whatever happens in it.

    Source: ``pause`` in ``examples/utils.py`` of the Python bindings, which most scripts carry a copy of.
    """
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()


class Libvmi(Scalars):
    """One guest, as LibVMI's Python bindings show it. Use it in a ``with`` statement, or call ``destroy``.

    :param domain: name of the guest, from ``domains.toml`` (see ``vmishim.guests.domains``)
    :param init_flags: ``INIT_DOMAINNAME``, or ``INIT_DOMAINID`` if ``domain`` is an ``id`` of ``domains.toml`` in
        digits;
        with ``INIT_EVENTS``, refused
    :param init_data: ``VMIInitData`` to strings; a ``KVMI_SOCKET`` such as ``tcp://10.0.0.5:5555`` overrules where the
        agent is
    :param config_mode: what ``config`` is; none is needed, a given one wins where it says something
    :param config: see ``VMIConfig``
    :param mode: taken and not needed, as the domain tells how it is reached
    :param partial: only physical memory until ``init_paging`` and ``init_os`` are called
    :raises LibvmiError: ``VM_NOT_FOUND``: no such domain; ``NO_CONFIG``, ``NO_CONFIG_ENTRY``, ``OS``: the configuration
        given cannot be used; ``EVENTS``: events were asked for
    :raises LinkError: the agent could not be reached, or is not the one that is enrolled

    Several threads can share one ``Libvmi``. Source: ``vmi_init_complete``, ``vmi_init``.
    """

    __slots__ = (
        "__weakref__",
        "_cells",
        "_dtbs",
        "_encrypted",
        "_holds",
        "_kpgd",
        "_lock",
        "_lower",
        "_names",
        "_os",
        "_pages",
        "_paging",
        "_profile",
        "_reader",
        "_symbols",
        "_target",
        "_upper",
        "_vmid",
        "_words",
        "opaque_vmi",
        "vmi",
    )  # fmt: skip

    def __init__(
        self,
        domain: str,
        init_flags: int = INIT_DOMAINNAME,
        init_data: Mapping[VMIInitData, str] | None = None,
        config_mode: VMIConfig = VMIConfig.GLOBAL_FILE_ENTRY,
        config: Any = None,
        mode: VMIMode | None = None,
        partial: bool = False,
    ) -> None:
        found = self._find(domain, init_flags, init_data, mode, partial)
        given = None if partial else configuration.read(config_mode, config, domain)
        socket = (init_data or {}).get(VMIInitData.KVMI_SOCKET, "")
        if found.agent and is_endpoint(socket):
            found = replace(found, agent=socket)
        target = resolver.current().reach(found)
        try:
            self._open(target, given, found.id, initialised=not partial)
        except BaseException:
            target.close()
            raise

    @classmethod
    def over(cls, target: Target, config: Config | None = None) -> Libvmi:
        """A ``Libvmi`` over a target that is there already, which it closes in the end. An extension of ours.

        :param config: a configuration that wins over what the guest says
        """
        vmi = cls.__new__(cls)
        vmi._open(target, config)
        return vmi

    @staticmethod
    def _find(
        domain: str, init_flags: int, init_data: Mapping[VMIInitData, str] | None, mode: VMIMode | None, partial: bool
    ) -> Domain:
        for kind, value in (init_data or {}).items():
            if not isinstance(kind.value, int) or not isinstance(value, str):
                raise RuntimeError("Passing anything else than a string as init_data value is not implemented")
        if partial and mode is not None and not isinstance(mode, VMIMode):
            raise RuntimeError("mode is not an instance of VMIMode")
        if not init_flags & (INIT_DOMAINNAME | INIT_DOMAINID):
            if partial:
                raise RuntimeError("Partial init, init_flags must be either INIT_DOMAINAME or INIT_DOMAINID")
            raise TypeError("init_flags must hold INIT_DOMAINNAME or INIT_DOMAINID")
        domain.encode()
        if init_flags & INIT_EVENTS:
            raise LibvmiError("EVENTS: vmishim has no events; leave out INIT_EVENTS")
        return resolver.current().find(domain, not init_flags & INIT_DOMAINNAME)

    def _open(self, target: Target, given: Config | None, vmid: int = 0, initialised: bool = True) -> None:
        self._vmid = vmid
        self._lock = threading.Lock()
        self._holds = 0
        self._target = target
        self._reader = target.reader
        self._kpgd = 0
        self._encrypted = -1
        self._dtbs: dict[int, tuple[int, float]] = {}
        self._pages: dict[tuple[int, int], int] = {}
        self._symbols: dict[tuple[int, int, str], int] = {}
        self._names: dict[tuple[int, int, int], str] = {}
        self._lower = self._upper = 0
        self._paging = self._os = False
        self._cells: dict[int, bytes] = {}
        self._words: dict[int, int] = {}
        self.vmi: Any = target
        self.opaque_vmi: Any = target
        self._configure(given)
        if initialised:
            self._initialise()
        _living.add(self)

    def _configure(self, given: Config | None) -> None:
        profile = self._target.profile
        self._profile: Profile = profile if given is None else ConfiguredProfile(given, profile)
        if given is not None:
            self._kpgd = given.numbers.get("kpgd", 0)

    def _initialise(self) -> None:
        self._paging = self._os = True
        self._cells, self._words = self._target.cells, self._target.words
        # Between these an address is not canonical. LibVMI ignores the bits above those that page tables translate.
        self._lower = 1 << (12 + 9 * self._profile.levels - 1)
        self._upper = (1 << 64) - self._lower

    def __enter__(self) -> Libvmi:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        return f"<Libvmi of {self._target.name!r}, Linux {self._target.profile.release}>"

    def init_paging(self, flags: int) -> PageMode:
        """After a partial init: make page tables usable (``pagetable_lookup`` and ``PROCESS_DTB``).

        :param flags: not used
        :returns: the guest's page mode

        Source: ``vmi_init_paging``.
        """
        unsigned(flags)
        self._paging = True
        return PageMode.IA32E

    def init_os(self, config_mode: VMIConfig = VMIConfig.GLOBAL_FILE_ENTRY, config: Any = None) -> tuple[VMIOS, int]:
        """After a partial init: make processes, symbols and kernel addresses usable.

        :param config_mode: what ``config`` is, as for ``Libvmi`` itself
        :param config: a configuration, which wins over what the guest says
        :returns: (operating system, value of a ``LibvmiInitError``); if the configuration given cannot be used,
            ``UNKNOWN`` and what is wrong, with a warning that says more
        :raises LinkError: the guest could not be asked

        Source: ``vmi_init_os``.
        """
        try:
            given = configuration.read(config_mode, config, self._target.name)
            self._configure(given)
        except LinkError:
            raise
        except LibvmiError as error:
            warnings.warn(str(error), stacklevel=2)
            return VMIOS.UNKNOWN, LibvmiInitError[str(error).partition(":")[0]].value
        self._initialise()
        return VMIOS.LINUX, LibvmiInitError.NONE.value

    def destroy(self) -> None:
        """Let go of the guest; end every pause. A second call does nothing.

        Source: ``vmi_destroy``.
        """
        if self.vmi is None:
            return
        self.vmi = self.opaque_vmi = None
        self._cells, self._words = {}, {}
        with self._lock:
            held, self._holds = self._holds, 0
        try:
            if held:
                self._target.release()
        finally:
            self._target.close()

    def inject(
        self,
        program: str | bytes | Path,
        *,
        name: str = "",
        headers: Path | None = None,
        vmlinux: Path | None = None,
    ) -> InjectedProgram:
        """Load an eBPF program of your own into the guest's agent; ``run()`` on the result gives what it read.

        Not part of LibVMI: see ``docs/injection.md``, and `vmishim.inject.inject` for parameters and errors.
        """
        from vmishim.inject import inject  # with what compiles, which scripts that only read can do without

        return inject(self._target, program, name=name, headers=headers, vmlinux=vmlinux)

    # Reading. Everything that is not in a cell goes through _read, where a fault gets LibVMI's name.

    def _read(self, address: int, count: int, space: int, text: bool = False) -> bytes:
        if type(address) is not int or address >> 64:
            address = unsigned(address)
        if space == PHYSICAL:
            return self._physical(address, count)
        if self._lower <= address < self._upper:
            address = pagetable.canonical(address, self._profile.levels)
        return self._reader.read(address, count, space, text=text)

    def _bytes(self, address: int, count: int, space: int) -> tuple[bytes, int]:
        count = operator.index(count)
        if count < 0:
            raise ValueError("negative array length")
        if count >> 63:
            raise OverflowError("array size would overflow a ssize_t")
        if count > COUNT_LIMIT:
            raise MemoryError(f"a read of {count} bytes")
        data = self._read(address, count, space) if count else b""
        return data, len(data)

    def _string(self, address: int, space: int) -> str:
        """Bytes up to the first NUL, page by page like LibVMI: a hole ends the string, unless it starts with one."""
        address = unsigned(address)
        text = bytearray()
        chunk = STRING_CHUNK
        while len(text) < STRING_LIMIT:
            count = min(chunk, PAGE_SIZE - address % PAGE_SIZE)
            chunk = PAGE_SIZE
            try:
                data = self._read(address, count, space, text=True)
            except FaultError:
                if not text:
                    raise
                return text.decode()
            end = data.find(0)
            if end >= 0:
                return (text + data[:end]).decode()
            text += data
            address = (address + count) % (1 << 64)
        raise LibvmiError(FAILURE)

    def _space(self, pid: int) -> int:
        """What reads of a process's memory are relative to. :raises LibvmiError: no such process."""
        if not self._os:
            raise LibvmiError(FAILURE)
        if pid == 0:
            operator.index(pid)  # 0.0 is no pid
            return KERNEL
        return self._tables(self.pid_to_dtb(pid))

    def _tables(self, dtb: int) -> int:
        """``dtb`` without PCID and flags, if there can be page tables."""
        root = unsigned(dtb) & pagetable.FRAME
        if not root or not self._paging:
            raise FaultError(root)
        return root

    def _place(self, ctx: AccessContext) -> tuple[int, int]:
        """(address, space) of an ``AccessContext``."""
        mechanism = ctx.tr_mechanism
        if mechanism is TranslateMechanism.NONE:
            return ctx.addr, PHYSICAL
        if mechanism is TranslateMechanism.KERNEL_SYMBOL:
            return self.translate_ksym2v(ctx.ksym), KERNEL
        if mechanism is TranslateMechanism.PROCESS_DTB:
            return ctx.addr, self._tables(ctx.dtb)
        return ctx.addr, self._space(ctx.pid)

    def read(self, ctx: AccessContext, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes where ``ctx`` says.

        :returns: (the bytes, how many)
        :raises LibvmiError: ``VMI_FAILURE``: some of it is not mapped, or the symbol or process does not exist
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read``.
        """
        return self._bytes(*_before(self._place(ctx), count))

    def read_va(self, vaddr: int, pid: int, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes at the virtual address ``vaddr`` of a process.

        :param vaddr: virtual address; bits above the translated ones are ignored, as in LibVMI
        :param pid: the process whose page tables are used; 0 is the kernel
        :param count: bytes; 0 gives ``(b"", 0)``
        :returns: (the bytes, how many), NULs included
        :raises LibvmiError: ``VMI_FAILURE``: some of it is not mapped, or there is no such process
        :raises LinkError: the guest could not be asked
        :raises ValueError: ``count`` is negative

        Source: ``vmi_read_va``.
        """
        if pid == 0:
            cell = self._cells.get(vaddr)
            if cell is not None and 0 <= count <= len(cell):
                return cell[:count], count
        return self._bytes(vaddr, count, self._space(pid))

    def read_ksym(self, symbol: str, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes at a kernel symbol, and cut them at the first NUL.

        :returns: (the bytes before the first NUL, ``count``): the number is that of the bytes read, as in LibVMI's
            bindings
        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped

        Source: ``vmi_read_ksym``.
        """
        data, read = self._bytes(self.translate_ksym2v(symbol), count, KERNEL)
        return data.split(b"\0", 1)[0], read

    def read_pa(self, paddr: int, count: int, padding: bool = False) -> tuple[bytes, int]:
        """Read ``count`` bytes at the guest physical address ``paddr``.

        :param padding: fill with NULs what cannot be read, instead of failing
        :returns: (the bytes, how many of them were read)
        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there, and ``padding`` is not set

        Source: ``vmi_read_pa``.
        """
        try:
            return self._bytes(paddr, count, PHYSICAL)
        except FaultError as fault:
            if not padding:
                raise
            return fault.data.ljust(count, b"\0"), len(fault.data)

    def read_str(self, ctx: AccessContext) -> str:
        """Read a NUL-terminated string where ``ctx`` says.

        :returns: the text before the NUL, or before the first page that cannot be read
        :raises LibvmiError: ``VMI_FAILURE``: its first byte cannot be read, or it has no end within 16 MiB
        :raises UnicodeDecodeError: it is not UTF-8

        Source: ``vmi_read_str``.
        """
        return self._string(*self._place(ctx))

    def read_str_va(self, vaddr: int, pid: int) -> str:
        """Read a NUL-terminated string at the virtual address ``vaddr`` of process ``pid`` (0: the kernel).

        :returns: the text before the NUL, or before the first page that cannot be read
        :raises LibvmiError: ``VMI_FAILURE``: its first byte cannot be read, or it has no end within 16 MiB
        :raises UnicodeDecodeError: it is not UTF-8

        Source: ``vmi_read_str_va``.
        """
        if pid == 0:
            cell = self._cells.get(vaddr)
            if cell is not None:
                end = cell.find(0)
                if end >= 0:
                    return cell[:end].decode()
        return self._string(vaddr, self._space(pid))

    def read_str_pa(self, paddr: int) -> str:
        """Read a NUL-terminated string at the guest physical address ``paddr``; as ``read_str_va``.

        Source: ``vmi_read_str_pa``.
        """
        return self._string(paddr, PHYSICAL)

    def read_unicode_str(self, ctx: AccessContext) -> NoReturn:
        """Refused: only Windows has such strings.

        :raises LibvmiError: ``VMI_FAILURE``, as LibVMI does for a Linux guest

        Source: ``vmi_read_unicode_str``.
        """
        ctx.to_ffi()
        raise LibvmiError(FAILURE)

    def read_unicode_str_va(self, vaddr: int, pid: int) -> NoReturn:
        """Refused: only Windows has such strings.

        :raises LibvmiError: ``VMI_FAILURE``, as LibVMI does for a Linux guest

        Source: ``vmi_read_unicode_str_va``.
        """
        unsigned(vaddr), signed_32(pid)
        raise LibvmiError(FAILURE)

    def free_unicode_str(self, unicode_str: Any) -> NoReturn:
        """Refused: ``read_unicode_str`` gives none that could be freed.

        :raises TypeError: always

        Source: ``vmi_free_unicode_str``.
        """
        raise TypeError(f"{type(unicode_str).__name__} is no unicode string of LibVMI")

    # Translation.

    def _physical(self, address: int, count: int) -> bytes:
        # No kernel has memory above 2^46, or 2^52 with five levels (MAX_PHYSMEM_BITS), whatever a broken table says.
        if address >> (46 if self._profile.levels == 4 else 52):
            raise FaultError(address)
        return self._reader.read(address, count, PHYSICAL)

    def _encryption(self) -> int:
        """Bits of a page-table entry that tell of encryption, and are no address."""
        if self._encrypted < 0:
            mask = 0
            # AMD SEV sets its C-bit in every private entry, Intel TDX its bit in every shared one.
            for name in ("sme_me_mask", "cc_mask"):
                try:
                    mask |= _U64.unpack(self._reader.read(self._profile.symbol(name), 8))[0]
                except (KeyError, FaultError):
                    continue
            self._encrypted = mask
        return self._encrypted

    def _translate(self, dtb: int, vaddr: int) -> Translation:
        root, vaddr, levels = self._tables(dtb), unsigned(vaddr), self._profile.levels
        physical, size, values = self._target.lookup(root, pagetable.canonical(vaddr, levels))
        if not size:
            raise FaultError(vaddr)
        entries = pagetable.entries(root, vaddr, values, size, levels, self._encryption())
        return Translation(vaddr, physical, size, entries)

    def _kernel_tables(self) -> int:
        """Physical address of the kernel's page tables (LibVMI's ``kpgd``)."""
        if not self._os:
            raise LibvmiError(FAILURE)
        if not self._kpgd:
            base = _U64.unpack(self._read(self._symbol("phys_base"), 8, KERNEL))[0]
            try:
                top = self._profile.symbol("init_top_pgt")
            except KeyError:  # called so before Linux 4.13
                top = self._symbol("init_level4_pgt")
            self._kpgd = (top - _KERNEL_MAP + base) % (1 << 64)
        return self._kpgd

    def translate_kv2p(self, vaddr: int) -> int:
        """Physical address of a kernel virtual address.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_translate_kv2p``.
        """
        return self.pagetable_lookup(self._kernel_tables(), vaddr)

    def translate_uv2p(self, vaddr: int, pid: int) -> int:
        """Physical address of a virtual address of process ``pid``.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped, or there is no such process

        Source: ``vmi_translate_uv2p``.
        """
        try:
            return self.pagetable_lookup(self.pid_to_dtb(pid), vaddr)
        except FaultError:
            # The process may have got new page tables (execve): look once more, as LibVMI does.
            if self._dtbs.pop(pid, None) is None:
                raise
        return self.pagetable_lookup(self.pid_to_dtb(pid), vaddr)

    def _symbol(self, name: str) -> int:
        try:
            return self._profile.symbol(name)
        except KeyError:
            raise UnknownNameError(name) from None

    def translate_ksym2v(self, symbol: str) -> int:
        """Virtual address of a kernel symbol, KASLR applied.

        :raises LibvmiError: ``VMI_FAILURE``: this kernel has no such symbol

        Source: ``vmi_translate_ksym2v``.
        """
        if self._symbols:
            known = self._symbols.get((0, 0, symbol))
            if known is not None:
                return known
        symbol.encode()
        if not self._os:
            raise LibvmiError(FAILURE)
        return self._symbol(symbol)

    def translate_sym2v(self, ctx: AccessContext, symbol: str) -> int:
        """Virtual address of a symbol that a shared object exports, in a process that has it mapped.

        :param ctx: ``addr``: where the object's ELF header is mapped; ``PROCESS_PID`` or ``PROCESS_DTB``
        :raises LibvmiError: ``VMI_FAILURE``: no ELF image there, or no such symbol in it

        Source: ``vmi_translate_sym2v``.
        """
        symbol.encode()
        dtb, image = self._image(ctx)
        known = self._symbols.get((ctx.addr, dtb, symbol))
        if known is not None:
            return known
        for name, value in image:
            if name == symbol:
                return (ctx.addr + value) % (1 << 64)
        raise LibvmiError(FAILURE)

    def translate_v2sym(self, ctx: AccessContext, addr: int) -> str:
        """Name of the symbol that a shared object exports at ``addr`` bytes from its start.

        :param ctx: as for ``translate_sym2v``
        :param addr: relative to ``ctx.addr``
        :raises LibvmiError: ``VMI_FAILURE``: no ELF image there, or nothing exported at ``addr``

        Source: ``vmi_translate_v2sym``.
        """
        unsigned(addr)
        dtb, image = self._image(ctx)
        known = self._names.get((ctx.addr, dtb, addr))
        if known is not None:
            return known
        for name, value in image:
            if value == addr:
                return name
        raise LibvmiError(FAILURE)

    def _image(self, ctx: AccessContext) -> tuple[int, Iterator[tuple[str, int]]]:
        """(dtb, exported symbols) of the ELF image at ``ctx.addr``. :raises LibvmiError: not a virtual context."""
        from vmishim.memory import elf

        dtb = self._context_tables(ctx)
        space = self._place(ctx)[1]

        return dtb, elf.exports(lambda address, count: self._reader.read(address, count, space), ctx.addr)

    def _context_tables(self, ctx: AccessContext) -> int:
        if ctx.tr_mechanism is TranslateMechanism.PROCESS_PID:
            return self.pid_to_dtb(ctx.pid)
        if ctx.tr_mechanism is TranslateMechanism.PROCESS_DTB:
            return unsigned(ctx.dtb)
        raise LibvmiError(FAILURE)

    def translate_v2ksym(self, ctx: AccessContext, addr: int) -> str:
        """Name of the kernel symbol that starts exactly at ``addr``.

        :param ctx: ``PROCESS_PID`` with pid 0, or ``PROCESS_DTB`` with the kernel's page tables
        :param addr: kernel virtual address
        :raises LibvmiError: ``VMI_FAILURE``: no symbol starts there, or ``ctx`` is not the kernel

        Source: ``vmi_translate_v2ksym``.
        """
        dtb = self._context_tables(ctx)
        known = self._names.get((ctx.addr, dtb, addr))
        if known is not None:
            return known
        if dtb != self._kernel_tables():
            raise LibvmiError(FAILURE)
        try:
            return self._profile.symbol_at(unsigned(addr))
        except KeyError:
            raise LibvmiError(FAILURE) from None

    def pid_to_dtb(self, pid: int) -> int:
        """Physical address of a process's page tables; of the kernel's for pid 0.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such process

        Source: ``vmi_pid_to_dtb``. Found by walking the guest's task list, and remembered for a second or a pause.
        """
        pid = signed_32(pid)
        if pid == 0:
            return self._kernel_tables()
        known = self._dtbs.get(pid)
        if known is not None and (self._holds or time.monotonic() < known[1]):
            return known[0]
        mm = self._offset("linux_mm")
        for task in self._tasks():
            if self.read_32_va(_sum(task, self._offset("linux_pid")), 0) == pid:
                # A kernel thread has no memory of its own and borrows one: active_mm, the next pointer.
                memory = self.read_addr_va(_sum(task, mm), 0) or self.read_addr_va(_sum(task, mm + 8), 0)
                dtb = self._direct(self.read_addr_va(_sum(memory, self._offset("linux_pgd")), 0)) if memory else 0
                self._dtbs[pid] = dtb, time.monotonic() + PID_LIFETIME
                return dtb
        raise LibvmiError(FAILURE)

    def dtb_to_pid(self, dtb: int) -> int:
        """Number of the first process that has its page tables at the physical address ``dtb``.

        :raises LibvmiError: ``VMI_FAILURE``: no process has

        Source: ``vmi_dtb_to_pid``. The bits for PCID and page-table isolation are ignored.
        """
        dtb = unsigned(dtb)
        if not dtb & ~_SWITCHED:
            return 0  # LibVMI takes the idle task's missing memory for page tables at 0
        mm, pgd, number = (self._offset(name) for name in ("linux_mm", "linux_pgd", "linux_pid"))
        for task in self._tasks():
            memory = self.read_addr_va(_sum(task, mm), 0)
            if memory and self._direct(self.read_addr_va(_sum(memory, pgd), 0)) in (dtb, dtb & ~_SWITCHED):
                return self.read_32_va(_sum(task, number), 0)
        raise LibvmiError(FAILURE)

    def _tasks(self) -> Iterator[int]:
        """Address of every ``task_struct`` in the guest's list, ``init_task`` first."""
        first = self.get_offset("linux_init_task")
        offset = self._offset("linux_tasks")
        task = first
        for _ in range(TASK_LIMIT):
            yield task
            task = _sum(self.read_addr_va(_sum(task, offset), 0), -offset)
            if task == first:
                return
        raise LibvmiError(FAILURE)

    def _direct(self, vaddr: int) -> int:
        """Physical address of kernel memory that is allocated by pages, such as a page table: mostly a subtraction."""
        offset = vaddr - self._profile.page_offset
        if self._profile.page_offset and 0 <= offset < self._profile.memory_size:
            return offset
        return self.translate_kv2p(vaddr)

    def pagetable_lookup(self, dtb: int, vaddr: int) -> int:
        """Physical address of ``vaddr`` by the page tables at ``dtb``.

        :param dtb: physical address of the top table, as in CR3
        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_pagetable_lookup``. Pages of 4 KiB, 2 MiB and 1 GiB, four and five levels.
        """
        if self._pages:
            known = self._pages.get((dtb, vaddr & -PAGE_SIZE))
            if known is not None:
                return known | vaddr % PAGE_SIZE
        return self._translate(dtb, vaddr).physical

    def pagetable_lookup_extended(self, dtb: int, vaddr: int) -> PageLookup:
        """As ``pagetable_lookup``, with the page's size and the page-table entries on the way.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped

        Source: ``vmi_pagetable_lookup_extended``.
        """
        found = self._translate(dtb, vaddr)
        levels = ("pml5e", "pml4e", "pdpte", "pgd", "pte")[-self._profile.levels :]
        entries = {}
        for level, entry in zip(levels, found.entries, strict=False):  # a large page ends early
            entries[f"{level}_location"], entries[f"{level}_value"] = entry
        return PageLookup(vaddr, found.physical, found.size, unsigned(dtb), PageEntries(**entries))

    def get_va_pages(self, dtb: int) -> list[PageInfo]:
        """Every page that the page tables at ``dtb`` map, kernel half included, from the highest address down.

        :raises LibvmiError: ``VMI_FAILURE``: more than ``PAGES_LIMIT``; never for tables that cannot be read: they map
            nothing

        Source: ``vmi_get_va_pages``. The genuine binding raises ``AttributeError``.
        """
        pages = pagetable.pages(self._physical, unsigned(dtb), self._profile.levels, self._encryption())
        found = list(islice(pages, PAGES_LIMIT + 1))
        if len(found) > PAGES_LIMIT:
            raise LibvmiError(FAILURE)
        return [
            PageInfo(SimpleNamespace(vaddr=page.address, dtb=dtb, paddr=page.physical, size=page.size))
            for page in reversed(found)
        ]

    # Writing, which nobody may.

    def _refuse_write(
        self,
        value: int,
        size: int,
        ctx: AccessContext | None = None,
        symbol: str | None = None,
        address: int = 0,
        pid: int = 0,
    ) -> NoReturn:
        """Check arguments as a write would, then refuse it."""
        # The genuine bindings write a 0 for None.
        if value is not None and operator.index(value) >> 8 * size:
            raise OverflowError(f"integer {value} does not fit into {size} bytes")
        self._refuse_buffer(bytes(size), ctx, symbol, address, pid)
        raise LibvmiError(FAILURE)

    def _refuse_buffer(
        self, buffer: Any, ctx: AccessContext | None = None, symbol: str | None = None, address: int = 0, pid: int = 0
    ) -> int:
        """Check arguments as a write would, then refuse it, unless there is nothing to write."""
        length = memoryview(buffer).nbytes
        if ctx is not None:
            self._place(ctx)
        if symbol is not None:
            self.translate_ksym2v(symbol)
        unsigned(address), signed_32(pid)
        if length:
            raise LibvmiError(FAILURE)
        return 0

    def write(self, ctx: AccessContext, buffer: bytes) -> int:
        """Refused: vmishim reads only.

        :returns: 0 for an empty ``buffer``
        :raises LibvmiError: ``VMI_FAILURE`` for any other, as LibVMI's file driver does
        :raises TypeError: ``buffer`` holds no bytes

        Source: ``vmi_write``.
        """
        return self._refuse_buffer(buffer, ctx=ctx)

    def write_ksym(self, symbol: str, buffer: bytes) -> int:
        """Refused, as ``write``. Source: ``vmi_write_ksym``; the genuine binding is a ``TypeError`` for any string."""
        return self._refuse_buffer(buffer, symbol=symbol)

    def write_va(self, vaddr: int, pid: int, buffer: bytes) -> int:
        """Refused, as ``write``. Source: ``vmi_write_va``."""
        return self._refuse_buffer(buffer, address=vaddr, pid=pid)

    def write_pa(self, paddr: int, buffer: bytes) -> int:
        """Refused, as ``write``. Source: ``vmi_write_pa``."""
        return self._refuse_buffer(buffer, address=paddr)

    # State.

    def get_library_arch(self) -> VMIArch:
        """What the library is for: x86-64 guests. Source: ``vmi_get_library_arch``."""
        return VMIArch.VMI_ARCH_X86_64

    def get_rekall_path(self) -> str | None:
        """Path of the JSON profile in use, None without one. Source: ``vmi_get_rekall_path``."""
        return getattr(self._profile, "profile_path", None)

    def get_name(self) -> str:
        """The domain's name. Source: ``vmi_get_name``."""
        return self._target.name

    def get_vmid(self) -> int:
        """The domain's number: ``id`` of ``domains.toml``, 0 without one. Source: ``vmi_get_vmid``."""
        return self._vmid

    def get_access_mode(self, domain: str, init_flags: int, init_data: Any) -> VMIMode:
        """How a domain would be reached: ``FILE`` for a RAM file, else ``KVM``, since the guest lives.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such domain
        :raises RuntimeError: ``init_flags`` has neither ``INIT_DOMAINNAME`` nor ``INIT_DOMAINID``

        Source: ``vmi_get_access_mode``.
        """
        if not init_flags & (INIT_DOMAINNAME | INIT_DOMAINID):
            raise RuntimeError("init_flags must be either INIT_DOMAINAME or INIT_DOMAINID")
        domain.encode()
        try:
            found = resolver.current().find(domain, not init_flags & INIT_DOMAINNAME)
        except LibvmiError:
            raise LibvmiError(FAILURE) from None
        return VMIMode.FILE if found.ramfile else VMIMode.KVM

    def get_page_mode(self, vcpu: int) -> PageMode:
        """How page tables are built: ``IA32E``; ``UNKNOWN`` after a partial init. Source: ``vmi_get_page_mode``."""
        unsigned(vcpu)
        return PageMode.IA32E if self._paging else PageMode.UNKNOWN

    def get_address_width(self) -> int:
        """Bytes of an address: 8; 0 after a partial init. Source: ``vmi_get_address_width``."""
        return 8 if self._paging else 0

    def get_ostype(self) -> VMIOS:
        """What runs in the guest: ``LINUX``; ``UNKNOWN`` after a partial init. Source: ``vmi_get_ostype``."""
        return VMIOS.LINUX if self._os else VMIOS.UNKNOWN

    def get_winver(self) -> VMIWinVer:
        """``OS_WINDOWS_NONE``: not Windows. Source: ``vmi_get_winver``."""
        return VMIWinVer.OS_WINDOWS_NONE

    def get_winver_str(self) -> str:
        """The name of that: ``VMI_OS_WINDOWS_NONE``. Source: ``vmi_get_winver_str``."""
        return "VMI_OS_WINDOWS_NONE"

    def get_winver_manual(self, kdvb_pa: int) -> VMIWinVer:
        """``OS_WINDOWS_NONE``, whatever the address. Source: ``vmi_get_winver_manual``."""
        unsigned(kdvb_pa)
        return VMIWinVer.OS_WINDOWS_NONE

    def _offset(self, name: str) -> int:
        try:
            return self._profile.member(*MEMBERS[name]).offset
        except KeyError:
            raise UnknownNameError(name) from None

    def get_offset(self, offset_name: str) -> int:
        """An offset or address by LibVMI's name for it.

        :param offset_name: ``linux_tasks``, ``linux_mm``, ``linux_pid``, ``linux_name``, ``linux_pgd`` (bytes from the
            structure's start), ``linux_kaslr`` (bytes), ``linux_init_task`` (virtual address), ``kpgd`` (physical
            address)
        :raises LibvmiError: ``VMI_FAILURE``: LibVMI has no such name

        Source: ``vmi_get_offset``.
        """
        offset_name.encode()
        if not self._os:
            raise LibvmiError(FAILURE)
        if offset_name == "linux_kaslr":
            return self._profile.kaslr_offset
        if offset_name == "linux_init_task":
            return self._symbol("init_task")
        if offset_name == "kpgd":
            return self._kernel_tables()
        return self._offset(offset_name)

    def get_kernel_struct_offset(self, struct_name: str, member: str) -> int:
        """Bytes from the start of a kernel structure to one of its members.

        :param member: may be dotted (``"f_path.dentry"``); anonymous members are seen through
        :raises LibvmiError: ``VMI_FAILURE``: this kernel has no such structure or member

        Source: ``vmi_get_kernel_struct_offset``, which needs a JSON profile; here the guest itself tells.
        """
        struct_name.encode(), member.encode()
        if not self._os:
            raise LibvmiError(FAILURE)
        try:
            return self._profile.member(struct_name, member).offset
        except KeyError:
            raise UnknownNameError(f"{struct_name}.{member}") from None

    def get_memsize(self) -> int:
        """Bytes of guest memory, up to the end of the highest. Source: ``vmi_get_memsize``."""
        return self._profile.memory_size

    def get_max_physical_address(self) -> int:
        """End of the highest guest memory, bytes. Source: ``vmi_get_max_physical_address``."""
        return self._profile.memory_size

    def get_num_vcpus(self) -> int:
        """Virtual CPUs that are online; 0 when unknown. Source: ``vmi_get_num_vcpus``."""
        return self._profile.vcpus

    def request_page_fault(self, vcpu: int, vaddr: int, error_code: int) -> NoReturn:
        """Refused: the guest is not to be changed.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_request_page_fault``.
        """
        unsigned(vcpu), unsigned(vaddr), unsigned(error_code)
        raise LibvmiError(FAILURE)

    def get_vcpureg(self, reg: int, vcpu: int) -> int:
        """A register of a virtual CPU: only CR3 is known, as the kernel's page tables, like in LibVMI's file driver.

        :param reg: value of an ``X86Reg``
        :raises LibvmiError: ``VMI_FAILURE``: any other register

        Source: ``vmi_get_vcpureg``.
        """
        if unsigned(reg) == X86Reg.CR3.value:
            unsigned(vcpu)
            return self._kernel_tables()
        unsigned(vcpu)
        raise LibvmiError(FAILURE)

    def get_vcpuregs(self, vcpu: int) -> Registers:
        """Refused: no agent knows another CPU's registers.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI's file driver does

        Source: ``vmi_get_vcpuregs``.
        """
        unsigned(vcpu)
        raise LibvmiError(FAILURE)

    def set_vcpureg(self, value: int, reg: int, vcpu: int) -> NoReturn:
        """Refused: the guest is not to be changed.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_set_vcpureg``.
        """
        unsigned(value), unsigned(reg), unsigned(vcpu)
        raise LibvmiError(FAILURE)

    def set_vcpuregs(self, regs: Registers, vcpu: int) -> NoReturn:
        """Refused: the guest is not to be changed.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_set_vcpuregs``.
        """
        operator.attrgetter("cffi_regs")(regs), unsigned(vcpu)
        raise LibvmiError(FAILURE)

    def pause_vm(self) -> None:
        """Hold the guest still: until ``resume_vm``, everything read is as of one hold. Pauses nest.

        The guest runs on, unless its entry in ``domains.toml`` says ``freeze``: then its agent stops the monitored
        system, see docs/freshness.md.

        :raises LinkError: the guest could not be asked, or its agent does not stop it; nothing is paused then

        Source: ``vmi_pause_vm``.
        """
        with self._lock:
            if self._holds == 0:
                self._dtbs = {pid: kept for pid, kept in self._dtbs.items() if kept[1] == _FOREVER}
                self._target.hold()
            self._holds += 1

    def resume_vm(self) -> None:
        """End one ``pause_vm``; the last one lets the guest go on. Without a pause, nothing happens.

        :raises LinkError: the guest could not be asked

        Source: ``vmi_resume_vm``.
        """
        with self._lock:
            if self._holds:
                self._holds -= 1
                if self._holds == 0:
                    self._target.release()

    # Caches. What is added is believed until it is flushed.

    def v2pcache_flush(self, dtb: int = 0) -> None:
        """Forget translations: those added for ``dtb``, and all page tables that were read.

        :param dtb: page tables; 0, and 2**64 - 1 as LibVMI has it, are all of them

        Source: ``vmi_v2pcache_flush``.
        """
        dtb = 0 if unsigned(dtb) == (1 << 64) - 1 else dtb
        self._pages = {key: page for key, page in self._pages.items() if dtb and key[0] != dtb}
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
        """Believe that ``rva`` bytes from ``base_addr`` in process ``pid`` there is ``symbol``.

        Source: ``vmi_rvacache_add``; the genuine binding is a ``TypeError``.
        """
        symbol.encode()
        self._names[unsigned(base_addr), self.pid_to_dtb(pid), unsigned(rva)] = symbol

    def pidcache_flush(self) -> None:
        """Forget which page tables belong to which process. Source: ``vmi_pidcache_flush``."""
        self._dtbs = {}

    def pidcache_add(self, pid: int, dtb: int) -> None:
        """Believe that process ``pid`` has its page tables at ``dtb``. Source: ``vmi_pidcache_add``."""
        self._dtbs[signed_32(pid)] = unsigned(dtb), _FOREVER

    def pagecache_flush(self) -> None:
        """Forget all memory that was read: the next read asks the guest. Source: ``vmi_pagecache_flush``."""
        self._target.flush()

    # Events and second-level page tables, which need a hypervisor.

    def register_event(self, event: Any) -> NoReturn:
        """Refused: there are no events without a hypervisor's help.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI without ``INIT_EVENTS``

        Source: ``vmi_register_event``.
        """
        event.vmi = self
        event.to_cffi()
        raise LibvmiError(FAILURE)

    def clear_event(self, event: Any) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_clear_event``."""
        event.to_cffi()
        raise LibvmiError(FAILURE)

    def listen(self, timeout: int) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_events_listen``."""
        unsigned(timeout, 32)
        raise LibvmiError(FAILURE)

    def are_events_pending(self) -> int:
        """-1: there are no events. Source: ``vmi_are_events_pending``."""
        return -1

    def toggle_single_step_vcpu(self, event: Any, vcpu: int, enabled: bool) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_toggle_single_step_vcpu``."""
        event.to_cffi()
        unsigned(vcpu, 32)
        raise LibvmiError(FAILURE)

    def slat_get_domain_state(self) -> NoReturn:
        """Refused: second-level page tables are the hypervisor's.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI's file driver does

        Source: ``vmi_slat_get_domain_state``.
        """
        raise LibvmiError(FAILURE)

    def slat_create(self) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_create``."""
        raise LibvmiError(FAILURE)

    def slat_destroy(self, slat_idx: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_destroy``."""
        unsigned(slat_idx, 16)
        raise LibvmiError(FAILURE)

    def slat_switch(self, slat_idx: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_switch``."""
        unsigned(slat_idx, 16)
        raise LibvmiError(FAILURE)

    def slat_change_gfn(self, slat_idx: int, old_gfn: int, new_gfn: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_change_gfn``."""
        unsigned(slat_idx, 16), unsigned(old_gfn), unsigned(new_gfn)
        raise LibvmiError(FAILURE)


_FOREVER = float("inf")


def _sum(address: int, offset: int) -> int:
    """An address and an offset, as the kernel adds them, whatever the guest says they are."""
    return (address + offset) % ADDRESSES


def _before(place: tuple[int, int], count: int) -> tuple[int, int, int]:
    return place[0], count, place[1]


_living: weakref.WeakSet[Libvmi] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: another thread of the parent may have been about to pause."""
    for vmi in list(_living):
        vmi._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
