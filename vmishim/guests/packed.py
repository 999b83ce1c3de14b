"""Memory that its file holds packed: unpacked block by block as it is read, with a bounded cache and no copy on disk.

Memory is addressed by its *offset*: where it would be if every block of the file were unpacked, one after another. The
file is hostile: a block may be damaged, or claim any size, and the records of a flattened dump may be any number.
"""

from __future__ import annotations

import importlib
import logging
import os
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple, Protocol

from vmishim.errors import LibvmiError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Bytes read or unpacked at once in a search."""
CHUNKS_MAX = 80
"""Chunks that searches keep: a kernel's image, and what is searched for its page tables."""
CACHED = 16 << 20
"""Bytes of unpacked blocks that are kept for each file."""
BLOCK_MAX = 64 << 10
"""Bytes of a block: a page of a kdump, or 64 KiB of Snappy's framing."""
OVERHEAD = 4096
"""Bytes that a packed block may take more than the block: a header, a checksum."""
DAMAGED_MAX = 256
"""Damaged blocks that a search passes over. More than a few mean that the file is not what it says."""


class DamagedError(ValueError):
    """A block cannot be unpacked.

    :ivar offset: the first byte that cannot be had
    """

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset


class MissingPackageError(ValueError):
    """The memory is packed by a method for which a package must be installed first."""

    def __init__(self, method: str, package: str) -> None:
        super().__init__(f"it is packed with {method}, which needs the package {package}: pip install {package}")


class File(Protocol):
    """Bytes by offset, read as asked for."""

    @property
    def size(self) -> int: ...

    def at(self, offset: int, count: int) -> bytes:
        """:raises ValueError: the file ends before that; nothing is allocated then"""
        ...

    def close(self) -> None: ...


