"""A guest kernel's structures by name, for readers that follow many kinds of them: words, strings, lists, trees.

What cannot be read is an error, which `Structures.marking` turns into a mark; every walk has a budget.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vmishim.errors import FaultError, LibvmiError
from vmishim.inspection.lists import UNREADABLE, Damage
from vmishim.kernel.profile import Profile
from vmishim.libvmi import Libvmi
from vmishim.memory.reader import ADDRESSES, PAGE_SIZE

ENTRIES_MAX = 1 << 20
"""Entries of one list, tree or table that are read, whatever the guest says."""
STRING_MAX = 256
"""Bytes of a string that are read."""
_FANOUT = 64
"""Slots of an ``xa_node`` (``XA_CHUNK_SIZE`` without ``CONFIG_BASE_SMALL``)."""


class BrokenError(LibvmiError):
    """Something in the guest's memory is not as its kernel makes it."""


class Structures:
    """Structures of one guest.

    :param vmi: the guest
    :param damage: where to note what cannot be read
    """

    def __init__(self, vmi: Libvmi, damage: Damage) -> None:
        self.vmi, self.damage = vmi, damage
        self._profile: Profile = vmi.vmi.profile
        self._offsets: dict[str, int] = {}

    @contextmanager
    def marking(self, what: str) -> Iterator[None]:
        """A block that ends where memory cannot be read, or is not as the kernel makes it; that is noted."""
        try:
            yield
        except (*UNREADABLE, BrokenError) as error:
            self.damage.add(what, error)

    # Names.

    def at(self, name: str) -> int:
        """Offset of a member: ``at("task_struct comm")``. :raises KeyError: this kernel has no such member"""
        if name not in self._offsets:
            self._offsets[name] = self._profile.member(*name.split(" ")).offset
        return self._offsets[name]

    def has(self, name: str) -> bool:
        """Whether this kernel has a member, or, for one word, a structure."""
        try:
            if " " in name:
                self.at(name)
            else:
                self._profile.size(name)
        except KeyError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a structure or of a member. :raises KeyError: this kernel does not have it"""
        return self._profile.member(*name.split(" ")).size if " " in name else self._profile.size(name)

    def symbol(self, name: str) -> int:
        """Address of a symbol. :raises KeyError: this kernel does not have it"""
        return self._profile.symbol(name)

    def has_symbol(self, name: str) -> bool:
        """Whether this kernel has a symbol."""
        try:
            self._profile.symbol(name)
        except KeyError:
            return False
        return True

    def symbol_at(self, address: int) -> str | None:
        """Name of the symbol that begins at an address; None if none does."""
        try:
            return self._profile.symbol_at(address)
        except KeyError:
            return None

    # Words.

    def pointer(self, address: int) -> int:
        """Eight bytes at an address."""
        return self.vmi.read_addr_va(address % ADDRESSES, 0)

    def number(self, address: int, size: int = 4) -> int:
        """An unsigned number of ``size`` bytes."""
        return int.from_bytes(self.read(address, size), "little")

    def read(self, address: int, count: int) -> bytes:
        """Exactly ``count`` bytes, of one page or of two that follow each other."""
        data, got = self.vmi.read_va(address % ADDRESSES, 0, count)
        if got != count:
            raise FaultError((address + got) % ADDRESSES)
        return data

    def field(self, address: int, member: str) -> int:
        """The pointer that is a member: ``field(task, "task_struct mm")``."""
        return self.pointer(address + self.at(member))

    def value(self, address: int, member: str) -> int:
        """The number that is a member, as wide as the member is."""
        size = self.size(member)
        if size not in (1, 2, 4, 8):
            raise KeyError(f"{member!r} is not a number, but {size} bytes")
        return self.number(address + self.at(member), size)

    def text(self, address: int, most: int) -> str:
        """A string in an array of ``most`` bytes; bytes that are not UTF-8 are escaped."""
        return self.read(address, most).split(b"\0", 1)[0].decode(errors="backslashreplace")

    def string(self, address: int) -> str:
        """A string that ends with a NUL, as `text`; read by 32 bytes, as the memory after its end may be unreadable."""
        data = b""
        while b"\0" not in data and len(data) < STRING_MAX:
            at = address + len(data)
            data += self.read(at, min(32 - at % 32, STRING_MAX - len(data)))
        return data.split(b"\0", 1)[0].decode(errors="backslashreplace")

    def words(self, address: int, count: int) -> list[int]:
        """``count`` pointers from ``address`` on, read page by page."""
        if count > ENTRIES_MAX:
            raise BrokenError(f"the table at {address:#x} has {count} entries")
        found: list[int] = []
        end = address + 8 * count
        while address < end:
            size = min(PAGE_SIZE - address % PAGE_SIZE, end - address)
            found += struct.unpack(f"<{size // 8}Q", self.read(address, size))
            address += size
        return found

    # Lists and trees.

    def hlist(self, head: int, what: str) -> Iterator[int]:
        """Nodes of an ``hlist_head``."""
        before, met = head, set[int]()
        with self.marking(what):
            node = self.pointer(head)
            while node:
                if node in met or len(met) >= ENTRIES_MAX:
                    raise BrokenError(f"it loops: {before:#x} leads back to {node:#x}")
                after, behind = self.pointer(node), self.pointer(node + 8)
                if behind != before:
                    raise BrokenError(f"{before:#x} leads to {node:#x}, which leads back to {behind:#x}")
                met.add(node)
                yield node
                before, node = node, after

    def chain(self, first: int, link: int, what: str) -> Iterator[int]:
        """Entries of a list that a null pointer ends; each has the next one at ``link``."""
        met = set[int]()
        with self.marking(what):
            while first:
                if first in met or len(met) >= ENTRIES_MAX:
                    raise BrokenError(f"it loops at {first:#x}")
                after = self.pointer(first + link)
                met.add(first)
                yield first
                first = after

    def rb_tree(self, root: int, what: str) -> Iterator[int]:
        """Nodes of a red-black tree, starting with ``root``, which may be null."""
        pending, met = [root] if root else [], set[int]()
        while pending:
            node = pending.pop()
            if node in met or len(met) >= ENTRIES_MAX:
                self.damage.add(f"{what}: it loops at {node:#x}")
                continue
            met.add(node)
            with self.marking(f"{what}, {node:#x}"):
                below = self.field(node, "rb_node rb_left"), self.field(node, "rb_node rb_right")
                yield node
                pending += [child for child in below if child]

    def xarray(self, array: int, what: str) -> Iterator[tuple[int, int]]:
        """(index, entry) of an xarray that holds pointers (Documentation/core-api/xarray.rst)."""
        pending, met = list[tuple[int, int, int]](), set[int]()
        with self.marking(what):
            entry = self.field(array, "xarray xa_head")
            pending += [(0, entry, _FANOUT)] if entry else []
        while pending:
            index, entry, above = pending.pop()
            if entry & 3 != 2:
                yield index, entry
            elif entry > PAGE_SIZE:
                # A node, its address plus 2; smaller ones are marks, such as that of an entry being made.
                node = entry - 2
                with self.marking(f"{what}, {node:#x}"):
                    step = self.number(node + self.at("xa_node shift"), 1)
                    if node in met or step >= above or len(met) >= ENTRIES_MAX:
                        raise BrokenError("it is not a node of this array")
                    met.add(node)
                    below = self.words(node + self.at("xa_node slots"), _FANOUT)
                    pending += [(index + (at << step), child, step) for at, child in enumerate(below) if child]

    def idr(self, idr: int, what: str) -> Iterator[tuple[int, int]]:
        """(number, pointer) of a ``struct idr``."""
        yield from self.xarray(idr + self.at("idr idr_rt"), what)
