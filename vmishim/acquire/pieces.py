"""Pieces of guest memory in a file, and how to read a part of a guest's memory that may have holes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from vmishim.errors import FaultError
from vmishim.guests.layout import Range
from vmishim.memory.reader import PAGE_SIZE, PHYSICAL, ScatterReader

CHUNK = 1 << 20
"""Bytes of the largest piece, and of the largest reply of an agent (`vmishim.wire.messages.BULK_MAX`)."""


class Piece(NamedTuple):
    """Guest memory as it is in the file."""

    address: int
    """Guest physical address."""
    size: int
    """Bytes, at most `CHUNK`."""
    offset: int
    """Offset in the file."""
    sha256: str
    """Of these bytes, hexadecimal."""

    @property
    def end(self) -> int:
        """Guest physical address one past its last byte."""
        return self.address + self.size


class Run(NamedTuple):
    """Adjacent pieces that are adjacent in the file too."""

    address: int
    end: int
    offset: int


def runs(pieces: Iterable[Piece]) -> list[Run]:
    """Pieces, in the order of addresses, joined where they are adjacent in memory and in the file."""
    found: list[Run] = []
    for piece in pieces:
        if found:
            last = found[-1]
            if last.end == piece.address and last.offset + last.end - last.address == piece.offset:
                found[-1] = last._replace(end=piece.end)
                continue
        found.append(Run(piece.address, piece.end, piece.offset))
    return found


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges, in order, joined where one begins at the end of another."""
    found: list[Range] = []
    for each in ranges:
        if found and found[-1].end == each.start:
            found[-1] = Range(found[-1].start, each.end)
        else:
            found.append(each)
    return found


def total(ranges: Iterable[Range]) -> int:
    """Bytes of all of them."""
    return sum(each.end - each.start for each in ranges)


def chunks(ranges: Iterable[Range], done: int = 0) -> Iterator[Range]:
    """What to read, one request after another: ranges cut at multiples of `CHUNK`.

    :param done: leave out the memory below this address
    """
    for start, end in ranges:
        at = max(start, done)
        while at < end:
            step = min(end, (at // CHUNK + 1) * CHUNK)
            yield Range(at, step)
            at = step


class Got(NamedTuple):
    """What a guest gave of a part of its memory."""

    wanted: Range
    found: tuple[tuple[int, bytes], ...]
    """(guest physical address, bytes), in the order of addresses."""
    unreadable: tuple[Range, ...]
    """All of the rest."""


def read(reader: ScatterReader, wanted: Range, page_offset: int | None = None) -> Got:
    """Read physical memory; what cannot be read is left out page by page.

    :param wanted: at most `CHUNK` bytes
    :param page_offset: kernel virtual address of physical address 0: behind the first hole all pages are asked for by
        one or two scatter reads. None: page by page, where no request has to go to the guest
    :raises LinkError: the guest could not be asked
    """
    at, end = wanted
    try:
        return Got(wanted, ((at, reader.read(at, end - at, PHYSICAL)),), ())
    except FaultError as fault:
        found = [(at, fault.data)] if fault.data else []
        at += len(fault.data)
    at = min((at // PAGE_SIZE + 1) * PAGE_SIZE, end)
    if page_offset is not None:
        pages = range(at, end - PAGE_SIZE + 1, PAGE_SIZE)
        found += ((page - page_offset, data) for page, data in reader.scatter([page_offset + page for page in pages]))
        at = pages[-1] + PAGE_SIZE if pages else at
    for page in range(at, end, PAGE_SIZE):
        with suppress(FaultError):
            found.append((page, reader.read(page, min(PAGE_SIZE, end - page), PHYSICAL)))
    found = list(_whole(found))
    starts = [address for address, _ in found]
    ends = [address + len(data) for address, data in found]
    holes = (Range(*hole) for hole in zip([wanted.start, *ends], [*starts, end], strict=True))
    return Got(wanted, tuple(found), tuple(hole for hole in holes if hole.start < hole.end))


def _whole(parts: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Parts, in the order of addresses, joined where one begins at the end of another."""
    begun, whole = 0, bytearray()
    for address, data in parts:
        if whole and address != begun + len(whole):
            yield begun, bytes(whole)
            whole = bytearray()
        begun = begun if whole else address
        whole += data
    if whole:
        yield begun, bytes(whole)
