"""This machine's kernel, as the agent reads it: symbols, structure members, memory, walks.

Only this module and ``programs`` touch the kernel; ``agent`` turns requests into calls of `Kernel`.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

from guest_agent.programs import LoadError, Programs
from vmishim.ebpf_objects import object_bytes
from vmishim.kernel.btf import Btf
from vmishim.wire.plan import Plan

_U64 = struct.Struct("<Q")
_LINKED_TEXT = 0xFFFFFFFF81000000
"""Where x86-64 kernels are linked to run: CONFIG_PHYSICAL_START above __START_KERNEL_map
(arch/x86/include/asm/page_64_types.h)."""


class Struct:
    """One of our own structures in a shared map, accessed by member name; its layout comes from the object's BTF."""

    def __init__(self, btf: Btf, name: str, memory: Any) -> None:
        self.size = btf.size(name)
        self._memory = memory
        self._members = {
            member: (place.offset, struct.Struct({8: "<Q", 4: "<I"}[place.size]))
            for member, place in btf.layout(name).items()
            if place.size in (4, 8)
        }
        self._layout = btf.layout(name)

    def __getitem__(self, member: str) -> int:
        offset, form = self._members[member]
        return int(form.unpack_from(self._memory, offset)[0])

    def __setitem__(self, member: str, value: int) -> None:
        offset, form = self._members[member]
        form.pack_into(self._memory, offset, value)

    def words(self, member: str) -> tuple[int, ...]:
        """An array of u64."""
        offset, size = self._layout[member]
        return struct.unpack_from(f"<{size // 8}Q", self._memory, offset)


@dataclass(frozen=True)
class Gathered:
    """The result of one run of a walk: its records and its state."""

    records: bytes
    more: bytes | None
    """The walk's state, to continue it with; None when it is over."""
    truncated: bool
    faulted: int
    fault_at: int
    cycles: int
    cycle_at: int
    torn: int
    head: tuple[int, int]


