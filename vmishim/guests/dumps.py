"""Files of guest memory: where in each format which memory is.

Raw images, ELF cores and LiME images are mapped as they are. The pages of a compressed dump (kdump), the blocks of an
AVML image and the records of a flattened dump are found when they are asked for (`vmishim.guests.packed`).

Source: ``elf(5)``; ``IMPLEMENTATION``, ``diskdump_mod.h`` and ``makedumpfile.h`` of makedumpfile; ``dump/dump.c`` of
QEMU; LiME's ``doc/README.md``; AVML's ``src/image.rs``; Snappy's ``framing_format.txt``.
"""

from __future__ import annotations

import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from struct import Struct, unpack_from
from typing import NamedTuple

from vmishim.guests import formats, packed
from vmishim.guests.formats import Format, NotReadError
from vmishim.guests.packed import HIGHEST, Block, File, Flattened, Packed, Plain, Store, check
from vmishim.memory.reader import PAGE_SIZE

# A dump may be sparse, so its size says nothing about what it holds.
PROGRAMS_MAX = 1 << 18
"""Pieces of memory of a core or a LiME image."""
SEGMENTS_MAX = 1 << 20
"""Runs of dumped pages of a compressed dump; a dump without free and user pages has the most."""
BITMAP_MAX = 1 << 30
"""Bytes of a compressed dump's bitmap, of 32 TiB of memory."""
BLOCKS_MAX = 1 << 22
"""Blocks of an AVML image, of 256 GiB of memory."""
HIDDEN = 0x000F_C000_0000_0000
"""Bits 46 to 51 of a page-table entry: those of them that are the C-bit do not belong to the address. No guest has RAM
there."""
ZEROS = -1
"""Offset of memory that is zero and not stored."""


class Segment(NamedTuple):
    """A piece of guest physical memory that is contiguous where it is stored."""

    start: int
    """Guest physical address."""
    end: int
    """One past its last byte."""
    offset: int
    """Offset of ``start`` in the file, or in its unpacked blocks; or ``ZEROS``."""


@dataclass(frozen=True)
class Memory:
    """An opened file of guest memory."""

    format: Format
    store: mmap.mmap | Store
    """The memory itself, by offset."""
    segments: tuple[Segment, ...]
    """Where it belongs, in the order of addresses; none for a raw image, which does not say."""
    data: tuple[tuple[int, int], ...]
    """(start, end) of the offsets that are not holes of the file: reading a hole would allocate memory for it."""
    size: int
    """Bytes of all offsets."""
    hint: int = -1
    """Guest physical address that may be the kernel's, according to the file; -1 without one."""
    encrypted: tuple[int, ...] = (0,)
    """What the C-bit of page-table entries may be (AMD SEV), the likeliest first; 0: they have none."""


