"""Dumps of a small machine, made by hand: where their memory belongs, and what is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from vmishim.errors import FaultError, LibvmiError
from vmishim.guests.dumps import Segment
from vmishim.guests.ramfile import Ram

PAGE = 4096
STORED, ZLIB, LZO = 0, 1, 2


def page(number: int) -> bytes:
    """What is in a page: that no two have in common."""
    return struct.pack("<Q", number + 1) * (PAGE // 8)


def elf(segments: dict[int, bytes], kind: int = 4, count: int | None = None) -> bytes:
    """A core with these pieces, by physical address; ``count`` in its header instead of their number."""
    size = 64 + 56 * len(segments) + 64
    ident = b"\x7fELF\2\1\1" + bytes(9)
    sections_at = 64 + 56 * len(segments)
    shown = len(segments) if count is None else count
    header = ident + struct.pack("<HHIQQQIHHHHHH", kind, 62, 1, 0, 64, sections_at, 0, 64, 56, shown, 64, 1, 0)
    programs, content = b"", b""
    for address, data in segments.items():
        programs += struct.pack("<IIQQQQQQ", 1, 7, size + len(content), 0, address, len(data), len(data), 0)
        content += data
    section = bytes(44) + struct.pack("<I", len(segments)) + bytes(16)
    return header + programs + section + content


def kdump(pages: dict[int, bytes], method: int = ZLIB) -> bytes:
    """A compressed dump of these pages by number, as version 6 of the format."""
    most = max(pages) + 1
    bits = bytearray(PAGE)
    for number in pages:
        bits[number // 8] |= 1 << number % 8
    header = b"KDUMP   " + struct.pack("<I", 6) + bytes(390 + 22) + struct.pack("<IIIII", 0, PAGE, 1, 2, 0)
    sub_header = bytes(96) + struct.pack("<Q", most)
    descriptors, content = b"", b""
    at = 5 * PAGE
    for number in sorted(pages):
        data = zlib.compress(pages[number]) if method == ZLIB else pages[number]
        descriptors += struct.pack("<QIIQ", at + len(content), len(data), method, 0)
        content += data
    blocks = [header, sub_header, b"\xff" * PAGE, bytes(bits), descriptors]
    return b"".join(block.ljust(PAGE, b"\0") for block in blocks) + content


def flattened(dump: bytes, piece: int = 1000) -> bytes:
    """The same as makedumpfile writes it to a pipe, its pieces not in order."""
    records = [
        struct.pack(">qq", at, len(dump[at : at + piece])) + dump[at : at + piece] for at in range(0, len(dump), piece)
    ]
    header = b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)
    return header.ljust(4096, b"\0") + b"".join(records[1:] + records[:1]) + struct.pack(">qq", -1, -1)


def ram(folder: Path, data: bytes) -> Ram:
    (folder / "dump").write_bytes(data)
    return Ram(folder / "dump")


def test_an_elf_core_says_where_its_memory_is(tmp_path: Path) -> None:
    memory = ram(tmp_path, elf({0x10_0000: page(1) + page(2), 0x1000: page(0), 1 << 32: page(9)}))
    assert [(start, end) for start, end, _ in memory.segments] == [
        (0x1000, 0x2000),
        (0x10_0000, 0x10_2000),
        (1 << 32, (1 << 32) + PAGE),
    ]
    assert memory.read(0x10_0FF8, 16) == page(1)[:8] + page(2)[:8]
    assert memory.read((1 << 32) + 8, 8) == page(9)[:8]
    for address in (0, 0x2000, 0x10_2000, (1 << 32) + PAGE):
        with pytest.raises(FaultError):
            memory.read(address, 1)


def test_neighbours_are_read_as_one(tmp_path: Path) -> None:
    memory = ram(tmp_path, elf({0x2000: page(2), 0x1000: page(1), 0x3000: page(3)}))
    assert memory.read(0x1800, 0x2000) == page(1)[:0x800] + page(2) + page(3)[:0x800]
    with pytest.raises(FaultError) as fault:
        memory.read(0x2FF8, 0x2000)
    assert (fault.value.address, fault.value.data) == (0x4000, page(2)[:8] + page(3))


def test_memory_that_is_there_twice_is_there_once(tmp_path: Path) -> None:
    memory = ram(tmp_path, elf({0x2000: page(2), 0x1000: page(1) + page(2) + page(3), 0x2800: page(2)[:0x100]}))
    assert [(start, end) for start, end, _ in memory.segments] == [(0x1000, 0x4000)]
    assert memory.read(0x1000, 0x3000) == page(1) + page(2) + page(3)


def test_a_core_with_very_many_pieces(tmp_path: Path) -> None:
    """Their number is then in the first section (``PN_XNUM``)."""
    memory = ram(tmp_path, elf({0x1000: page(1), 0x3000: page(3)}, count=0xFFFF))
    assert memory.read(0x3000, 8) == page(3)[:8]


def test_a_core_that_is_cut_off_has_what_is_there(tmp_path: Path) -> None:
    memory = ram(tmp_path, elf({0x1000: page(1) + page(2)})[: -PAGE // 2])
    assert memory.read(0x2000, PAGE // 2) == page(2)[: PAGE // 2]
    with pytest.raises(FaultError):
        memory.read(0x2000 + PAGE // 2, 1)


PAGES = {0: page(0), 1: bytes(PAGE), 2: page(2), 9: page(9), 31: bytes(PAGE), 64: page(64), 65: page(65)}


@pytest.mark.parametrize("method", [ZLIB, STORED])
@pytest.mark.parametrize("flat", [False, True])
def test_a_compressed_dump_is_unpacked(tmp_path: Path, method: int, flat: bool) -> None:
    data = kdump(PAGES, method)
    memory = ram(tmp_path, flattened(data) if flat else data)
    assert memory.segments == tuple(
        Segment(first * PAGE, end * PAGE, first * PAGE) for first, end in ((0, 3), (9, 10), (31, 32), (64, 66))
    )
    for number, content in PAGES.items():
        assert memory.read(number * PAGE, PAGE) == content
    for number in (3, 8, 10, 66):
        with pytest.raises(FaultError):
            memory.read(number * PAGE, 1)


REFUSED = {
    "an ELF file that is not a core": (elf({0: page(0)}, kind=2), "not a 64-bit core"),
    "a core without memory": (elf({}), "holds no memory"),
    "a core cut off within its table": (elf({0x1000: page(1)})[:100], "cut off"),
    "a header only": (b"\x7fELF", "cut off"),
    "a compressed dump cut off within a page": (kdump(PAGES)[:-4], "cut off"),
    "a flattened dump without its end": (flattened(kdump(PAGES))[:-16], "cut off"),
    "pages that are no zlib": (kdump(PAGES)[: 5 * PAGE] + bytes(7 * PAGE), "cannot be unpacked"),
    "pages packed by LZO": (kdump(PAGES, LZO), "compressed with LZO"),
    "short pages": (kdump({0: b"short"}, STORED), "5 bytes"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why(tmp_path: Path, what: str) -> None:
    data, words = REFUSED[what]
    with pytest.raises(LibvmiError, match=f"^VM_NOT_FOUND: .*{words}"):
        ram(tmp_path, data)


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (424 + 12, struct.pack("<I", 0xFFFF_FFFF), "cut off"),  # blocks of its bitmaps: 8 TiB of them
        (4 * PAGE + 8, struct.pack("<I", 1 << 30), "has 1073741824 bytes"),  # of its first page
        (4 * PAGE, struct.pack("<Q", 2**63), "cut off"),  # where that is
        (4 * PAGE, struct.pack("<QI", 2**63, 0), "cut off"),  # nothing, behind the end of all files
    ],
)
def test_a_dump_that_promises_more_than_a_file_can_hold(tmp_path: Path, at: int, value: bytes, what: str) -> None:
    dump = bytearray(kdump({0: page(0), 3: page(3)}))
    dump[at : at + len(value)] = value
    path = tmp_path / "dump"
    path.write_bytes(dump)
    with pytest.raises(LibvmiError, match=what):
        Ram(path)


def test_a_flattened_dump_that_reaches_beyond_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(flattened(b"").ljust(PAGE, b"\0")[:PAGE] + struct.pack(">qq", 2**63 - 1, 4) + b"evil")
    with pytest.raises(LibvmiError, match="above all physical memory"):
        Ram(path)
