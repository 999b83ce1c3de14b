"""One guest, as Volatility reads it: virtual memory by its agent, through a page cache that lasts for one run."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmishim import files
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.guests import layout
from vmishim.guests.description import Description, describe, folder
from vmishim.guests.resolver import current
from vmishim.guests.target import Target, direct
from vmishim.memory import pagetable
from vmishim.memory.pagecache import PageCache
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, PHYSICAL
from vmishim.volatility import isf, plans

SCHEME = "vmishim"
SYMBOLS_KEPT = 8
"""Files of symbols kept on disk, 15 MiB each."""
FIRST = (
    *("phys_base", "sme_me_mask", "iomem_resource", "init_pid_ns", "tk_core", "timekeeper_data", "modules", "mod_tree"),
    *("module_kset", "net_namespace_list", "init_net", "prb", "taint_flags", "init_files", "init_mm", "bpf_kallsyms"),
    *("ftrace_mod_maps", "ftrace_ops_list", "idt_table", "sys_call_table", "tty_drivers", "keyboard_notifier_list"),
)
"""Variables whose pages are fetched at the start."""
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""Where the kernel's image is mapped (``__START_KERNEL_map``)."""


class Guest:
    """A guest, open for Volatility.

    :param target: the guest; stays the caller's to close
    :param kept: folder on disk for the kernel's description and symbols (default: the user's)
    :raises LibvmiError: the kernel has no BTF or no symbol table, or leaves its variables out of it
    :ivar lost: why the guest could not be asked any more, if so. Nothing can be read from then on: Volatility passes
        over some errors, and would show rows of half a guest as if they were all
    :raises LinkError: the guest could not be asked
    """

    def __init__(self, target: Target, kept: Path | None = None) -> None:
        self.target = target
        self.kernel: Description = describe(target, kept)
        if not self.kernel.has_variables:
            raise LibvmiError(
                f"OS: the symbol table of Linux {self.kernel.release} leaves out its variables, so Volatility finds "
                "none: build the kernel with CONFIG_KALLSYMS_ALL, as distributions do"
            )
        self._kept = kept or folder()
        self.cache = PageCache(direct(target), lifetime=math.inf)
        # What nearly every plugin reads, in one request.
        self.cache.prefetch(self.kernel.addresses[name] for name in FIRST if name in self.kernel.addresses)
        self.root = self._find_root()
        self.encrypted = self._word("sme_me_mask") & pagetable.FRAME
        self.translate = lru_cache(1 << 16)(self._translate)
        self.lost: LinkError | None = None
        if target.agent is not None:
            plans.register(self.cache, target, self.kernel.types)

    def __deepcopy__(self, memo: object) -> Guest:
        return self  # Volatility copies its layers

    @property
    def banner(self) -> bytes:
        """What Volatility knows the kernel by."""
        return self.kernel.banner + b"\0"

    @property
    def size(self) -> int:
        """End of the guest's memory, in physical addresses."""
        return self.target.profile.memory_size

    @property
    def levels(self) -> int:
        """Page-table levels, 4 or 5."""
        return self.target.profile.levels

    def read(self, address: int, count: int, root: int) -> bytes:
        """Virtual memory.

        :param address: with or without the bits above those that are translated: Volatility uses both
        :param root: physical address of the page tables of a process, or of the kernel
        :raises FaultError: some of it is not there
        :raises LinkError: the guest could not be asked
        """
        address = pagetable.canonical(address, self.levels)
        return self._read(address, count, KERNEL if root == self.root or address >= KERNEL_FLOOR else root)

    def read_physical(self, address: int, count: int) -> bytes:
        """Physical memory. Errors as of ``read``."""
        return self._read(address, count, PHYSICAL)

    def _read(self, address: int, count: int, space: int) -> bytes:
        if self.lost is not None:
            raise self.lost
        try:
            return self.cache.read(address, count, space)
        except LinkError as error:
            self.lost = error
            raise

    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) of RAM in physical addresses, as the kernel has it; all up to its end, if it does not say."""
        with suppress(KeyError):
            said = layout.ranges(
                lambda at, count: self._read(at, count, KERNEL), self.target.profile.symbol("iomem_resource")
            )
            if said:
                return [(each.start, each.end) for each in said]
        return [(0, self.size)] if self.size else []

    def symbols(self) -> Path:
        """The kernel's symbols for Volatility: a file that is whole, made of this kernel's description.

        :raises LibvmiError: the guest's types contradict themselves, or the file cannot be written
        """
        path = self._kept / f"{self.kernel.identity[:32]}.isf.json"
        seal = path.with_suffix(".sha256")
        try:
            # The symbols belong to a description that was itself compared with the guest.
            if self.kernel.was_kept and files.read_trusted(seal) == self._seal(files.read_trusted(path)):
                os.utime(path)
                return path
        except OSError:
            pass
        try:
            data = json.dumps(isf.make(self.kernel), separators=(",", ":")).encode()
            self._kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write(path, data, 0o600)
            files.write(seal, self._seal(data), 0o600)
            kept = sorted(self._kept.glob("*.isf.json"), key=lambda each: each.stat().st_mtime, reverse=True)
            for old in kept[SYMBOLS_KEPT:]:
                old.unlink(missing_ok=True)
                old.with_suffix(".sha256").unlink(missing_ok=True)
        except KeyError as error:
            raise LibvmiError(f"OS: the BTF of Linux {self.kernel.release} cannot be read: {error.args[0]}") from None
        except OSError as error:
            raise LibvmiError(f"OS: {path} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from None
        return path

    def _seal(self, data: bytes) -> bytes:
        return hashlib.sha256(f"{isf.FORM} {self.kernel.identity}".encode() + data).hexdigest().encode()

    def _word(self, name: str) -> int:
        with suppress(KeyError, FaultError):
            return int.from_bytes(self.cache.read(self.kernel.addresses[name], 8), "little")
        return 0

    def _find_root(self) -> int:
        """Physical address of the kernel's page tables."""
        names = self.kernel.addresses
        root = names.get("init_top_pgt") or names.get("init_level4_pgt")
        if root is None:
            raise LibvmiError(f"OS: Linux {self.kernel.release} has no symbol init_top_pgt")
        moved = int.from_bytes(self._word("phys_base").to_bytes(8, "little"), "little", signed=True)
        return root - KERNEL_MAP + moved

    def _translate(self, page: int, root: int) -> tuple[int, int, int]:
        """(physical address, bytes of the page around it, its entry) of a page.

        :raises FaultError: it is not mapped
        :raises LinkError: the guest could not be asked
        """
        found = pagetable.walk(self._read_table, root, page, self.levels, self.encrypted)
        return found.physical, found.size, found.entries[-1].value

    def _read_table(self, address: int, count: int) -> bytes:
        """Page tables, in the direct map: whole pages that are kept, and that a scatter read brings together."""
        offset = self.target.profile.page_offset
        return self._read(offset + address, count, KERNEL) if offset else self.read_physical(address, count)


_open: dict[str, Guest] = {}


def guest(location: str) -> Guest:
    """The guest of a location, ``vmishim://NAME``: opened once in a process.

    :raises LibvmiError: no such domain, or see `Guest`
    :raises LinkError: the guest's agent could not be reached
    """
    name = name_of(location)
    if name not in _open:
        resolver = current()
        target = resolver.reach(resolver.find(name, False))
        try:
            _open[name] = Guest(target)
        except BaseException:
            target.close()
            raise
    return _open[name]


def opened() -> list[Guest]:
    """All guests that are open."""
    return list(_open.values())


def name_of(location: str) -> str:
    """The domain's name in ``vmishim://NAME`` (or ``vmishim:NAME``)."""
    split = urlsplit(location)
    return unquote(split.netloc + split.path.rstrip("/"))
