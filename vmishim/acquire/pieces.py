"""Pieces of guest memory in a file, and how to read a part of a guest's memory that may have holes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmishim.errors import FaultError
from vmishim.guests.layout import Range
from vmishim.memory.reader import PAGE_SIZE, PHYSICAL, MemoryReader

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


def read(reader: MemoryReader, wanted: Range) -> Got:
    """Read physical memory; what cannot be read is left out page by page.

    :raises LinkError: the guest could not be asked
    """
    found: list[tuple[int, bytes]] = []
    holes: list[Range] = []
    at, end = wanted
    while at < end:
        try:
            data = reader.read(at, end - at, PHYSICAL)
            hole = end
        except FaultError as fault:
            data = fault.data
            hole = at + len(data)
        if data:
            found.append((at, data))
        at = min((hole // PAGE_SIZE + 1) * PAGE_SIZE, end)
        if hole < at:
            holes.append(Range(hole, at))
    return Got(wanted, tuple(found), tuple(joined(holes)))
