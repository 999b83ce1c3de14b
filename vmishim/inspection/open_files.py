"""The open files of a guest's processes: which process has an inode open.

Each thread may have a file table of its own (``unshare(CLONE_FILES)``), and the main thread's is gone once it has
exited, so the tables of all threads are searched, each table once. Of a table only what is used is read: the kernel's
bitmap of open descriptors says what that is. Tables of more than `NEAR` descriptors are gathered in the guest if its
agent reads ahead: one descriptor of 2,000,000 costs a request or two.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vmishim.errors import FaultError
from vmishim.inspection.lists import BROKEN_MAX, UNREADABLE, Damage
from vmishim.libvmi import Libvmi
from vmishim.memory.reader import KERNEL_FLOOR, PAGE_SIZE

NEAR = 512
"""Descriptors of a table that are read one by one, which the read-ahead learns: few processes have more."""
FILES_MAX = 1 << 16
"""Open files of one table that are searched beyond `NEAR`."""
SLOTS_MAX = 1 << 24
"""Descriptors of one table up to which it is searched: 16 times ``sysctl_nr_open``'s default."""
ALL_FILES_MAX = 1 << 20
"""Open files that are searched beyond `NEAR` in all tables of one look."""
_BITS = 64


class OpenFiles:
    """Reads file tables of one guest.

    :param vmi: the guest
    :param damage: where to note what was given up
    """

    def __init__(self, vmi: Libvmi, damage: Damage) -> None:
        self._vmi, self._damage = vmi, damage
        at = vmi.get_kernel_struct_offset
        self._table = at("files_struct", "fdt")
        self._most, self._slots, self._used = (at("fdtable", name) for name in ("max_fds", "fd", "open_fds"))
        self._inode = at("file", "f_inode")
        self._left = ALL_FILES_MAX
        self._broken = 0

    def inodes(self, files: int, whose: str) -> Iterator[int]:
        """Addresses of the inodes that a ``files_struct`` has open.

        :param whose: the process, for marks
        """
        read = self._vmi.read_addr_va
        try:
            table = read(files + self._table, 0)
            count = self._vmi.read_32_va(table + self._most, 0)
            slots, used = read(table + self._slots, 0), read(table + self._used, 0)
            self._broken = 0
            for word in range(0, min(count, NEAR), _BITS):
                yield from self._some(slots, word, read(used + word // 8, 0), whose)
        except UNREADABLE as error:
            self._damage.add(f"open files of {whose}", error)
            return
        if count > NEAR and self._broken < BROKEN_MAX:
            if count > SLOTS_MAX:
                self._damage.add(f"open files of {whose}: searched up to descriptor {SLOTS_MAX:,} of {count:,}")
            yield from self._far(slots, used, min(count, SLOTS_MAX), whose)

    def _some(self, slots: int, start: int, bits: int, whose: str) -> Iterator[int]:
        """The inodes of those of 64 descriptors from ``start`` on that ``bits`` say are open."""
        read = self._vmi.read_addr_va
        while bits and self._broken < BROKEN_MAX:
            number = start + (bits & -bits).bit_length() - 1
            bits &= bits - 1
            try:
                file = read(slots + 8 * number, 0)
                if file:  # else reserved for a file that is being opened
                    yield _inode(read(file + self._inode, 0))
            except UNREADABLE as error:
                self._damage.add(f"descriptor {number} of {whose}", error)
                self._broken += 1
                if self._broken == BROKEN_MAX:
                    self._damage.add(f"open files of {whose}: {BROKEN_MAX} are broken, and the rest was not searched")

    def _far(self, slots: int, used: int, count: int, whose: str) -> Iterator[int]:
        """The inodes of the descriptors beyond `NEAR`, as many as the budget allows."""
        read, budget = self._vmi.read_addr_va, min(FILES_MAX, self._left)
        limit = f"{FILES_MAX:,} files beyond descriptor {NEAR}"
        if budget < FILES_MAX:
            limit = f"{ALL_FILES_MAX:,} files beyond descriptor {NEAR} of all processes"
        agent = self._vmi.vmi.agent
        try:
            read(slots + 8 * NEAR, 0), read(slots + 8 * (count - 1), 0)
            gathered = agent.behind(slots + 8 * NEAR, count - NEAR, self._inode, budget) if agent and budget else None
            if gathered is not None:
                inodes, missing = gathered
                self._left -= len(inodes)
                yield from map(_inode, inodes)
                if missing:
                    self._damage.add(f"open files of {whose}: {missing} (searched: {limit})")
                return
            for start, bits in self._bitmap(used, count):
                if self._broken == BROKEN_MAX:
                    return
                for inode in self._some(slots, start, bits, whose):
                    if not budget:
                        self._damage.add(f"open files of {whose}: there are more than the {limit} that are searched")
                        return
                    budget -= 1
                    self._left -= 1
                    yield inode
        except UNREADABLE as error:
            self._damage.add(f"open files of {whose}", error)

    def _bitmap(self, used: int, count: int) -> Iterator[tuple[int, int]]:
        """The words of a bitmap beyond `NEAR` that have bits set: number of the first bit, word."""
        at, end = used + NEAR // 8, used + (count + _BITS - 1) // _BITS * 8
        while at < end:
            size = min(PAGE_SIZE - at % PAGE_SIZE, end - at)
            data = self._vmi.read_va(at, 0, size)[0]
            if any(data):
                for number, (word,) in enumerate(struct.iter_unpack("<Q", data)):
                    if word:
                        yield (at - used) * 8 + number * _BITS, word
            at += size


def _inode(address: int) -> int:
    """The same. :raises FaultError: no inode can be there; it is compared, not read"""
    if address < KERNEL_FLOOR:
        raise FaultError(address)
    return address