def opened(path: str | os.PathLike[str]) -> Memory:
    """Open a file of guest memory.

    :raises NotReadError: it is of a format that is known, but not read
    :raises ValueError: it is damaged or cut off, or a package is needed to read it
    :raises OSError: it cannot be read
    """
    file = Plain(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        return _opened(file)
    except BaseException:
        file.close()
        raise


def _opened(file: Plain) -> Memory:
    format = formats.sniff(file.at(0, min(file.size, formats.HEAD)))
    if not format.is_read:
        raise NotReadError(format)
    if format is formats.FLATTENED:
        flattened = Flattened(file)
        inner = formats.sniff(flattened.at(0, min(flattened.size, formats.HEAD)))
        if inner is formats.KDUMP:
            return _kdump(flattened, format)
        if inner is formats.ELF:
            segments = _elf(flattened)
            return Memory(format, flattened, segments, ((0, flattened.size),), flattened.size, *_elf_hint(flattened))
        raise ValueError("this flattened dump holds neither a compressed dump nor an ELF core")
    if format is formats.KDUMP:
        return _kdump(file, format)
    if format is formats.AVML:
        return _avml(file, format)
    segments = {formats.ELF: _elf, formats.LIME: _lime}[format](file) if format is not formats.RAW else ()
    said = _elf_hint(file) if format is formats.ELF else _Hint(-1, _C_BITS if format is formats.LIME else (0,))
    data = tuple(file.data())
    memory = mmap.mmap(file.descriptor, 0, prot=mmap.PROT_READ)
    file.close()  # the mapping has a descriptor of its own
    return Memory(format, memory, segments, data, file.size, *said)


# vmcoreinfo: what a crashed kernel tells of itself, in the text form of makedumpfile

_INFO_MAX = 1 << 16
_TABLES = re.compile(rb"^SYMBOL\((?:init_top_pgt|swapper_pg_dir)\)=([0-9a-f]{1,16})$", re.M)
_MOVED = re.compile(rb"^NUMBER\(phys_base\)=(-?[0-9]{1,20})$", re.M)
_MASK = re.compile(rb"^NUMBER\(sme_mask\)=([0-9]{1,20})$", re.M)
_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
_C_BITS = (0, 1 << 51, 1 << 47)
"""The C-bit of current EPYC processors and of Rome and older, for images that programs in the guest wrote, but that do
not say it. Above any RAM."""


class _Hint(NamedTuple):
    """See `Memory`."""

    hint: int = -1
    encrypted: tuple[int, ...] = (0,)


def _hint(info: bytes) -> _Hint:
    """Guest physical address of the kernel's page tables, which are part of its image, and the C-bit."""
    tables, moved, mask = _TABLES.search(info), _MOVED.search(info), _MASK.search(info)
    encrypted = (int(mask[1]) & HIDDEN,) if mask else (0,)
    if not tables or not moved:
        return _Hint(-1, encrypted)
    return _Hint(max(int(tables[1], 16) - _KERNEL_MAP + int(moved[1]), -1), encrypted)


# ELF

_HEADER = Struct("<4sBB10xHHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_SECTION = Struct("<IIQQQQIIQQ")
_CORE, _LOAD, _NOTE, _CLASS_64, _LITTLE, _MANY = 4, 1, 4, 2, 1, 0xFFFF
_NAMES_MAX = 1 << 16


def _elf(file: File) -> tuple[Segment, ...]:
    start = file.at(0, min(file.size, _HEADER.size))
    if len(start) < _HEADER.size:
        raise ValueError("the file is cut off within its header")
    _, bits, order, kind, _, _, _, programs, sections, _, _, size, count, _, many, names = _HEADER.unpack_from(start)
    if kind != _CORE or bits != _CLASS_64 or order != _LITTLE:
        raise ValueError("this is ELF, but not a 64-bit core with a guest's memory")
    if not count and _is_xen(file, sections, many, names):
        raise NotReadError(formats.XEN_CORE)
    if count and size != _PROGRAM.size:
        raise ValueError(f"this ELF core has program headers of {size} bytes, not {_PROGRAM.size}")
    if count == _MANY:
        count = _SECTION.unpack(file.at(sections, _SECTION.size))[7]
    if count > PROGRAMS_MAX:
        raise ValueError(f"this ELF core has {count} pieces of memory, more than the limit of {PROGRAMS_MAX}")
    stored, zeros = [], []
    for part, _, offset, _, physical, held, length, _ in _PROGRAM.iter_unpack(file.at(programs, count * _PROGRAM.size)):
        if part != _LOAD or physical + max(held, length) > HIGHEST:
            continue
        stored.append(Segment(physical, physical + min(held, max(file.size - offset, 0)), offset))
        # What is not in the file is zero (elf(5), p_memsz); makedumpfile leaves out zero pages so.
        zeros.append(Segment(physical + held, physical + length, ZEROS))
    segments = tuple(_filled(stored, zeros))
    if not segments:
        raise ValueError("this ELF core holds no memory")
    return segments


def _elf_hint(file: File) -> _Hint:
    """From the first note of the core that has one. The header was checked."""
    *_, programs, _, _, _, _, count, _, _, _ = _HEADER.unpack(file.at(0, _HEADER.size))
    for part, _, offset, _, _, held, _, _ in _PROGRAM.iter_unpack(file.at(programs, min(count, 16) * _PROGRAM.size)):
        if part == _NOTE and offset < file.size:
            _, found, info = file.at(offset, min(held, _INFO_MAX, file.size - offset)).partition(b"VMCOREINFO\0")
            if found:
                return _hint(info)
    return _Hint()


def _is_xen(file: File, sections: int, many: int, names: int) -> bool:
    """Whether the core has its memory in Xen's sections (``xc_core.h``), not in program headers."""
    if not names < many < _MANY:
        return False
    headers = list(_SECTION.iter_unpack(file.at(sections, many * _SECTION.size)))
    at, size = headers[names][4:6]
    return b".xen_pages\0" in file.at(at, min(size, _NAMES_MAX))


def _apart(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Segments in order, without overlaps: a kernel's own core has its text a second time, at its virtual address."""
    last = 0
    for start, end, offset in sorted(segments):
        if end > max(last, start):
            skipped = max(last - start, 0)
            yield Segment(start + skipped, end, offset + skipped if offset != ZEROS else ZEROS)
            last = end


def _filled(stored: Iterable[Segment], zeros: Iterable[Segment]) -> Iterator[Segment]:
    """Segments in order, without overlaps. Where some are stored and others zeros, what is stored counts."""
    at = 0
    waiting = list(_apart(zeros))[::-1]
    for segment in [*_apart(stored), Segment(HIGHEST, HIGHEST, 0)]:
        while waiting and max(waiting[-1].start, at) < segment.start:
            start, end, _ = waiting[-1]
            if max(start, at) < min(end, segment.start):
                yield Segment(max(start, at), min(end, segment.start), ZEROS)
            if end > segment.start:
                break
            waiting.pop()
        if segment.start < segment.end:
            yield segment
        at = segment.end


# LiME and AVML: headers of the same form, each before the memory of one range

_RANGE = Struct("<4sIQQ8x")
_LIME, _AVML = (b"EMiL", 1), (b"AVML", 2)
_CHUNK_MAX, _CHECKSUM = 1 << 16, 4


def _range(file: File, at: int, mark: tuple[bytes, int]) -> tuple[int, int]:
    """The addresses of the range at an offset of the file: the first, and one past the last."""
    *found, first, last = _RANGE.unpack(file.at(at, _RANGE.size))
    if tuple(found) != mark:
        raise ValueError(f"the image is damaged: no header of a range at {at}, or one of another version")
    if not first <= last < HIGHEST:
        raise ValueError(f"the image is damaged: a range from {first:#x} to {last:#x} at {at}")
    return first, last + 1


def _lime(file: File) -> tuple[Segment, ...]:
    found: list[Segment] = []
    at = 0
    while at < file.size:
        if len(found) >= PROGRAMS_MAX:
            raise ValueError(f"this LiME image has more than {PROGRAMS_MAX} pieces of memory")
        start, end = _range(file, at, _LIME)
        at += _RANGE.size
        found.append(Segment(start, min(end, start + max(file.size - at, 0)), at))
        at += end - start
    segments = tuple(_apart(found))
    if not segments:
        raise ValueError("this LiME image holds no memory")
    return segments


def _avml(file: File, format: Format) -> Memory:
    packed.needs(packed.FRAMED)
    found = []
    starts, offsets = array("Q", [0]), array("Q")
    at = 0
    while at < file.size:
        start, end = _range(file, at, _AVML)
        first, begin = starts[-1], at + _RANGE.size
        at = begin
        while starts[-1] - first < end - start:
            kind, size = _chunk(file, at)
            if kind in (_PACKED, _PLAIN):
                length = size - _CHECKSUM if kind == _PLAIN else _length(file, at + 8)
                if not 0 < length <= min(_CHUNK_MAX, end - start - (starts[-1] - first)):
                    raise ValueError(f"the image is damaged: a block of {length} bytes at {at}")
                if len(offsets) >= BLOCKS_MAX:
                    raise ValueError(f"this AVML image has more than {BLOCKS_MAX} blocks")
                offsets.append(at)
                starts.append(starts[-1] + length)
            elif kind < _SKIPPED:
                raise ValueError(f"the image is damaged: a block of the unknown kind {kind:#x} at {at}")
            at += 4 + size
        found.append(Segment(start, end, first))
        # The count of packed bytes ends a range.
        if int.from_bytes(file.at(at, 8), "little") != at - begin:
            raise ValueError(f"the image is damaged: the range at {begin} has another length than it says")
        at += 8
    offsets.append(at)

    def blocks(low: int, high: int) -> list[Block]:
        return [Block(offset, 4 + _chunk(file, offset)[1], packed.FRAMED) for offset in offsets[low:high]]

    size = starts[-1]
    return Memory(format, Packed(file, blocks, starts), tuple(_apart(found)), ((0, size),), size, encrypted=_C_BITS)


_PACKED, _PLAIN, _SKIPPED = 0, 1, 0x80
"""Kinds of Snappy's chunks: packed, plain, and from there on those that may be skipped."""


def _chunk(file: File, at: int) -> tuple[int, int]:
    """(kind, bytes after its header) of the chunk of Snappy's framing at an offset."""
    header = file.at(at, 4)
    size = int.from_bytes(header[1:], "little")
    check(file, at + 4, size)
    return header[0], size


def _length(file: File, at: int) -> int:
    """The unpacked length of the Snappy data at an offset: seven bits a byte, the lowest first."""
    value = 0
    for number, byte in enumerate(file.at(at, min(5, max(file.size - at, 1)))):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value
    raise ValueError(f"the image is damaged: a block without a length at {at}")


# kdump

_COUNTS = Struct("<424xIIIII")
"""In the header: status, bytes of a block, blocks of the sub-header, blocks of the bitmaps, pages."""
_SUB_HEADER = Struct("<8xii16xQQ48xQ")
"""Level, whether it is a part of a dump, offset and bytes of vmcoreinfo (version 3), pages (version 6)."""
_DESCRIPTOR = Struct("<QII8x")
_INCOMPLETE = 8
"""Status: the disk was full."""
_ZERO_PAGES = 1
"""Level of a dump that leaves out zero pages and nothing else."""
_CHUNK = 1 << 20
_MOST_PAGES = HIGHEST // PAGE_SIZE


def _kdump(file: File, format: Format) -> Memory:
    header = file.at(0, _COUNTS.size)
    version = unpack_from("<I", header, 8)[0]
    status, block, sub_blocks, bitmap_blocks, pages = _COUNTS.unpack(header)
    if block != PAGE_SIZE:
        raise ValueError(f"this dump has pages of {block} bytes, so it is not from x86-64")
    level, split, info_at, info_size, pages_64 = _SUB_HEADER.unpack(file.at(block, _SUB_HEADER.size))
    if version >= 2 and split:
        raise NotReadError(formats.SPLIT)
    if version >= 6:
        pages = pages_64
    # Two bitmaps: the first has the pages of the machine, the second those that were dumped.
    half = bitmap_blocks * block // 2
    bitmap = (1 + sub_blocks) * block
    check(file, bitmap + half, half)
    if half > BITMAP_MAX:
        raise ValueError(f"the dump's bitmap has {half} bytes, more than the limit of {BITMAP_MAX}")
    pages = min(pages, 8 * half, _MOST_PAGES)
    dumped = _limited(_runs(file, bitmap + half, pages))
    if not dumped:
        raise ValueError("this dump holds no memory")
    count = sum(end - start for start, end in dumped)
    descriptors = bitmap + 2 * half
    check(file, descriptors, count * _DESCRIPTOR.size)

    def blocks(low: int, high: int) -> list[Block]:
        data = file.at(descriptors + low * _DESCRIPTOR.size, (high - low) * _DESCRIPTOR.size)
        return [Block(*descriptor) for descriptor in _DESCRIPTOR.iter_unpack(data)]

    for method in {each.method for each in blocks(0, min(count, _CHUNK // _DESCRIPTOR.size))}:
        packed.needs(method)
    last = blocks(count - 1, count)[0]
    if not status & _INCOMPLETE and last.size <= 2 * PAGE_SIZE:
        check(file, last.offset, last.size)  # pages are written in order
    stored = list(_segments(dumped))
    zeros = _limited(_runs(file, bitmap, pages)) if version >= 1 and level == _ZERO_PAGES else []
    segments = tuple(_filled(stored, (Segment(start * PAGE_SIZE, end * PAGE_SIZE, ZEROS) for start, end in zeros)))
    size = count * PAGE_SIZE
    store = Packed(file, blocks, range(0, size + 1, PAGE_SIZE))
    info_size = min(info_size, _INFO_MAX, max(file.size - info_at, 0)) if version >= 3 else 0
    info = file.at(info_at, info_size)
    return Memory(format, store, segments, ((0, size),), size, *_hint(info))


def _limited(runs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    found = list(islice(runs, SEGMENTS_MAX + 1))
    if len(found) > SEGMENTS_MAX:
        raise ValueError(f"the dump has more than {SEGMENTS_MAX} separate pieces of memory")
    return found


def _segments(runs: Iterable[tuple[int, int]]) -> Iterator[Segment]:
    """Runs of pages, one after another in the unpacked dump."""
    offset = 0
    for start, end in runs:
        yield Segment(start * PAGE_SIZE, end * PAGE_SIZE, offset)
        offset += (end - start) * PAGE_SIZE


def _runs(file: File, bitmap_at: int, pages: int) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of pages whose bits are set in a bitmap, adjacent ones joined."""
    first = -1
    for start in range(0, pages, 8 * _CHUNK):
        bits = min(8 * _CHUNK, pages - start)
        bitmap = file.at(bitmap_at + start // 8, (bits + 7) // 8)
        if bitmap.count(0xFF if first >= 0 else 0) == len(bitmap) and bits == 8 * _CHUNK:
            continue  # nothing changes here
        at = 0
        while at < bits:
            byte = bitmap[at // 8]
            if at % 8 == 0 and byte == (0xFF if first >= 0 else 0):
                at += 8
                continue
            if bool(byte >> at % 8 & 1) != (first >= 0):
                if first >= 0:
                    yield first, start + at
                first = start + at if first < 0 else -1
            at += 1
    if first >= 0:
        yield first, pages
