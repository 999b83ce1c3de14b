"""Where the parts of a raw image of RAM belong, which the image does not say.

A guest with more memory than fits below a hole for devices has the rest from 4 GiB on, and each hypervisor has that
hole elsewhere. The guest's kernel knows: its tree of resources (``/proc/iomem``) lists all RAM that it uses. The image
also has what the firmware keeps for itself, mostly at the end of the memory below the hole.

The tree can be read only once the parts are where they belong, or if it lies in the part that has the kernel. So
layouts are guessed, and the tree that is read by a guess must lead to a layout by which the same tree is read.

Source: ``struct resource`` in ``include/linux/ioport.h``; ``pc_q35_init``, ``pc_init1`` and ``microvm_memory_init`` of
QEMU; ``MMIO_MEM_START`` of Firecracker; ``HVM_BELOW_4G_RAM_END`` of Xen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import Struct, unpack_from
from typing import NamedTuple

from vmishim.errors import FaultError
from vmishim.guests.dumps import Segment
from vmishim.memory.pagetable import FRAME, LARGE, PRESENT
from vmishim.memory.reader import PAGE_SIZE

GIB = 1 << 30
HIGH = 4 * GIB
"""Where RAM goes on above the hole."""
_LOWS = (
    (0xB000_0000, 2 * GIB),  # q35 of QEMU
    (0xE000_0000, 3 * GIB),  # pc (i440fx) of QEMU
    (3 * GIB, 3 * GIB),  # microvm of QEMU, VMware
    (0xD000_0000, 0xD000_0000),  # Firecracker, kvmtool
    (0xE000_0000, 0xE000_0000),  # VirtualBox
    (0xF000_0000, 0xF000_0000),  # Xen
)
"""(least bytes of RAM with which there is a part above the hole, bytes below it)."""
FIRMWARE_MAX = 256 << 20
"""Bytes that a firmware may keep for itself at the end of a part."""
ROUND = 64 << 20
"""The memory below the hole is a multiple of this, or else the guess is a late one."""
RANGES_MAX = 1024
"""Resources that are looked at; a machine has some dozens beside each other."""
_SPLITS_MAX = 16


def split(size: int, low: int) -> tuple[Segment, ...]:
    """``size`` bytes of RAM, of which ``low`` are below the hole."""
    return Segment(0, low, 0), Segment(HIGH, HIGH + size - low, low)


def guesses(size: int) -> Iterator[tuple[Segment, ...]]:
    """Where a hypervisor may have put ``size`` bytes of RAM, likelier layouts first."""
    for least, low in _LOWS:
        if size >= least and size > low:
            yield split(size, low)
    yield (Segment(0, size, 0),)


def split_at(size: int, low_end: int, end: int) -> Iterator[tuple[Segment, ...]]:
    """The same, for a kernel whose RAM ends there below the hole (``max_low_pfn``) and altogether (``max_pfn``)."""
    lows = (HIGH + size - end, *(low_end + -low_end % step for step in (ROUND, 1 << 20)))
    for low in lows:
        if low_end <= low <= HIGH and 0 < low < size:
            yield split(size, low)


class Range(NamedTuple):
    """RAM that the kernel uses, by guest physical address."""

    start: int
    end: int


_RESOURCE = Struct("<QQQQ32x")
_LINKS = (40, 32)
"""Where ``parent``, ``sibling`` and ``child`` begin: since Linux 4.6 (43ee493bde78), and before."""
_NAME = b"System RAM\0"


def ranges(read: Callable[[int, int], bytes], root: int) -> tuple[Range, ...] | None:
    """RAM according to the kernel's tree of resources; None if this is not such a tree.

    :param read: reads kernel virtual addresses
    :param root: address of ``iomem_resource``
    """
    for links in _LINKS:
        try:
            found = tuple(_ranges(read, root, links))
        except (FaultError, ValueError):
            continue
        if found:
            return found
    return None


def _ranges(read: Callable[[int, int], bytes], root: int, links: int) -> Iterator[Range]:
    (at,) = unpack_from("<16xQ", read(root + links, 24))
    last = -1
    for _ in range(RANGES_MAX):
        if not at:
            return
        start, end, name, _ = _RESOURCE.unpack(data := read(at, _RESOURCE.size))
        parent, at = unpack_from("<QQ", data, links)
        # In order, apart, and below the root: what is not the tree is not all of this.
        if parent != root or not last < start <= end:
            raise ValueError("not a tree of resources")
        last = end
        with suppress(FaultError):
            if read(name, len(_NAME)) == _NAME:
                yield Range(start, end + 1)
    raise ValueError("too many resources")


def fitting(ram: tuple[Range, ...], size: int) -> Iterator[tuple[Segment, ...]]:
    """Layouts of an image of ``size`` bytes that have all RAM of the kernel, but for memory plugged in later, which is
    not in the image; likelier layouts first."""
    low_end = max((each.end for each in ram if each.start < HIGH), default=0)
    high = [each for each in ram if each.start >= HIGH]
    late = []
    for count in range(min(len(high), _SPLITS_MAX), -1, -1):
        for parts in _joined(high[:count]):
            low = size - sum(part.end - part.start for part in parts)
            if not 0 <= low - low_end <= FIRMWARE_MAX or low > HIGH:
                continue
            found = tuple(_segments([Range(0, low), *parts]))
            if low % ROUND == 0:
                yield found
            else:
                late.append(found)
    for guess in guesses(size):
        if len(guess) == 2 and high and all(_ends(guess, low_end, high[0])):
            yield guess
    yield from late
    # All addresses are offsets: an image has the hole in it, or a kernel was told to use less, or the image is cut off.
    if ram[-1].end <= size or (not high and size < low_end):
        yield (Segment(0, size, 0),)


def _joined(parts: list[Range]) -> Iterator[list[Range]]:
    """Parts, first as one: what is reserved between them is in the image as well."""
    if len(parts) > 1:
        yield [Range(parts[0].start, parts[-1].end)]
    yield parts


def _ends(guess: tuple[Segment, ...], low_end: int, high: Range) -> Iterator[bool]:
    """Whether each part ends where the kernel's RAM does, or little later."""
    yield 0 <= guess[0].end - low_end <= FIRMWARE_MAX
    yield guess[1].start == high.start
    yield 0 <= guess[1].end - high.end <= FIRMWARE_MAX


def _segments(parts: list[Range]) -> Iterator[Segment]:
    offset = 0
    for start, end in parts:
        yield Segment(start, end, offset)
        offset += end - start


_LAST_WORDS = Struct("<4080xQQ")


def claimed(table: bytes) -> int | None:
    """Guest physical address of a page, according to its content: that of ``level3_kernel_pgt``, which has two entries,
    the first of which leads to ``level2_kernel_pgt`` in the page after it. None: it is another page.

    Source: ``arch/x86/kernel/head_64.S``.
    """
    level2: int
    level2, fixmap = _LAST_WORDS.unpack(table)
    if any(entry & (PRESENT | LARGE) != PRESENT for entry in (level2, fixmap)) or any(table[:-16]):
        return None
    return (level2 & FRAME) - PAGE_SIZE
