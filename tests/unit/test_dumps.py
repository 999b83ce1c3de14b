"""Dumps of a small machine, made by hand: where their memory belongs, and what is refused."""

from __future__ import annotations

import itertools
import logging
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ground.images import avml, lime
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests import formats
from vmishim.guests import packed as unpacking
from vmishim.guests.dumps import ZEROS, Segment
from vmishim.guests.ramfile import Ram

PAGE = 4096
cramjam = pytest.importorskip("cramjam", reason="pip install 'vmishim[dumps]', or run ci/setup again")
lzallright = pytest.importorskip("lzallright", reason="pip install 'vmishim[dumps]', or run ci/setup again")

STORED, ZLIB, LZO, SNAPPY, ZSTD = METHODS = 0, 1, 2, 4, 0x20
UNKNOWN = 0x100
CHANCE = random.Random(1)


def page(number: int) -> bytes:
    """What is in a page: that no two have in common."""
    return struct.pack("<Q", number + 1) * (PAGE // 8)


def elf(
    segments: dict[int, bytes], kind: int = 4, count: int | None = None, *, zeros: int = 0, at: int | None = None
) -> bytes:
    """A core with these pieces, by physical address.

    :param count: in its header instead of their number
    :param zeros: bytes that each piece has after those in the file
    :param at: offset of the first
    """
    size = at or 64 + 56 * len(segments) + 64
    ident = b"\x7fELF\2\1\1" + bytes(9)
    sections_at = 64 + 56 * len(segments)
    shown = len(segments) if count is None else count
    header = ident + struct.pack("<HHIQQQIHHHHHH", kind, 62, 1, 0, 64, sections_at, 0, 64, 56, shown, 64, 1, 0)
    programs, content = b"", b""
    for address, data in segments.items():
        programs += struct.pack("<IIQQQQQQ", 1, 7, size + len(content), 0, address, len(data), len(data) + zeros, 0)
        content += data
    section = bytes(44) + struct.pack("<I", len(segments)) + bytes(16)
    return (header + programs + section).ljust(size, b"\0") + content


def packed(data: bytes, method: int) -> bytes:
    """A page as a kdump has it."""
    if method == LZO:
        return bytes(lzallright.LZOCompressor().compress(data))
    if method == SNAPPY:
        return bytes(cramjam.snappy.compress_raw(data))
    if method == ZSTD:
        return bytes(cramjam.zstd.compress(data))
    return zlib.compress(data) if method == ZLIB else data


def kdump(
    pages: dict[int, bytes],
    method: int = ZLIB,
    *,
    level: int = 0,
    split: int = 0,
    status: int = 0,
    info: bytes = b"",
    machine: range = range(8 * PAGE),
) -> bytes:
    """A compressed dump of these pages by number, as version 6 of the format.

    :param level: which pages it leaves out (``makedumpfile -d``)
    :param split: it is a part of one
    :param info: what the kernel says about itself (``vmcoreinfo``)
    :param machine: all pages of the machine
    """
    most = max(pages) + 1
    bits, all_bits = bytearray(PAGE), bytearray(PAGE)
    for number in pages:
        bits[number // 8] |= 1 << number % 8
    for number in machine:
        all_bits[number // 8] |= 1 << number % 8
    header = b"KDUMP   " + struct.pack("<I", 6) + bytes(390 + 22) + struct.pack("<IIIII", status, PAGE, 1, 2, 0)
    sub_header = struct.pack("<Qii16xQQ", 0, level, split, PAGE + 200, len(info)).ljust(96, b"\0")
    sub_header = (sub_header + struct.pack("<Q", max(most, machine.stop))).ljust(200, b"\0") + info
    descriptors, content = b"", b""
    at = 5 * PAGE
    for number in sorted(pages):
        data = packed(pages[number], method)
        descriptors += struct.pack("<QIIQ", at + len(content), len(data), method, 0)
        content += data
    blocks = [header, sub_header, bytes(all_bits), bytes(bits), descriptors]
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_compressed_dump_is_read_page_by_page(tmp_path: Path, method: int, flat: bool) -> None:
    data = kdump(PAGES, method)
    memory = ram(tmp_path, flattened(data) if flat else data)
    assert [(start, end) for start, end, _ in memory.segments] == [
        (first * PAGE, end * PAGE) for first, end in ((0, 3), (9, 10), (31, 32), (64, 66))
    ]
    for number, content in PAGES.items():
        assert memory.read(number * PAGE, PAGE) == content
    assert memory.read(64 * PAGE + 8, 2 * PAGE - 16) == (page(64) + page(65))[8:-8]
    for number in (3, 8, 10, 66):
        with pytest.raises(FaultError):
            memory.read(number * PAGE, 1)


def test_a_dump_without_zero_pages_has_them_all_the_same(tmp_path: Path) -> None:
    """``makedumpfile -d 1`` leaves out what is zero and nothing else, so what is left out is known to be zero."""
    stored = {number: content for number, content in PAGES.items() if content.strip(b"\0")}
    memory = ram(tmp_path, kdump(stored, level=1, machine=range(70)))
    for number in range(70):
        assert memory.read(number * PAGE, PAGE) == PAGES.get(number, bytes(PAGE))
    with pytest.raises(FaultError):
        memory.read(70 * PAGE, 1)


@pytest.mark.parametrize("level", [0, 2, 31])
def test_a_dump_without_other_pages_does_not_invent_them(tmp_path: Path, level: int) -> None:
    memory = ram(tmp_path, kdump({0: page(0), 2: page(2)}, level=level, machine=range(70)))
    with pytest.raises(FaultError):
        memory.read(PAGE, 1)


def test_a_damaged_page_is_unreadable_and_its_neighbours_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytearray(kdump({0: page(0), 1: page(1), 2: page(2)}))
    struct.pack_into("<I", data, 4 * PAGE + 24 + 8, 1 << 30)  # the size of page 1
    memory = ram(tmp_path, bytes(data))
    assert memory.read(0, PAGE) == page(0)
    assert memory.read(2 * PAGE, PAGE) == page(2)
    with caplog.at_level(logging.WARNING), pytest.raises(FaultError) as fault:
        memory.read(8, 3 * PAGE - 8)
    assert (fault.value.address, fault.value.data) == (PAGE, page(0)[8:])
    assert "it has 1073741824 bytes" in caplog.text


def test_what_a_flattened_dump_writes_twice_is_what_it_wrote_last(tmp_path: Path) -> None:
    dump = kdump(PAGES)
    wrong = bytes(byte ^ 0xFF for byte in dump)
    pieces = [(at, wrong[at : at + 7000]) for at in range(0, len(dump), 7000)]
    pieces += [(at, dump[at : at + 1000]) for at in range(0, len(dump), 1000)]
    early, late = pieces[: -len(dump) // 1000], pieces[-len(dump) // 1000 :]
    CHANCE.shuffle(late)
    records = b"".join(struct.pack(">qq", at, len(data)) + data for at, data in early + late)
    memory = ram(tmp_path, flattened(b"")[:PAGE] + records + struct.pack(">qq", -1, -1))
    for number, content in PAGES.items():
        assert memory.read(number * PAGE, PAGE) == content


@pytest.mark.parametrize("write", [lime, avml])
def test_an_image_made_in_the_guest_says_where_its_memory_is(
    tmp_path: Path, write: Callable[[dict[int, bytes]], bytes]
) -> None:
    low, high = b"".join(page(number) for number in range(40)), CHANCE.randbytes(300_000) + bytes(100_000)
    memory = ram(tmp_path, write({0x1000: low, 1 << 32: high}))
    assert [(start, end) for start, end, _ in memory.segments] == [
        (0x1000, 0x1000 + len(low)),
        (1 << 32, (1 << 32) + len(high)),
    ]
    assert memory.read(0x1000, len(low)) == low
    assert memory.read(1 << 32, len(high)) == high
    for _ in range(100):
        at = CHANCE.randrange(len(high))
        assert memory.read((1 << 32) + at, len(high[at : at + 70_000])) == high[at : at + 70_000]
    for address in (0, 0x1000 + len(low), (1 << 32) - 1, (1 << 32) + len(high)):
        with pytest.raises(FaultError):
            memory.read(address, 1)


def test_an_altered_block_of_an_avml_image_is_unreadable(tmp_path: Path) -> None:
    """Each block has a checksum."""
    image = bytearray(avml({0: CHANCE.randbytes(3 * 65536)}))
    image[len(image) // 2] ^= 1
    memory = ram(tmp_path, bytes(image))
    memory.read(0, 65536)
    memory.read(2 * 65536, 65536)
    with pytest.raises(FaultError) as fault:
        memory.read(0, 3 * 65536)
    assert (fault.value.address, len(fault.value.data)) == (65536, 65536)


@pytest.mark.parametrize(
    "data",
    [
        kdump(PAGES),
        kdump(PAGES, LZO),
        avml({0: b"".join(page(number) for number in range(66))}),
        flattened(elf({0: b"".join(page(number) for number in range(66))})),
    ],
    ids=["kdump", "LZO", "AVML", "flattened core"],
)
def test_a_search_finds_what_is_there_across_pages(tmp_path: Path, data: bytes) -> None:
    memory = ram(tmp_path, data)
    pattern = page(64)[-8:] + page(65)[:8]
    assert memory.map is not None
    ((start, end),) = memory.data
    found = memory.map.find(pattern, start, end)
    assert memory.place(found) == 65 * PAGE - 8
    assert memory.map.find(b"not there", start, end) == -1


@pytest.mark.parametrize("info", [True, False])
def test_a_dump_that_says_where_its_kernel_is_is_searched_there_first(tmp_path: Path, info: bool) -> None:
    text = b"OSRELEASE=6.1.0\nSYMBOL(init_top_pgt)=ffffffff82800000\nNUMBER(phys_base)=88080384\n"  # 84 MiB
    pages = {1: page(7), 31000: page(7), 32000: page(8)}
    memory = ram(tmp_path, kdump(pages, info=text if info else b""))
    found = [memory.place(at) // PAGE for at in memory.blocks(page(7)[:16])]
    assert found == ([31000, 1, 31000] if info else [1, 31000])


@pytest.mark.parametrize(
    ("data", "package"),
    [
        (kdump(PAGES, LZO), "lzallright"),
        (kdump(PAGES, SNAPPY), "cramjam"),
        (kdump(PAGES, ZSTD), "cramjam"),
        (avml({0: page(0)}), "cramjam"),
    ],
    ids=["LZO", "Snappy", "Zstandard", "AVML"],
)
def test_a_missing_package_is_named(tmp_path: Path, data: bytes, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    unpacking._unpacker.cache_clear()
    with pytest.raises(LibvmiError, match=f"^VM_NOT_FOUND: .* needs the package {package}: pip install {package}$"):
        ram(tmp_path, data)
    unpacking._unpacker.cache_clear()


REFUSED = {
    "an ELF file that is not a core": (elf({0: page(0)}, kind=2), "not a 64-bit core"),
    "a core without memory": (elf({}), "holds no memory"),
    "a core cut off within its table": (elf({0x1000: page(1)})[:100], "cut off"),
    "a header only": (b"\x7fELF", "cut off"),
    "a compressed dump cut off within a page": (kdump(PAGES)[:-4], "cut off"),
    "a flattened dump without its end": (flattened(kdump(PAGES))[:-16], "cut off"),
    "pages packed by an unknown method": (
        kdump(PAGES).replace(b"\1\0\0\0" + bytes(8), b"\0\1\0\0" + bytes(8)),
        "0x100",
    ),
    "a part of a dump": (kdump(PAGES, split=1), "makedumpfile --reassemble"),
    "a LiME image cut off within a header": (lime({0: page(0)}) + b"EMiL", "cut off"),
    "a LiME image of another version": (lime({0: page(0)}).replace(b"EMiL\1", b"EMiL\2"), "another version"),
    "a LiME image whose range ends before it begins": (struct.pack("<4sIQQ8x", b"EMiL", 1, 1, 0), "from 0x1 to 0x0"),
    "a LiME image above all memory": (struct.pack("<4sIQQ8x", b"EMiL", 1, 0, 2**64 - 1), "to 0xffffffffffffffff"),
    "an AVML image cut off": (avml({0: page(0)})[:-9], "cut off"),
    "an AVML image with another count": (avml({0: page(0)})[:-8] + bytes(8), "another length"),
    "an AVML image with nothing in a block": (avml({0: page(0)})[:42] + bytes(4096), "a block of 0 bytes"),
    "an AVML image with an unknown block": (avml({0: page(0)})[:42] + b"\2".ljust(4, b"\0"), "unknown kind 0x2"),
    "a flattened text": (flattened(b"text" * 100), "neither"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why(tmp_path: Path, what: str) -> None:
    data, words = REFUSED[what]
    with pytest.raises(LibvmiError, match=f"^VM_NOT_FOUND: .*{words}"):
        ram(tmp_path, data)


def test_a_dump_that_promises_more_than_a_file_can_hold(tmp_path: Path) -> None:
    dump = bytearray(kdump({0: page(0), 3: page(3)}))
    struct.pack_into("<I", dump, 424 + 12, 0xFFFF_FFFF)  # blocks of its bitmaps: 8 TiB of them
    with pytest.raises(LibvmiError, match="cut off"):
        ram(tmp_path, bytes(dump))


def test_a_core_ends_in_zeros_that_are_not_in_the_file(tmp_path: Path) -> None:
    """``makedumpfile -d 1 -E`` leaves out zero pages so."""
    memory = ram(tmp_path, elf({0x1000: page(1), 0x5000: page(5)}, zeros=2 * PAGE))
    assert memory.segments[1] == Segment(0x2000, 0x4000, ZEROS)
    assert memory.read(0x1000, 3 * PAGE) == page(1) + bytes(2 * PAGE)
    assert memory.read(0x2FF8, 16) == bytes(16)
    assert memory.read(0x5000, 3 * PAGE) == page(5) + bytes(2 * PAGE)
    for address in (0x4000, 0x8000):
        with pytest.raises(FaultError):
            memory.read(address, 1)


def test_what_a_core_stores_counts_more_than_its_zeros(tmp_path: Path) -> None:
    memory = ram(tmp_path, elf({0x1000: page(1), 0x3000: page(3), 0x3800: page(4)}, zeros=4 * PAGE))
    assert memory.read(0x1000, 0x7800) == page(1) + bytes(PAGE) + page(3) + page(4)[0x800:] + bytes(4 * PAGE)


@pytest.mark.parametrize("at", [0x1000, 0x1001, 0x1004, 0x1008, 0x1384])
def test_a_core_may_have_its_memory_anywhere_in_the_file(tmp_path: Path, at: int) -> None:
    memory = ram(tmp_path, elf({0x1000: page(1) + page(2)}, at=at))
    assert memory.read(0x1000, 2 * PAGE) == page(1) + page(2)
    assert list(memory.words(0, 1 << 20, 8)) == [(0x1000, [2, 3])]


def test_a_flattened_dump_that_reaches_beyond_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(flattened(b"").ljust(PAGE, b"\0")[:PAGE] + struct.pack(">qq", 2**63 - 1, 4) + b"evil")
    with pytest.raises(LibvmiError, match="above all physical memory"):
        Ram(path)


def written(format: formats.Format) -> bytes:
    """A file that begins as this format does."""
    at, mark = format.marks[0]
    return (bytes(at) + mark).ljust(2 * PAGE, b"\0")


NAMED = [format for format in formats.FORMATS if not format.is_read and format.marks]


@pytest.mark.parametrize("format", NAMED, ids=lambda format: format.name)
def test_a_format_that_is_not_read_is_named_with_what_to_do(tmp_path: Path, format: formats.Format) -> None:
    with pytest.raises(LibvmiError) as error:
        ram(tmp_path, written(format))
    assert format.name in str(error.value)
    assert str(error.value).endswith(format.instead)


def test_a_xen_core_is_named(tmp_path: Path) -> None:
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, 2, 1)
    names = b"\0.shstrtab\0.xen_pages\0"
    sections = bytes(64) + struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 192, len(names), 0, 0, 1, 0)
    with pytest.raises(LibvmiError, match=r"its format is Xen core, .*AVML"):
        ram(tmp_path, header + sections + names)


def test_no_format_is_taken_for_another() -> None:
    for format in formats.FORMATS:
        for at, mark in format.marks:
            assert formats.sniff(bytes(at) + mark) is format
            assert formats.sniff((bytes(at) + mark)[:-1]) is formats.RAW
    assert formats.sniff(b"") is formats.RAW


def test_the_page_about_dumps_has_the_table_of_formats() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dumps.md").read_text()
    assert "\n".join(formats.table()) in page


SMALL = {0: page(0), 1: bytes(PAGE), 2: page(2), 9: page(9)}
MUTATED = {
    "ELF": (elf({0x1000: page(1), 0x3000: page(3)}, zeros=PAGE), [(0, 64 + 3 * 56)]),
    "kdump": (
        kdump(SMALL, level=1),
        [(0, 16), (424, 444), (PAGE, PAGE + 104), (3 * PAGE, 3 * PAGE + 8), (4 * PAGE, 4 * PAGE + 48)],
    ),
    "flattened": (flattened(kdump(SMALL), 20_000), [(0, 32), (PAGE, PAGE + 40)]),
    "LiME": (lime({0x1000: page(1), 0x3000: page(3)}), [(0, 32), (32 + PAGE, 64 + PAGE)]),
    "AVML": (avml({0x1000: page(1) + CHANCE.randbytes(PAGE)}), [(0, 80)]),
}
VALUES = [bytes(8), b"\xff" * 8, struct.pack("<Q", 0x7FFF_FFFF)]


REFUSAL = re.compile(r"^VM_NOT_FOUND: guest memory \S+ cannot be read: .{10,300}$")


@pytest.mark.parametrize("name", MUTATED)
def test_a_damaged_header_is_one_clear_error_or_unreadable_memory(tmp_path: Path, name: str) -> None:
    """Each field of each header, with values of any size."""
    data, headers = MUTATED[name]
    outcomes = set()
    for start, end in headers:
        for at in range(start, min(end, len(data)), 4):
            for value, width in itertools.product(VALUES, (4, 8)):
                damaged = bytearray(data)
                damaged[at : at + width] = value[:width]
                try:
                    memory = ram(tmp_path, bytes(damaged))
                except LibvmiError as error:
                    outcomes.add(REFUSAL.sub("refused", str(error)))
                    continue
                for first, last, _ in memory.segments[:8]:
                    with suppress(FaultError):
                        assert len(memory.read(first, min(last - first, 3 * PAGE))) == min(last - first, 3 * PAGE)
                        outcomes.add("read")
                with suppress(LibvmiError):
                    assert next(memory.blocks(b"not there"), None) is None
                memory.close()
    assert outcomes == {"refused", "read"}