class Plain:
    """A file as it is.

    :param descriptor: closed with it
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def data(self) -> Iterator[tuple[int, int]]:
        """(start, end) of the parts that are not holes."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self.descriptor, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            at = os.lseek(self.descriptor, start, os.SEEK_HOLE)
            yield start, at

    def at(self, offset: int, count: int) -> bytes:
        """See ``File.at``."""
        check(self, offset, count)
        data = os.pread(self.descriptor, count, offset) if count else b""
        while 0 < len(data) < count:  # one call gives 2 GiB at most
            more = os.pread(self.descriptor, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        if len(data) != count:
            raise ValueError(f"the file is cut off: {count} bytes are due at {offset}, {len(data)} are there")
        return data

    def close(self) -> None:
        """Close the file."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def check(file: File, offset: int, count: int) -> None:
    """:raises ValueError: the file ends before that"""
    left = max(file.size - offset, 0)
    if count > left or offset < 0:
        raise ValueError(f"the file is cut off: {count} bytes are due at {offset}, {left} are there")


# A flattened dump: the file as records, in any order, each with the offset at which it belongs

FLAT_HEADER, RECORD = 4096, Struct(">qq")
RECORD_MIN = 1
"""Bytes of a record: a hole is full of records without any."""
RECORDS_MAX = 1 << 21
"""Records of a flattened dump. QEMU writes one for each 16 KiB."""
HIGHEST = 1 << 52
"""No record, and no physical address, is above this."""


class _Pieces(NamedTuple):
    """Parts of a file that belong elsewhere, each a number in three arrays."""

    starts: array[int]
    ends: array[int]
    sources: array[int]

    @classmethod
    def none(cls) -> _Pieces:
        return cls(array("Q"), array("Q"), array("Q"))

    def add(self, start: int, end: int, source: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.sources.append(source)


class Flattened:
    """A flattened dump, as the file that it was made of. Of records that overlap, the last one counts; what no record
    covers is zero, as in a file with holes.

    :param file: closed with it
    :raises ValueError: it is cut off, or a record is not valid

    Source: ``makedumpfile.h`` of makedumpfile, ``makedumpfile_header`` and ``makedumpfile_data_header``.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._pieces = _in_order(_records(file))
        self.size: int = max(self._pieces.ends, default=0)

    def at(self, offset: int, count: int) -> bytes:
        """See ``File.at``."""
        check(self, offset, count)
        starts, ends, sources = self._pieces
        parts: list[bytes] = []
        at, end = offset, offset + count
        number = max(bisect_right(starts, offset) - 1, 0)
        while at < end:
            if at < starts[number]:
                parts.append(bytes(min(starts[number], end) - at))
            elif at < ends[number]:
                parts.append(self._file.at(sources[number] + at - starts[number], min(ends[number], end) - at))
            else:
                number += 1
                continue
            at += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __getitem__(self, part: slice) -> bytes:
        return self.at(part.start, part.stop - part.start)

    def scan(self, start: int, end: int) -> bytes:
        """See ``Store.scan``."""
        return self[start:end]

    def find(self, pattern: bytes, start: int, end: int) -> int:
        """See ``Store.find``."""
        return _find(self.scan, pattern, start, end)

    def forget(self) -> None:
        """See ``Store.forget``: nothing is kept."""

    def close(self) -> None:
        """See ``File.close``."""
        self._file.close()


def _records(file: File) -> _Pieces:
    """The records, in the order in which they were written."""
    records = _Pieces.none()
    at = FLAT_HEADER
    for _ in range(RECORDS_MAX):
        offset, size = RECORD.unpack(file.at(at, RECORD.size))
        at += RECORD.size
        if offset < 0 or size < 0:
            return records  # the record that ends it
        if size < RECORD_MIN:
            raise ValueError("a record of the dump is empty")
        if offset + size > HIGHEST:
            raise ValueError(f"a record of the dump belongs at {offset:#x}, above all physical memory")
        check(file, at, size)
        records.add(offset, offset + size, at)
        at += size
    raise ValueError(f"the dump has more than {RECORDS_MAX} records; rearrange it: makedumpfile -R OUT < FILE")


def _in_order(records: _Pieces) -> _Pieces:
    """The records in the order of where they belong, without what later ones replace."""
    starts, ends, sources = records
    order = sorted(range(len(starts)), key=starts.__getitem__)
    pieces = _Pieces.none()
    if all(ends[one] <= starts[other] for one, other in pairwise(order)):
        for number in order:
            pieces.add(starts[number], ends[number], sources[number])
        return pieces
    waiting: list[int] = []  # negated numbers of the records that may cover `at`: the last one first
    at = 0
    for number in [*order, -1]:
        until = starts[number] if number >= 0 else HIGHEST
        while waiting and at < until:
            last = -waiting[0]
            end = min(ends[last], until)
            if at < end:
                pieces.add(at, end, sources[last] + at - starts[last])
                at = end
            if ends[last] <= at:
                heappop(waiting)
        at = until
        if number >= 0:
            heappush(waiting, -number)
    return pieces


# Packed blocks

STORED, ZLIB, LZO, SNAPPY, ZSTD, FRAMED = 0, 1, 2, 4, 0x20, -1
"""How a block is packed: flags of a kdump's pages; ``FRAMED`` is a chunk of Snappy's framing, with its checksum."""
_PACKAGES = {LZO: ("LZO", "lzallright"), SNAPPY: ("Snappy", "cramjam"), ZSTD: ("Zstandard", "cramjam")}
_PACKAGES[FRAMED] = _PACKAGES[SNAPPY]
_FRAMING = b"\xff\x06\x00\x00sNaPpY"


def needs(method: int) -> None:
    """Check that blocks packed by this method can be unpacked here.

    :raises MissingPackageError: they cannot
    :raises ValueError: nothing is known of the method
    """
    _unpacker(method)


@lru_cache
def _unpacker(method: int) -> Callable[[bytes, int], bytes]:
    """A function from a packed block and its length to the block."""
    if method == STORED:
        return lambda data, _: data
    if method == ZLIB:
        return lambda data, size: zlib.decompressobj().decompress(data, size + 1)
    if method not in _PACKAGES:
        raise ValueError(f"its pages are packed by an unknown method, {method:#x}")
    name, package = _PACKAGES[method]
    try:
        module: Any = importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(name, package) from None
    if method == LZO:
        # The size is a hint only, but a block of LZO grows by a factor of 256 at most.
        return lambda data, size: bytes(module.LZOCompressor.decompress(data, size))
    into = {SNAPPY: "snappy.decompress_raw_into", ZSTD: "zstd.decompress_into", FRAMED: "snappy.decompress_into"}
    of, function = into[method].split(".")
    unpack_into = getattr(getattr(module, of), function)
    front = _FRAMING if method == FRAMED else b""

    def unpack(data: bytes, size: int) -> bytes:
        block = bytearray(size)
        return bytes(block[: unpack_into(front + data, block)])

    return unpack


def unpack(data: bytes, method: int, size: int) -> bytes:
    """A block of ``size`` bytes.

    :raises MissingPackageError: a package must be installed for this
    :raises ValueError: it is damaged
    """
    unpacker = _unpacker(method)
    try:
        block = unpacker(data, size)
    except Exception as error:  # each library raises its own
        raise ValueError(f"it cannot be unpacked: {error!s:.80}") from None
    if len(block) != size:
        raise ValueError(f"it has {len(block)} bytes, not {size}")
    return block


class Block(NamedTuple):
    """Where a block is in the file."""

    offset: int
    size: int
    """Bytes that it takes there."""
    method: int


class Store(Protocol):
    """Guest memory by offset. A ``mmap`` is one as well, but for ``scan``."""

    def __getitem__(self, part: slice) -> bytes:
        """Bytes from ``part.start`` to ``part.stop``. :raises DamagedError: some cannot be unpacked"""
        ...

    def scan(self, start: int, end: int) -> bytes:
        """The same for a search: what is damaged is zero.

        :raises LibvmiError: too much is damaged
        """
        ...

    def find(self, pattern: bytes, start: int, end: int) -> int:
        """The first place of ``pattern`` between two offsets, or -1. :raises LibvmiError: see ``scan``"""
        ...

    def forget(self) -> None:
        """No more searches are to be expected."""
        ...

    def close(self) -> None: ...


@dataclass
class _Search:
    """What a search may still cost."""

    room: int
    """Packed bytes that it may still unpack: each block has its own."""
    damaged: int = 0
    """Damaged blocks so far."""


class Packed:
    """Packed blocks as memory. Implements ``Store``.

    :param file: closed with it
    :param blocks: the packed blocks from one number to another
    :param starts: offset of each block, and the end of the last: any sequence, such as a ``range``
    """

    def __init__(self, file: File, blocks: Callable[[int, int], list[Block]], starts: Sequence[int]) -> None:
        self._file, self._blocks, self._starts = file, blocks, starts
        self._each = starts.step if isinstance(starts, range) else 0
        self._cached = lru_cache(max(CACHED // (self._each or BLOCK_MAX), 1))(self._one)
        self._warned = False
        self._size = starts[-1]
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._zeros, self._zero_data = Block(-1, 0, 0), b""
        """A packed block that is all zeros, and its bytes: QEMU stores one for all such pages, makedumpfile each."""

    def __getitem__(self, part: slice) -> bytes:
        start, end = part.start, part.stop
        number = self._number(start)
        first = self._starts[number]
        if end <= self._starts[number + 1]:
            return self._cached(number)[start - first : end - first]
        parts = []
        while first < end:
            parts.append(self._cached(number))
            number += 1
            first = self._starts[number]
        return b"".join(parts)[start - self._starts[self._number(start)] :][: end - start]

    def scan(self, start: int, end: int) -> bytes:
        """See ``Store.scan``."""
        return self._scan(_Search(self._file.size), start, end)

    def find(self, pattern: bytes, start: int, end: int) -> int:
        """See ``Store.find``."""
        return _find(partial(self._scan, _Search(self._file.size)), pattern, start, end)

    def _scan(self, search: _Search, start: int, end: int) -> bytes:
        first = start - start % CHUNK
        parts = [self._chunk(search, at) for at in range(first, end, CHUNK)]
        if parts:
            parts[-1] = parts[-1][: end - first - CHUNK * (len(parts) - 1)]
            parts[0] = parts[0][start - first :]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, search: _Search, at: int) -> bytes:
        """What a search sees of the memory from an offset on, a multiple of ``CHUNK``. Searches come back to the kernel
        several times, so the last chunks are kept until ``forget``.
        """
        if at in self._chunks:
            self._chunks.move_to_end(at)
            return self._chunks[at]
        end = min(at + CHUNK, self._size)
        low, high = self._number(at), self._number(end - 1) + 1
        parts = []
        for number, block in enumerate(self._blocks(low, high), low):
            size = self._starts[number + 1] - self._starts[number]
            parts.append(self._searched(search, block, size))
        skipped = at - self._starts[low]
        data = b"".join(parts)
        self._chunks[at] = data if len(data) == end - at else data[skipped : skipped + end - at]
        if len(self._chunks) > CHUNKS_MAX:
            self._chunks.popitem(last=False)
        return self._chunks[at]

    def _searched(self, search: _Search, block: Block, size: int) -> bytes:
        if block == self._zeros:
            return bytes(size)
        search.room -= block.size
        if search.room < 0:
            raise LibvmiError("OS: gave up searching the guest's memory: pages of the dump share their bytes")
        try:
            data = self._packed(block, size)
            if block.method == self._zeros.method and data == self._zero_data:
                return bytes(size)
            unpacked = unpack(data, block.method, size)
        except MissingPackageError as error:
            raise LibvmiError(f"OS: the guest's memory cannot be read: {error}") from None
        except ValueError as error:
            search.damaged += 1
            if search.damaged > DAMAGED_MAX:
                raise LibvmiError(
                    f"OS: gave up searching the guest's memory: more than {DAMAGED_MAX} pages of the dump are damaged; "
                    f"of the last one, {error}"
                ) from None
            return bytes(size)
        if not unpacked.strip(b"\0"):
            self._zeros, self._zero_data = block, data
        return unpacked

    def forget(self) -> None:
        """Forget what searches kept."""
        self._chunks.clear()

    def close(self) -> None:
        """Close the file, forget what was kept."""
        self._cached.cache_clear()
        self.forget()
        self._file.close()

    def _number(self, offset: int) -> int:
        return offset // self._each if self._each else bisect_right(self._starts, offset) - 1

    def _one(self, number: int) -> bytes:
        (block,) = self._blocks(number, number + 1)
        start = self._starts[number]
        try:
            size = self._starts[number + 1] - start
            return unpack(self._packed(block, size), block.method, size)
        except ValueError as error:
            if not self._warned:
                self._warned = True
                log.warning("a page or block of the file is damaged, so its memory is unreadable: %s", error)
            raise DamagedError(start, str(error)) from None

    def _packed(self, block: Block, size: int) -> bytes:
        if not 0 < block.size <= size + OVERHEAD:
            raise ValueError(f"it has {block.size} bytes")
        return self._file.at(block.offset, block.size)


def _find(scan: Callable[[int, int], bytes], pattern: bytes, start: int, end: int) -> int:
    """The first place of ``pattern`` between two offsets, or -1; reads a chunk at a time."""
    tail = b""
    at = start
    while at < end:
        until = min(at - at % CHUNK + CHUNK, end)
        chunk = scan(at, until)
        across = tail + chunk[: len(pattern) - 1]  # a match may be in two chunks
        found = across.find(pattern)
        if found >= 0:
            return at - len(tail) + found
        found = chunk.find(pattern)
        if found >= 0:
            return at + found
        tail = (tail + chunk[1 - len(pattern) :])[1 - len(pattern) :] if len(pattern) > 1 else b""
        at = until
    return -1