class Kernel:
    """The running kernel.

    :ivar layout: ``struct layout``: how to translate addresses here
    :raises LoadError: the eBPF programs can't be loaded, or the kernel hides its symbols; the text says what to do
    """

    def __init__(self) -> None:
        self._kallsyms = _Kallsyms()
        self._closed = False
        self._programs = Programs(object_bytes("memory"))
        btf = self._programs.btf
        self._out = self._programs.map("out")
        self._heads = self._programs.map("heads")
        self._state = self._programs.map("walk_state")
        self._walk = Struct(btf, "walk", self._state)
        self._read_map = self._programs.map("read_state")
        self._read = Struct(btf, "read", self._read_map)
        self._start = lru_cache(64)(lambda plan: plan.to_c().ljust(self._walk.size, b"\0"))
        # What the last runs left in the maps, which nothing else may write.
        self._left = {"read_state": b"", "walk_state": b"", "heads": b"", "out": b""}
        self.btf = _read_btf()
        self._located = self._locate() if self.btf else {}
        self.levels = 5 if re.search(rb"^flags.*\bla57\b", Path("/proc/cpuinfo").read_bytes(), re.M) else 4
        self.page_offset = self.encrypted = 0
        base = self.symbol("page_offset_base")
        if base:
            self.page_offset = _U64.unpack(self.read(base, 8))[0]
        # AMD SEV sets the C-bit in every private page-table entry, Intel TDX the shared bit in every shared one.
        for at in filter(None, map(self.symbol, ("sme_me_mask", "cc_mask"))):
            self.encrypted |= _U64.unpack(self.read(at, 8))[0]
        self.layout = struct.pack("<3Q", self.page_offset, self.levels, self.encrypted)
        self._programs.fix("layout", self.layout)
        self._programs.measure("read", "lookup", "walk")
        # Read once, now: the process that answers hellos can no longer open files.
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._memory_end = _memory_end()
        self._memory_end = self._memory_size()
        self._cpus = os.cpu_count() or 1

    # ---- names -------------------------------------------------------------------------------------------------------

    def symbol(self, name: str) -> int | None:
        """Address of a symbol, from kallsyms or, if the kernel lists functions only, from what ``locate`` found."""
        address = self._kallsyms.address(name.encode(errors="replace"))
        return self._located.get(name) if address is None else address

    def symbol_at(self, address: int) -> str | None:
        """The first symbol that starts at ``address``."""
        name = self._kallsyms.name(address)
        if name is None:
            return next((name for name, where in self._located.items() if where == address), None)
        return name

    def member(self, name: str) -> list[int] | None:
        """``"task_struct comm"`` -> [offset, size]; a structure alone -> [0, its size]; None if unknown."""
        if self.btf is None:
            return None
        struct_name, _, member = name.partition(" ")
        try:
            return list(self.btf.member(struct_name, member)) if member else [0, self.btf.size(struct_name)]
        except KeyError:
            return None

    def pointee(self, question: str) -> list[int] | None:
        """``"task_struct 2272"`` or ``"#77 16"`` -> [type number, size] of what that word points to, or None."""
        if self.btf is None:
            return None
        name, _, offset = question.partition(" ")
        try:
            of_type = int(name[1:]) if name.startswith("#") else name
            found = self.btf.pointee(of_type, int(offset))
            return None if found is None else list(found)
        except (KeyError, ValueError):
            return None

    def facts(self) -> dict[str, Any]:
        """Facts about this kernel and machine, see `vmishim.kernel.profile.Profile`."""
        text = self.symbol("_text")
        return {
            "release": os.uname().release,
            "hostname": os.uname().nodename,
            "boot_id": self._boot_id,
            "page_offset": self.page_offset,
            "kaslr_offset": text - _LINKED_TEXT if text else 0,
            "memory_size": self._memory_size(),
            "vcpus": self._cpus,
            "levels": self.levels,
        }

    def _memory_size(self) -> int:
        """End of the highest RAM, in bytes; 0 if unknown. The kernel raises it when memory is plugged in: it is that of
        now, or, if the programs are unloaded, that of the start.
        """
        most = None if self._closed else self.symbol("max_pfn")
        return int.from_bytes(self.read(most, 8), "little") << 12 if most else self._memory_end

    def _locate(self) -> dict[str, int]:
        programs = Programs(object_bytes("locate"))
        try:
            found = Struct(programs.btf, "located", programs.map("located"))
            if programs.run("locate"):
                return {}
            return {name: found[name] for name in ("init_task", "init_net", "tcp_hashinfo") if found[name]}
        finally:
            programs.close()

    # ---- memory ------------------------------------------------------------------------------------------------------

    def read(self, address: int, count: int, dtb: int = 0) -> bytes:
        """Read memory at ``address``: at most a chunk (1 MiB), and only up to the first unreadable page.

        :param dtb: 0 for kernel virtual addresses, else the page-table root to translate ``address`` with
        """
        self._left["read_state"] = self._left["out"] = b""  # unknown, should the run fail
        request = self._read
        request["address"], request["count"], request["dtb"] = address, min(count, 1 << 20), dtb
        self._programs.run("read")
        data = self._out[: request["done"]]
        self._left["read_state"], self._left["out"] = self._read_map[: request.size], data
        return data

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate an address: (physical address, page size or 0 if not mapped, entries from the root down)."""
        self._left["read_state"] = b""
        request = self._read
        request["address"], request["dtb"] = address, dtb
        self._programs.run("lookup")
        self._left["read_state"] = self._read_map[: request.size]
        return request["physical"], request["page_size"], list(request.words("entry")[: self.levels])

    def walk(self, plan: Plan, heads: bytes = b"", state: bytes | None = None) -> Gathered:
        """Run a walk until its chunk is full or it is over.

        :param heads: u64 addresses, for a plan that lists its heads
        :param state: `Gathered.more` of the chunk before; None starts the walk
        """
        self._left["walk_state"] = self._left["out"] = b""
        start = state or self._start(plan)
        self._state[: len(start)] = start
        if heads:
            self._heads[: len(heads)] = heads
            self._left["heads"] = heads
        self._programs.run("walk")
        walk = self._walk
        over = walk["state"]
        records, after = self._out[: walk["cursor"]], self._state[: walk.size]
        self._left["out"], self._left["walk_state"] = records, after
        return Gathered(
            records=records,
            more=after if over == _MORE else None,
            truncated=over == _TRUNCATED,
            faulted=walk["faulted"],
            fault_at=walk["fault_at"],
            cycles=walk["cycles"],
            cycle_at=walk["cycle_at"],
            torn=walk["torn"],
            head=walk.words("head_link"),  # type: ignore[arg-type]
        )

    def changed(self) -> list[str]:
        """What is not any more what this process loaded, or its programs left: for each a few words."""
        if self._closed:
            return []
        names = {"read_state": self._read_map, "walk_state": self._state, "heads": self._heads, "out": self._out}
        written = [name for name, data in self._left.items() if names[name][: len(data)] != data]
        programs = [f"program {name} was exchanged" for name in self._programs.changed()]
        return [*(f"map {name} was rewritten" for name in written), *programs]

    def close(self) -> None:
        """Unload the programs: memory can't be read any more, names can still be resolved."""
        self._closed = True
        self._programs.close()


_MORE, _TRUNCATED = 0, 2  # enum walk_state


SEARCHES_MAX = 64
"""Names that are searched for in the text before an index is made; an IDS asks for about 20 when it connects."""
_LINE = re.compile(rb"\n[0-9a-f]{16} . ([^\t\n]+)")


