"""Dumps of guest memory: ELF cores, and kdump's compressed format.

An ELF core (QEMU's ``dump-guest-memory``, ``virsh dump --memory-only``, a kernel's ``/proc/vmcore``) says where each
of its pieces belongs, and is mapped as it is. A compressed dump (``makedumpfile -c``, ``dump-guest-memory -z``) is
unpacked to a temporary file, with holes for pages that were left out. It may be "flattened", as makedumpfile writes it
to a pipe, and QEMU always.

Source: ``elf(5)``; ``diskdump_mod.h`` and ``makedumpfile.h`` of makedumpfile; ``dump/dump.c`` of QEMU.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from struct import Struct, calcsize, unpack_from
from typing import IO, NamedTuple

from vmishim.memory.reader import PAGE_SIZE

HIGHEST = 1 << 52
"""All physical addresses are below this."""
# A dump may be sparse, so its size says nothing about what it holds.
PROGRAMS_MAX = 1 << 18
"""Program headers of a core: each piece of memory is one."""
SEGMENTS_MAX = 1 << 20
"""Runs of dumped pages of a compressed dump; a dump without free and user pages has the most."""
RECORD_MIN = 1
"""Bytes of a record of a flattened dump: a hole is full of records without any."""
BITMAP_MAX = 1 << 30
"""Bytes of a compressed dump's bitmap, of 32 TiB of memory."""


class Segment(NamedTuple):
    """A piece of guest physical memory that is contiguous in the file."""

    start: int
    """Guest physical address."""
    end: int
    """One past its last byte."""
    offset: int
    """File offset of ``start``."""


@contextmanager
def unpacked(file: IO[bytes]) -> Iterator[tuple[IO[bytes], tuple[Segment, ...]]]:
    """The file that holds the memory itself, open for the length of the block, and its segments.

    :returns: ``file`` itself and no segments if it is a raw image, which does not say where its memory belongs
    :raises ValueError: a dump of an unknown format, or cut off
    :raises OSError: it cannot be read, or there is no room to unpack it
    """
    start = file.read(PAGE_SIZE)
    if start.startswith(b"\x7fELF"):
        yield file, _elf(file, start)
    elif start.startswith(_FLAT):
        with tempfile.TemporaryFile() as rearranged, tempfile.TemporaryFile() as memory:
            _unflatten(file, rearranged)
            yield memory, _expand(rearranged, memory)
    elif start.startswith(_KDUMP):
        with tempfile.TemporaryFile() as memory:
            yield memory, _expand(file, memory)
    else:
        yield file, ()


def _at(file: IO[bytes], offset: int, count: int) -> bytes:
    """:raises ValueError: the file ends before that"""
    # Checked before a buffer is allocated: a damaged dump may ask for any number of bytes.
    _check(file, offset, count)
    data = os.pread(file.fileno(), count, offset)
    while 0 < len(data) < count:  # one call gives 2 GiB at most
        more = os.pread(file.fileno(), count - len(data), offset + len(data))
        if not more:
            break
        data += more
    if len(data) != count:
        raise ValueError(f"the dump is cut off: {count} bytes are due at {offset}, {len(data)} are there")
    return data


def _check(file: IO[bytes], offset: int, count: int) -> None:
    """:raises ValueError: the file ends before that"""
    left = os.fstat(file.fileno()).st_size - offset
    if count > left:
        raise ValueError(f"the dump is cut off: {count} bytes are due at {offset}, {max(left, 0)} are there")


# ELF

