"""The two formats of a dump, ELF core and LiME image, as values: where memory goes in the file, and the headers.

A dump is written in the order of addresses. Its headers are written last, because only then is it known what could not
be read. Unreadable memory is in no segment (ELF) and in no range (LiME), so a program that reads the dump fails there.

Source: ``elf(5)``; ``Documentation/admin-guide/kdump/vmcoreinfo.rst``; LiME's ``doc/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from typing import NamedTuple, Protocol

from vmishim.acquire.pieces import Piece, Run
from vmishim.memory.reader import ADDRESSES, PAGE_SIZE

DATA = 4 << 20
"""Offset of the first memory in an ELF core; before it there is room for the most program headers that a core can have
without a section header. What is not used is a hole of the file."""
NOTE = "VMISHIM"
"""Name of our note in an ELF core: JSON, see `vmishim.acquire.manifest.note`."""
NOTE_TYPE = 0x564D_5348
"""Its type, "VMSH". Programs take notes of type 1 for a CPU's registers, whatever their name is."""
RUNS_MAX = 1 << 18
"""Separate pieces of memory in one dump, as `vmishim.guests.dumps` reads at most."""


class Image(NamedTuple):
    """Where the kernel's image is, from ``_text`` to ``_end``."""

    virtual: int
    physical: int
    size: int


@dataclass(frozen=True)
class Described:
    """What the headers say beside where the memory is."""

    page_offset: int
    """Kernel virtual address of physical address 0."""
    image: Image
    vmcoreinfo: bytes
    note: bytes
    """The content of our own note."""


class Shape(Protocol):
    """A format."""

    start: int
    """Offset of the first piece, if it begins at a page."""

    def place(self, before: Piece | None, address: int) -> int:
        """The offset in the file of the memory at a guest physical address that comes after a piece."""
        ...

    def headers(self, runs: Sequence[Run], described: Described) -> Iterator[tuple[int, bytes]]:
        """All headers, as (offset in the file, bytes).

        :raises ValueError: there are too many separate pieces of memory
        """
        ...


# ELF

_HEADER = Struct("<4sBBB9xHHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_SECTION = Struct("<IIQQQQIIQQ")
_NOTE = Struct("<III")
_CORE, _X86_64, _LOAD, _PT_NOTE, _ALL = 4, 62, 1, 4, 7
_MANY = 0xFFFF
"""Number of program headers that means: see ``sh_info`` of the first section header (``PN_XNUM``)."""


class Elf:
    """An ELF core as ``/proc/vmcore`` gives one."""

    start = DATA

    def place(self, before: Piece | None, address: int) -> int:
        """Offsets are those of addresses within a page, so that segments can be mapped."""
        end = DATA if before is None else before.offset + before.size
        return end + (address - end) % PAGE_SIZE

    def headers(self, runs: Sequence[Run], described: Described) -> Iterator[tuple[int, bytes]]:
        """See `Shape.headers`. The kernel's image has the addresses at which it runs, all other memory those of the
        direct map."""
        loads = list(_loads(runs, described))
        if len(loads) > RUNS_MAX:
            raise ValueError(f"{len(loads)} separate pieces of memory; a core that can be read has at most {RUNS_MAX}")
        notes = note("VMCOREINFO", 0, described.vmcoreinfo) + note(NOTE, NOTE_TYPE, described.note)
        count = len(loads) + 1
        size = _HEADER.size + count * _PROGRAM.size
        many = count >= _MANY or size + len(notes) > DATA
        # The header stays at the start of the file. If the rest has no room there, it follows the memory.
        end = max((run.offset + run.end - run.address for run in runs), default=DATA)
        programs = _HEADER.size if not many else end + -end % PAGE_SIZE
        notes_at = programs + count * _PROGRAM.size
        table = _PROGRAM.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4)
        table += b"".join(
            _PROGRAM.pack(_LOAD, _ALL, offset, virtual, physical, length, length, 0)
            for virtual, physical, length, offset in loads
        )
        sections = notes_at + len(notes) + -len(notes) % 8 if count >= _MANY else 0
        yield (
            0,
            _HEADER.pack(
                *(b"\x7fELF", 2, 1, 1, _CORE, _X86_64, 1, 0, programs, sections, 0, _HEADER.size, _PROGRAM.size),
                *(min(count, _MANY), _SECTION.size if sections else 0, 1 if sections else 0, 0),
            ),
        )
        yield programs, table + notes
        if sections:
            yield sections, _SECTION.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0)


class _Load(NamedTuple):
    virtual: int
    physical: int
    size: int
    offset: int


def _loads(runs: Iterable[Run], described: Described) -> Iterator[_Load]:
    """Segments without overlaps, in the order of physical addresses: Volatility 3 searches them so."""
    image = described.image
    for address, end, offset in runs:
        cuts = sorted({address, end, *(at for at in image_bounds(image) if address < at < end)})
        for start, stop in pairwise(cuts):
            of_image = image.physical <= start < image.physical + image.size
            moved = image.virtual - image.physical if of_image else described.page_offset
            yield _Load((start + moved) % ADDRESSES, start, stop - start, offset + start - address)


def image_bounds(image: Image) -> tuple[int, int]:
    """Guest physical addresses of its first byte, and one past its last."""
    return image.physical, image.physical + image.size


def note(name: str, kind: int, content: bytes) -> bytes:
    """An ELF note."""
    raw = name.encode() + b"\0"
    padded = (part + bytes(-len(part) % 4) for part in (raw, content))
    return _NOTE.pack(len(raw), len(content), kind) + b"".join(padded)


# LiME

_RANGE = Struct("<4sIQQ8x")


class Lime:
    """A LiME image: each range of memory after a header of 32 bytes. It has no notes."""

    start = _RANGE.size

    def place(self, before: Piece | None, address: int) -> int:
        """After a gap there is a header."""
        if before is None:
            return _RANGE.size
        return before.offset + before.size + (0 if before.end == address else _RANGE.size)

    def headers(self, runs: Sequence[Run], described: Described) -> Iterator[tuple[int, bytes]]:
        """See `Shape.headers`."""
        if len(runs) > RUNS_MAX:
            raise ValueError(f"{len(runs)} separate pieces of memory; an image that can be read has at most {RUNS_MAX}")
        for address, end, offset in runs:
            yield offset - _RANGE.size, _RANGE.pack(b"EMiL", 1, address, end - 1)


SHAPES: dict[str, Shape] = {"elf": Elf(), "lime": Lime()}
"""By the name that ``--format`` takes."""
