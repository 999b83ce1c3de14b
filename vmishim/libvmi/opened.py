"""The guest under a `Libvmi`: the state that all of its parts share, and how memory is read that is not in a cell."""

from __future__ import annotations

import threading
from typing import Any

from vmishim.errors import FaultError, UnknownNameError
from vmishim.guests.target import Target
from vmishim.kernel.profile import Profile
from vmishim.libvmi.config import Config
from vmishim.libvmi.profiles import ConfiguredProfile
from vmishim.libvmi.values import unsigned
from vmishim.memory import pagetable
from vmishim.memory.reader import ADDRESSES, KERNEL, PHYSICAL

NO_OS = "the guest was opened with partial=True, which allows only reads of physical memory: call init_os first"
"""Why a call fails that needs ``_os``."""


class OpenedGuest:
    """A guest that was reached. Holds every attribute of a ``Libvmi``; the classes above it have none of their own.

    :ivar vmi: the `Target`; None after ``destroy``. Scripts of the genuine bindings find LibVMI's handle here
    :ivar opaque_vmi: the same
    """

    __slots__ = (
        "__weakref__",
        "_cells",
        "_dtbs",
        "_encrypted",
        "_held_pages",
        "_holds",
        "_json_profile",
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

    def _open(self, target: Target, given: Config | None, vmid: int = 0, initialised: bool = True) -> None:
        """Set every attribute.

        :param given: a configuration, which wins over what the guest says
        :param vmid: the domain's ``id``
        :param initialised: False after a partial init: only physical memory can be read
        """
        self._lock = threading.Lock()
        self._holds = 0  # pauses that nest
        self._target = target
        self._reader = target.reader
        self._vmid = vmid
        self.vmi: Any = target
        self.opaque_vmi: Any = target
        # Known kernel memory by exact address, which a cached read looks in; empty until kernel addresses may be used.
        self._words: dict[int, int] = {}
        self._cells: dict[int, bytes] = {}
        # What init_paging and init_os have made usable.
        self._paging = self._os = False
        # Addresses from _lower up to _upper are not canonical.
        self._lower = self._upper = 0
        # Asked for once: the kernel's page tables, and the bits of a page-table entry that tell of encryption.
        self._kpgd = 0
        self._encrypted = -1
        # What was found or added: page tables and until when, by pid; pages, by tables and address; symbols, by image,
        # tables and name; names, by image, tables and offset.
        self._dtbs: dict[int, tuple[int, float]] = {}
        self._pages: dict[tuple[int, int], int] = {}
        self._symbols: dict[tuple[int, int, str], int] = {}
        self._names: dict[tuple[int, int, int], str] = {}
        # Translations of this hold: physical address, by tables, page size and address of the page.
        self._held_pages: dict[tuple[int, int, int], int] = {}
        self._configure(given)
        if initialised:
            self._initialise()

    def _configure(self, given: Config | None) -> None:
        """Set what a configuration decides. :raises ConfigError: it cannot be used"""
        self._profile: Profile = self._target.profile
        self._json_profile: str | None = None
        if given is not None:
            self._profile = configured = ConfiguredProfile(given, self._profile)
            self._json_profile = configured.profile_path
            self._kpgd = given.numbers.get("kpgd", 0)

    def _initialise(self) -> None:
        """Make processes, symbols and kernel addresses usable."""
        self._paging = self._os = True
        self._cells, self._words = self._target.cells, self._target.words
        # LibVMI ignores the address bits above those that page tables translate.
        self._lower = 1 << (12 + 9 * self._profile.levels - 1)
        self._upper = ADDRESSES - self._lower

    # Memory.

    def _read(self, address: int, count: int, space: int, text: bool = False) -> bytes:
        """Memory that is not in a cell.

        :param space: as for ``MemoryReader.read``
        :raises FaultError: some of it cannot be read
        :raises LinkError: the guest could not be asked
        :raises OverflowError: ``address`` is not an unsigned 64-bit number
        """
        if type(address) is not int or address >> 64:
            address = unsigned(address)
        if space == PHYSICAL:
            return self._read_physical(address, count)
        if self._lower <= address < self._upper:
            address = pagetable.canonical(address, self._profile.levels)
        return self._reader.read(address, count, space, text=text)

    def _read_physical(self, address: int, count: int) -> bytes:
        # No kernel has memory above 2^46, or 2^52 with five levels (MAX_PHYSMEM_BITS), whatever a broken table says.
        if address >> (46 if self._profile.levels == 4 else 52):
            raise FaultError(address)
        return self._reader.read(address, count, PHYSICAL)

    def _kernel_64(self, address: int) -> int:
        """Eight bytes of kernel memory as a number."""
        word = self._words.get(address)
        return int.from_bytes(self._read(address, 8, KERNEL), "little") if word is None else word

    def _kernel_32(self, address: int) -> int:
        """Four bytes of kernel memory as a number."""
        cell = self._cells.get(address, b"")
        return int.from_bytes(cell[:4] if len(cell) >= 4 else self._read(address, 4, KERNEL), "little")

    # Names.

    def _symbol(self, name: str) -> int:
        """Address of a kernel symbol. :raises UnknownNameError: there is no such symbol."""
        try:
            return self._profile.symbol(name)
        except KeyError:
            raise UnknownNameError(name) from None

    def _offset(self, struct: str, member: str) -> int:
        """Bytes from a structure's start to a member. :raises UnknownNameError: there is no such structure or member"""
        try:
            return self._profile.member(struct, member).offset
        except KeyError:
            raise UnknownNameError(f"{struct}.{member}") from None