_HEADER = Struct("<4sBB10xHHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_SECTION_INFO = Struct("<44xI")
_CORE, _LOAD, _CLASS_64, _LITTLE, _MANY = 4, 1, 2, 1, 0xFFFF


def _elf(file: IO[bytes], start: bytes) -> tuple[Segment, ...]:
    if len(start) < _HEADER.size:
        raise ValueError("the dump is cut off within its header")
    _, bits, order, kind, _, _, _, programs, sections, _, _, size, count, *_ = _HEADER.unpack_from(start)
    if kind != _CORE or bits != _CLASS_64 or order != _LITTLE or size != _PROGRAM.size:
        raise ValueError("this is ELF, but not a 64-bit core with a guest's memory")
    if count == _MANY:
        (count,) = _SECTION_INFO.unpack(_at(file, sections, _SECTION_INFO.size))
    if count > PROGRAMS_MAX:
        raise ValueError(f"this ELF core has {count} pieces of memory, more than the limit of {PROGRAMS_MAX}")
    length = os.fstat(file.fileno()).st_size
    found = []
    for part, _, offset, _, physical, stored, _, _ in _PROGRAM.iter_unpack(_at(file, programs, count * size)):
        end = physical + min(stored, max(length - offset, 0))
        if part == _LOAD and physical < end <= HIGHEST:
            found.append(Segment(physical, end, offset))
    if not found:
        raise ValueError("this ELF core holds no memory")
    return tuple(_apart(sorted(found)))


def _apart(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Segments in order, without overlaps: a kernel's own core has its text a second time, at its virtual address."""
    last = 0
    for start, end, offset in segments:
        if end > last:
            skipped = max(last - start, 0)
            yield Segment(start + skipped, end, offset + skipped)
            last = end


# kdump

_KDUMP, _FLAT = b"KDUMP   ", b"makedumpfile\0\0\0\0"
_FLAT_HEADER, _FLAT_RECORD = 4096, Struct(">qq")
_COUNTS = Struct("<424xIIIII")
"""In the header: status, bytes of a block, blocks of the sub-header, blocks of the bitmaps, pages."""
_PAGES_64 = 96
"""Offset of the number of pages in the sub-header, since version 6, for more than 16 TiB."""
_DESCRIPTOR = Struct("<QII8x")
_STORED, _ZLIB, _KINDS = 0, 1, {2: "LZO", 4: "Snappy", 0x20: "Zstandard"}
_CHUNK = 1 << 20
_MOST_PAGES = HIGHEST // PAGE_SIZE


def _unflatten(file: IO[bytes], target: IO[bytes]) -> None:
    """Put the records of a flattened dump where they belong."""
    at = _FLAT_HEADER
    while True:
        offset, size = _FLAT_RECORD.unpack(_at(file, at, _FLAT_RECORD.size))
        at += _FLAT_RECORD.size
        if offset < 0 or size < 0:
            return  # the record that ends it
        if size < RECORD_MIN:
            raise ValueError("a record of the dump is empty")
        if offset + size > HIGHEST:
            raise ValueError(f"a record of the dump belongs at {offset:#x}, above all physical memory")
        for done in range(0, size, _CHUNK):
            part = _at(file, at + done, min(_CHUNK, size - done))
            os.pwrite(target.fileno(), part, offset + done)
        at += size


def _expand(file: IO[bytes], target: IO[bytes]) -> tuple[Segment, ...]:
    """Write every page of a compressed dump to its guest physical address."""
    header = _at(file, 0, _COUNTS.size)
    if not header.startswith(_KDUMP):
        raise ValueError("this flattened dump is not in kdump's format")
    version = unpack_from("<I", header, len(_KDUMP))[0]
    _, block, sub_blocks, bitmap_blocks, pages = _COUNTS.unpack(header)
    if block != PAGE_SIZE:
        raise ValueError(f"this dump has pages of {block} bytes, so it is not from x86-64")
    if version >= 6:
        (pages,) = unpack_from("<Q", _at(file, block + _PAGES_64, calcsize("<Q")))
    # Two bitmaps: the first has the pages of the machine, the second those that were dumped.
    half = bitmap_blocks * block // 2
    _check(file, (1 + sub_blocks) * block + half, half)
    if half > BITMAP_MAX:
        raise ValueError(f"the dump's bitmap has {half} bytes, more than the limit of {BITMAP_MAX}")
    runs = _runs(file, (1 + sub_blocks) * block + half, min(pages, 8 * half, _MOST_PAGES))
    segments = tuple(islice(runs, SEGMENTS_MAX + 1))
    if len(segments) > SEGMENTS_MAX:
        raise ValueError(f"the dump has more than {SEGMENTS_MAX} separate pieces of memory")
    if not segments:
        raise ValueError("this dump holds no memory")
    count = sum(end - start for start, end, _ in segments) // PAGE_SIZE
    descriptors_at = (1 + sub_blocks + bitmap_blocks) * block
    numbers = (page for start, end, _ in segments for page in range(start, end, PAGE_SIZE))
    os.ftruncate(target.fileno(), segments[-1].end)
    zeros = -1
    left = os.fstat(file.fileno()).st_size
    for first in range(0, count, _CHUNK // _DESCRIPTOR.size):
        part = min(_CHUNK // _DESCRIPTOR.size, count - first)
        descriptors = _at(file, descriptors_at + first * _DESCRIPTOR.size, part * _DESCRIPTOR.size)
        for offset, size, flags in _DESCRIPTOR.iter_unpack(descriptors):
            page = next(numbers)
            if offset == zeros:
                continue  # QEMU stores one page for all that are zero; they stay holes
            if size > PAGE_SIZE:
                raise ValueError(f"a page of the dump has {size} bytes")
            left -= size
            if left < 0:
                raise ValueError("pages of the dump share their bytes")
            data = _page(_at(file, offset, size), flags)
            if data.strip(b"\0"):
                os.pwrite(target.fileno(), data, page)
            else:
                zeros = offset
    return segments


def _page(data: bytes, flags: int) -> bytes:
    if flags & _ZLIB:
        try:
            data = zlib.decompressobj().decompress(data, PAGE_SIZE)
        except zlib.error as error:
            raise ValueError(f"a page of the dump cannot be unpacked: {error}") from None
    elif flags != _STORED:
        kind = next((name for bit, name in _KINDS.items() if flags & bit), f"method {flags:#x}")
        raise ValueError(f"this dump is compressed with {kind}, which is not supported; use zlib (makedumpfile -c)")
    if len(data) != PAGE_SIZE:
        raise ValueError(f"a page of the dump has {len(data)} bytes")
    return data


def _runs(file: IO[bytes], bitmap_at: int, pages: int) -> Iterator[Segment]:
    """Pages whose bits are set in the bitmap, adjacent ones joined."""
    first = -1
    for start in range(0, pages, 8 * _CHUNK):
        bits = min(8 * _CHUNK, pages - start)
        bitmap = _at(file, bitmap_at + start // 8, (bits + 7) // 8)
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
                    yield Segment(first * PAGE_SIZE, (start + at) * PAGE_SIZE, first * PAGE_SIZE)
                first = start + at if first < 0 else -1
            at += 1
    if first >= 0:
        yield Segment(first * PAGE_SIZE, pages * PAGE_SIZE, first * PAGE_SIZE)