class _Kallsyms:
    """``/proc/kallsyms``: the kernel's symbols, read once, and those of modules, read again when modules come or go.

    This file and ``/proc/modules`` stay open, because the kernel checks who opened them: the confined agent could not
    open them again.

    :raises LoadError: the file can't be read, or hides addresses
    """

    def __init__(self) -> None:
        try:
            self._file = Path("/proc/kallsyms").open("rb", buffering=0)  # noqa: SIM115, it stays open
        except OSError as error:
            raise LoadError(f"cannot read /proc/kallsyms: {error.strerror}") from None
        modules = Path("/proc/modules")  # a kernel without modules has none
        self._modules_file = modules.open("rb", buffering=0) if modules.exists() else None
        self._index: array[int] | None = None
        self._module_index: array[int] | None = None
        self._searches = 0
        self._read(self._loaded())
        if not re.search(rb"\n(?!0000000000000000)[0-9a-f]{16} ", self._text[:4096]):
            raise LoadError(
                "/proc/kallsyms shows only zeros: run as root or with CAP_SYSLOG, "
                "and check that kernel.kptr_restrict is not 2"
            )

    def _loaded(self) -> set[bytes]:
        """Each module's name, size, state and address (proc(5), modules), without its use counts, which change."""
        if self._modules_file is None:
            return set()
        self._modules_file.seek(0)
        return {b" ".join(line.split()[:2] + line.split()[4:6]) for line in self._modules_file.read().splitlines()}

    def _read(self, modules: set[bytes]) -> None:
        self._file.seek(0)
        self._text, self._modules = b"\n" + self._file.read(), modules
        of_module = self._text.find(b"\t[")
        self._end = len(self._text) if of_module < 0 else self._text.rfind(b"\n", 0, of_module) + 1
        self._module_index = None

    def _indexed(self, start: int, end: int) -> array[int]:
        """The names of a part of the text, sorted by hash, each with its position."""
        lines = _LINE.finditer(self._text, start, end)
        return array("Q", sorted(crc32(line[1]) << 32 | line.start(1) for line in lines))

    def _find(self, index: array[int], name: bytes) -> int | None:
        """Where the first symbol of that name is in the text."""
        key = crc32(name) << 32
        for at in range(bisect_left(index, key), len(index)):
            if index[at] >> 32 != key >> 32:
                break
            place = index[at] & 0xFFFFFFFF
            if self._text.startswith(name, place) and self._text[place + len(name) : place + len(name) + 1] in b"\n\t":
                return place
        return None

    def _refresh(self) -> None:
        """Read the symbols again if modules were loaded or unloaded."""
        modules = self._loaded()
        if modules != self._modules:
            self._read(modules)

    def address(self, name: bytes) -> int | None:
        """Address of the first symbol with that name."""
        self._searches += 1
        if self._searches <= SEARCHES_MAX:
            at = self._text.find(b" " + name + b"\n", 0, self._end)
            if at < 0:
                self._refresh()
                at = self._text.find(b" " + name + b"\t[", self._end)
            return None if at < 0 else self._address(at + 1)
        # An index takes a third of a second to make, and a search of all the text for each of 1,024 unknown names two
        # seconds, in which other IDSs wait.
        if self._index is None:
            self._index = self._indexed(0, self._end)
        place = self._find(self._index, name)
        if place is None:
            self._refresh()
            if self._module_index is None:
                self._module_index = self._indexed(self._end - 1, len(self._text))
            place = self._find(self._module_index, name)
        return None if place is None else self._address(place)

    def name(self, address: int) -> str | None:
        """The first symbol that starts at ``address``."""
        # The kernel's own symbols are sorted, since the kernel bisects them too (get_symbol_pos, kernel/kallsyms.c).
        at = bisect_left(range(self._end), address, 1, key=self._address)
        if at == self._end or self._address(at) != address:
            self._refresh()
            at = self._text.find(b"\n%016x " % address, self._end - 1) + 1
        line = self._text[at : self._text.find(b"\n", at)] if at else b""
        return line[19:].split(b"\t")[0].decode() or None

    def _address(self, at: int) -> int:
        """The address on the line that contains position ``at``."""
        line = self._text.rfind(b"\n", 0, at) + 1
        return int(self._text[line : line + 16], 16)


def _memory_end() -> int:
    """End of the highest RAM when the agent started, for a kernel that lists no variables; 0 if unknown."""
    ends = re.findall(r"^[0-9a-f]+-([0-9a-f]+) : System RAM", Path("/proc/iomem").read_text(), re.M)
    # Without CAP_SYS_ADMIN the file shows zeros only.
    return max((int(end, 16) + 1 for end in ends if int(end, 16)), default=0)


def _read_btf() -> Btf | None:
    try:
        return Btf(Path("/sys/kernel/btf/vmlinux").read_bytes())
    except OSError:
        return None


__all__ = ["Gathered", "Kernel", "LoadError"]
