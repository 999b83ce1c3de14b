"""What ``libvmi.so.0`` (`compat/capi/`) calls: LibVMI's C library as far as it is not in C.

A ``vmi_instance_t`` has a `Guest`. A method returns a number, bytes, or None for a failure that needs no words; what it
raises becomes ``VMI_FAILURE`` in C, after `Guest.failed` has told it. Strings are bytes, as C has them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from vmishim import script
from vmishim.errors import FAILURE, FaultError, LibvmiError, LinkError, UnknownNameError
from vmishim.foreign import printable
from vmishim.libvmi import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    AccessContext,
    Libvmi,
    LibvmiInitError,
    TranslateMechanism,
    VMIConfig,
    VMIInitData,
)
from vmishim.libvmi.config import PATHS, WORDS
from vmishim.libvmi.profiles import JsonProfile
from vmishim.memory.reader import PHYSICAL
from vmishim.version import __version__

ABI, EVENTS, STATS = "VMISHIM_LIBVMI_ABI", "VMISHIM_LIBVMI_EVENTS", "VMISHIM_LIBVMI_STATS"
"""Environment variables: the ABI that the program was compiled for; ``poll`` to let it wait for events, which never
come; anything to print at the end what reading the guest took."""
ABIS = ("0.14", "0.15")
TEXTS = frozenset({*PATHS, *WORDS, "os_type"})
"""Settings of a ``GHashTable`` whose values are strings; of all others they are pointers to ``uint64_t``."""

T = TypeVar("T")

_PHYSICAL, _TABLES, _PROCESS = range(3)
"""What an address is relative to: ``enum kind`` in libvmi.c."""
_DOMAIN_FLAGS = INIT_DOMAINNAME | INIT_DOMAINID

Place = tuple[int, int, int]
"""What an address is relative to, the page tables or pid, the address."""


def opened(domain: str | None, flags: int, socket: str | None, partial: bool, mode: int, config: Any) -> Guest | int:
    """Open a guest (``vmi_init``, ``vmi_init_complete``).

    :param domain: its name, or with ``INIT_DOMAINID`` its number in digits
    :param socket: given as ``VMI_INIT_DATA_KVMI_SOCKET``
    :param mode: the ``vmi_config_t`` that says what ``config`` is
    :returns: the guest; or the value of a ``LibvmiInitError``, after the reason on standard error
    """
    try:
        return _opened(domain, flags, socket, partial, mode, config)
    except Exception as error:
        _say(domain or "", _reason(error))
        return _code(error, partial)


def _opened(domain: str | None, flags: int, socket: str | None, partial: bool, mode: int, config: Any) -> Guest:
    script.inherit()
    abi, events = os.environ.get(ABI, "0.15"), os.environ.get(EVENTS, "")
    if abi not in ABIS:
        raise LibvmiError(f"DRIVER: {ABI}={abi} is not one of {', '.join(ABIS)}")
    if events not in ("", "poll"):
        raise LibvmiError(f"EVENTS: {EVENTS}={events} is not poll")
    if flags & INIT_EVENTS and events != "poll":
        raise LibvmiError(
            f"EVENTS: vmishim has no events, and the program asked for them (VMI_INIT_EVENTS); if it can do without, "
            f"set {EVENTS}=poll: it may then wait for events, and none will come"
        )
    if domain is None or (flags & _DOMAIN_FLAGS) not in (INIT_DOMAINNAME, INIT_DOMAINID):
        raise LibvmiError(
            "VM_NOT_FOUND: the program named no domain: neither VMI_INIT_DOMAINNAME nor VMI_INIT_DOMAINID"
        )
    data = {VMIInitData.KVMI_SOCKET: socket} if socket is not None else None
    vmi = Libvmi(domain, flags & _DOMAIN_FLAGS, data, VMIConfig(mode), config, partial=partial)
    return Guest(vmi, config if isinstance(config, str) else None, abi == "0.14", bool(flags & INIT_EVENTS))


def access_mode(domain: str | None, flags: int) -> int | None:
    """How a domain would be reached (``vmi_get_access_mode``); None, after the reason on standard error: unknown."""
    try:
        script.inherit()
        if domain is None or (flags & _DOMAIN_FLAGS) not in (INIT_DOMAINNAME, INIT_DOMAINID):
            return None
        return int(Libvmi.get_access_mode(_NOBODY, domain, flags & _DOMAIN_FLAGS, None).value)
    except Exception as error:
        _say(domain or "", _reason(error))
        return None


_NOBODY: Any = None
"""``get_access_mode`` needs no instance."""


class Guest:
    """A guest that a program has opened.

    :param vmi: the guest
    :param config: path of the configuration, or its text
    :param abi_14: the program was compiled for LibVMI 0.14
    :param events: the program may wait for events
    :ivar fault: (address, page tables) of the last call, if it failed for an address that is not mapped
    """

    __slots__ = ("_begun", "_config", "_profiles", "_said", "_vmi", "abi_14", "events", "fault", "is_file")

    def __init__(self, vmi: Libvmi, config: str | None, abi_14: bool, events: bool) -> None:
        self._vmi = vmi
        self._config = config
        self._said: set[str] = set()
        self._profiles: dict[int, JsonProfile] = {}
        self._begun = time.perf_counter()
        self.abi_14, self.events = abi_14, events
        self.is_file = vmi.vmi.agent is None
        self.fault: tuple[int, int] | None = None

    @property
    def words(self) -> dict[int, int]:
        """See `vmishim.guests.target.Target.words`."""
        return self._vmi._words

    @property
    def cells(self) -> dict[int, bytes]:
        """See `vmishim.guests.target.Target.cells`."""
        return self._vmi._cells

    def failed(self, error: BaseException) -> None:
        """Tell why a call failed, if the program could not know: the guest cannot be asked, or this is a bug. With
        ``LIBVMI_DEBUG`` every failure is told."""
        expected = isinstance(error, LibvmiError) and not isinstance(error, LinkError)
        if expected and not os.environ.get("LIBVMI_DEBUG"):
            return
        text = _reason(error)
        if text not in self._said:
            self._said.add(text)
            _say(self._vmi._target.name, text)

    def close(self) -> None:
        """End it (``vmi_destroy``)."""
        agent = self._vmi._target.agent
        if agent is not None and os.environ.get(STATS):
            link, taken = agent.link, time.perf_counter() - self._begun
            carried = link.bytes_sent + link.bytes_received
            print(f"vmishim: {link.requests} requests, {carried} bytes, {taken:.3f} s", file=sys.stderr, flush=True)
        self._vmi.destroy()

    def pause(self) -> int:
        """``vmi_pause_vm``."""
        self._vmi.pause_vm()
        return 1

    def resume(self) -> int:
        """``vmi_resume_vm``."""
        self._vmi.resume_vm()
        return 1

    def init_paging(self, flags: int) -> None:
        """``vmi_init_paging``."""
        self._vmi.init_paging(flags)

    def init_os(self, mode: int, config: Any) -> int:
        """``vmi_init_os``. Returns the value of a ``LibvmiInitError``, after the reason on standard error."""
        try:
            self.init_profile(mode, config)
            self._vmi.init_paging(0)
            self._vmi._initialise()
        except LibvmiError as error:
            _say(self._vmi._target.name, _reason(error))
            return _code(error, partial=True)
        return LibvmiInitError.NONE.value

    def init_profile(self, mode: int, config: Any) -> int:
        """``vmi_init_profile``: the configuration only. Returns 0."""
        from vmishim.libvmi import config as configuration

        self._vmi._configure(configuration.read(VMIConfig(mode), config, self._vmi._target.name))
        self._config = config if isinstance(config, str) else None
        return 0

    # Memory.

    def read(self, kind: int, number: int, address: int, count: int) -> bytes:
        """``count`` bytes; fewer if what follows cannot be read."""
        space = 0
        self.fault = None
        try:
            space = self._space(kind, number)
            return self._vmi._bytes(address, count, space)[0]
        except FaultError as fault:
            self._note(fault, space)
            return fault.data[:count]

    def text(self, kind: int, number: int, address: int, wide: int) -> bytes | None:
        """The bytes before the first character that is 0, of ``wide`` bytes each; None: the first cannot be read."""
        space = 0
        self.fault = None
        try:
            space = self._space(kind, number)
            return self._vmi._text(address, space, wide)
        except FaultError as fault:
            self._note(fault, space)
            return None

    def _space(self, kind: int, number: int) -> int:
        if kind == _PROCESS:
            return self._vmi._space(number)
        return PHYSICAL if kind == _PHYSICAL else self._vmi._root(number % (1 << 64))

    def _note(self, fault: FaultError, space: int) -> None:
        if space != PHYSICAL:
            self.fault = fault.address, space or (self._vmi._kernel_tables() if self._vmi._os else 0)

    # Addresses.

    def symbol(self, name: str) -> int | None:
        """Address of a kernel symbol."""
        try:
            return self._vmi.translate_ksym2v(name)
        except (UnknownNameError, UnicodeError):
            return None

    def kernel_address(self, vaddr: int) -> int | None:
        """``vmi_translate_kv2p``."""
        return self.lookup(self._vmi._kernel_tables(), vaddr)

    def process_address(self, vaddr: int, pid: int) -> int | None:
        """``vmi_translate_uv2p``."""
        self.fault = None
        try:
            return self._vmi.translate_uv2p(vaddr, pid)
        except FaultError as fault:
            self._note(fault, self._vmi.pid_to_dtb(pid))
            return None

    def lookup(self, dtb: int, vaddr: int) -> int | None:
        """``vmi_pagetable_lookup``."""
        self.fault = None
        try:
            return self._vmi.pagetable_lookup(dtb, vaddr)
        except FaultError:
            self.fault = vaddr, dtb
            return None

    def page(self, dtb: int, vaddr: int) -> tuple[int, int, int, int, tuple[int, ...]] | None:
        """``vmi_pagetable_lookup_extended``: address, physical address, size, tables, entries from the lowest up."""
        self.fault = None
        try:
            found = self._vmi.pagetable_lookup_extended(dtb, vaddr)
        except FaultError:
            self.fault = vaddr, dtb
            return None
        return found.vaddr, found.paddr, found.size, found.pt, tuple(found.x86_ia32e[:8])

    def pages(self, dtb: int) -> list[tuple[int, int, int, int]]:
        """``vmi_get_va_pages``."""
        return [(page.vaddr, page.paddr, page.size, page.dtb) for page in self._vmi.get_va_pages(dtb)]

    def tables(self, pid: int) -> int:
        """``vmi_pid_to_dtb``."""
        self.fault = None
        return self._vmi.pid_to_dtb(pid)

    def process(self, dtb: int) -> int:
        """``vmi_dtb_to_pid``."""
        return self._vmi.dtb_to_pid(dtb)

    def export(self, place: Place, symbol: str) -> int:
        """``vmi_translate_sym2v``."""
        return self._vmi.translate_sym2v(_context(place), symbol)

    def export_name(self, place: Place, rva: int) -> bytes:
        """``vmi_translate_v2sym``."""
        return self._vmi.translate_v2sym(_context(place), rva).encode("utf-8", "surrogateescape")

    def kernel_name(self, place: Place, vaddr: int) -> bytes:
        """``vmi_translate_v2ksym``."""
        return self._vmi.translate_v2ksym(_context(place), vaddr).encode("utf-8", "surrogateescape")

    # What is believed.

    def forget_pages(self, dtb: int) -> None:
        """``vmi_v2pcache_flush``."""
        self._vmi.v2pcache_flush(dtb)

    def add_page(self, vaddr: int, dtb: int, paddr: int) -> None:
        """``vmi_v2pcache_add``."""
        self._vmi.v2pcache_add(vaddr, dtb, paddr)

    def forget_symbols(self) -> None:
        """``vmi_symcache_flush``."""
        self._vmi.symcache_flush()

    def add_symbol(self, base: int, pid: int, symbol: str, vaddr: int) -> None:
        """``vmi_symcache_add``."""
        self._vmi.symcache_add(base, pid, symbol, vaddr)

    def forget_names(self) -> None:
        """``vmi_rvacache_flush``."""
        self._vmi.rvacache_flush()

    def add_name(self, base: int, pid: int, rva: int, symbol: str) -> None:
        """``vmi_rvacache_add``."""
        self._vmi.rvacache_add(base, pid, rva, symbol)

    def forget_processes(self) -> None:
        """``vmi_pidcache_flush``."""
        self._vmi.pidcache_flush()

    def add_process(self, pid: int, dtb: int) -> None:
        """``vmi_pidcache_add``."""
        self._vmi.pidcache_add(pid, dtb)

    def forget_memory(self) -> None:
        """``vmi_pagecache_flush``."""
        self._vmi.pagecache_flush()

    # What the guest is.

    def name(self) -> bytes:
        """``vmi_get_name``."""
        return self._vmi.get_name().encode("utf-8", "surrogateescape")

    def vmid(self) -> int:
        """``vmi_get_vmid``."""
        return self._vmi.get_vmid()

    def address_width(self) -> int:
        """``vmi_get_address_width``."""
        return self._vmi.get_address_width()

    def ostype(self) -> int:
        """``vmi_get_ostype``."""
        return int(self._vmi.get_ostype().value)

    def memory(self) -> int:
        """``vmi_get_memsize``, ``vmi_get_max_physical_address``."""
        return self._vmi.get_memsize()

    def vcpus(self) -> int:
        """``vmi_get_num_vcpus``."""
        return self._vmi.get_num_vcpus()

    def offset(self, name: str) -> int:
        """``vmi_get_offset``."""
        return self._vmi.get_offset(name)

    def struct_offset(self, struct: str, member: str) -> int:
        """``vmi_get_kernel_struct_offset``."""
        return self._vmi.get_kernel_struct_offset(struct, member)

    def sysmap(self) -> bytes | None:
        """``vmi_get_linux_sysmap``: None without one in the configuration."""
        return _path(getattr(self._vmi._profile, "sysmap_path", None))

    def json_path(self) -> bytes | None:
        """``vmi_get_rekall_path``: None without a JSON profile."""
        return _path(self._vmi.get_rekall_path())

    # JSON profiles, each known by the address of its json_object.

    def knows_json(self, at: int, own: bool) -> int:
        """Whether a profile was handed over. ``own``: it is the guest's.

        :raises LibvmiError: the guest has no JSON profile; LibVMI then looks into none
        """
        path = self._vmi.get_rekall_path()
        if path is None:
            raise LibvmiError("the guest was opened without a JSON profile")
        if own and at not in self._profiles:
            self._profiles[at] = JsonProfile(path)
        return int(at in self._profiles)

    def take_json(self, at: int, text: str) -> None:
        """Take a profile as text. :raises LibvmiError: it is not a profile"""
        self._profiles[at] = JsonProfile("handed over by the program", json.loads(text))

    def json_symbol(self, at: int, symbol: str, _: str) -> int | None:
        """``vmi_get_symbol_addr_from_json``."""
        return _found(lambda: self._profiles[at].symbol(symbol))

    def json_size(self, at: int, struct: str, _: str) -> int | None:
        """``vmi_get_struct_size_from_json``."""
        return _found(lambda: self._profiles[at].size(struct))

    def json_offset(self, at: int, struct: str, member: str) -> int | None:
        """``vmi_get_struct_member_offset_from_json``."""
        return _found(lambda: self._profiles[at].member(struct, member).offset)

    def json_bit_offset(self, at: int, struct: str, member: str) -> int | None:
        """Byte of a bit field, of ``vmi_get_bitfield_offset_and_size_from_json``."""
        return _found(lambda: self._profiles[at].bits(struct, member)[0])

    def json_first_bit(self, at: int, struct: str, member: str) -> int | None:
        """Its first bit."""
        return _found(lambda: self._profiles[at].bits(struct, member)[1])

    def json_last_bit(self, at: int, struct: str, member: str) -> int | None:
        """The bit after its last."""
        return _found(lambda: self._profiles[at].bits(struct, member)[2])

    def json_type(self, at: int, struct: str, member: str) -> bytes | None:
        """``vmi_get_struct_field_type_name_from_json``."""
        name = _found(lambda: self._profiles[at].type_name(struct, member))
        return None if name is None else name.encode("utf-8", "surrogateescape")


def _found(look: Callable[[], T]) -> T | None:
    """What a profile says; None if it says nothing."""
    try:
        return look()
    except KeyError:
        return None


def _path(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def _context(place: Place) -> AccessContext:
    kind, number, address = place
    if kind == _TABLES:
        return AccessContext(TranslateMechanism.PROCESS_DTB, addr=address, dtb=number % (1 << 64))
    return AccessContext(TranslateMechanism.PROCESS_PID, addr=address, pid=number)


def _code(error: Exception, partial: bool) -> int:
    """The ``vmi_init_error_t`` of a failure, by the name that its text begins with."""
    name = str(error).partition(":")[0]
    if name == LibvmiInitError.VM_NOT_FOUND.name and not partial:
        # LibVMI looks for a driver first, and none knows the domain.
        return LibvmiInitError.DRIVER_NOT_DETECTED.value
    named = LibvmiInitError.__members__.get(name, LibvmiInitError.DRIVER)
    return int(named.value)


def _reason(error: BaseException) -> str:
    notes = list(getattr(error, "__notes__", ()))
    text = "; ".join(notes if str(error) == FAILURE and notes else [str(error), *notes])
    return text if isinstance(error, LibvmiError) else f"{type(error).__name__}: {text}"


def _say(domain: str, text: str) -> None:
    """One line on standard error, if there is one."""
    if sys.stderr is not None:
        print(printable(f"libvmi.so.0 of vmishim {__version__}: {domain}: {text}"), file=sys.stderr, flush=True)
