"""Dumps that we write: of a guest whose memory is known byte for byte, read back by other code than wrote them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import resource
import signal
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from tests.ground.images import lime
from vmishim import cli
from vmishim.acquire import journal, manifest, selection, shapes, signing
from vmishim.acquire.acquisition import Pace, acquire
from vmishim.acquire.journal import Plan, Record
from vmishim.acquire.output import Output, UnfinishedError, beside, stored, unused
from vmishim.acquire.pieces import CHUNK, Got, Piece, Run, chunks, joined, read, runs, total
from vmishim.acquire.shapes import SHAPES, Described, Image
from vmishim.errors import FaultError, LinkError
from vmishim.guests import dumps
from vmishim.guests.formats import UNFINISHED
from vmishim.guests.layout import Range
from vmishim.guests.ramfile import Ram
from vmishim.memory.reader import PHYSICAL, Extent
from vmishim.wire.keys import PrivateKey, save_private

PAGE = 4096
IMAGE = Image(0xFFFF_FFFF_8100_0000, 0x30_0000, 0x18_0000)
PAGE_OFFSET = 0xFFFF_8880_0000_0000
RAM = [Range(0x1000, 0x9_FC00), Range(0x10_0000, 0x58_0000)]
HOLES = [Range(0x5000, 0x6000), Range(0x1F_F000, 0x20_1000), Range(0x40_0000, 0x40_4000), Range(0x57_F000, 0x58_0000)]
KEY = PrivateKey(bytes(range(32)))
INFO = "OSRELEASE=6.1.0\nNUMBER(phys_base)=0\n"


CHANCE = random.Random(7)
MEMORY = b"".join(bytes(PAGE) if page % 3 == 0 else CHANCE.randbytes(PAGE) for page in range(0x58_0000 // PAGE))


class Guest:
    """Memory made by chance, every third page zeros, with holes.

    :param breaks: reads after which the link is lost
    """

    memory = MEMORY

    def __init__(self, breaks: int = -1) -> None:
        self._left = breaks

    def read(self, address: int, count: int, space: int = 0, *, text: bool = False) -> bytes:
        """See ``MemoryReader.read``."""
        assert space == PHYSICAL
        assert count <= CHUNK
        self._ask()
        return self._memory(address, count)

    def scatter(self, addresses: Sequence[int], count: int = PAGE) -> Iterator[Extent]:
        """See ``ScatterReader.scatter``."""
        self._ask()
        for address in addresses:
            with suppress(FaultError):
                yield Extent(address, self._memory(address - PAGE_OFFSET, count))

    def _ask(self) -> None:
        if self._left == 0:
            raise LinkError("the link is lost")
        self._left -= 1

    def _memory(self, address: int, count: int) -> bytes:
        for start, end in HOLES:
            if start < address + count and address < end:
                good = max(start - address, 0)
                raise FaultError(address + good, self.memory[address : address + good])
        return self.memory[address : address + count]


def plan(format: str, ranges: list[Range] = RAM) -> Plan:
    facts = {"release": "6.1.0", "boot_id": "b", "page_offset": PAGE_OFFSET, "kaslr_offset": 0, "agent": "tcp://x:1"}
    return Plan("web-1", format, False, RAM, ranges, facts, IMAGE, INFO, "the guest's memory", {"none": "no hardware"})


def quiet(count: int) -> None:
    """No progress is shown."""


def finish(output: Output) -> None:
    """What `vmishim dump` does at the end."""
    said = manifest.note(output.plan, output.record)
    described = Described(PAGE_OFFSET, IMAGE, INFO.encode(), said)
    headers = SHAPES[output.plan.format].headers(runs(output.record.pieces), described)
    size, sha256 = output.finish(headers, quiet)
    line, key = signing.signer(KEY).text, KEY.public.text
    text = manifest.manifest(output.plan, output.record, output.path.name, size, sha256, line, key)
    beside(output.path, manifest.SUFFIX).write_bytes(text)
    beside(output.path, manifest.SIGNATURE_SUFFIX).write_text(signing.sign(KEY, text))
    output.forget_journal()


def write(path: Path, format: str = "elf") -> Path:
    """A dump, from start to end."""
    with closing(Output.create(path, plan(format))) as output:
        acquire([Guest(), Guest()], output, False, Pace(0), quiet)
        finish(output)
    return path


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our private key, where it is looked for."""
    (tmp_path / "config").mkdir()
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "config" / "domains.toml"))
    save_private(tmp_path / "config" / "key", KEY)
    return tmp_path / "config" / "key"


def truth() -> Iterator[tuple[int, bytes | None]]:
    """All pages of the guest, and parts of pages: None for one that cannot be read."""
    memory = Guest().memory
    for start, end in RAM:
        for at in range(start, end, PAGE):
            holed = any(low <= at < high for low, high in HOLES)
            yield at, None if holed else memory[at : min(at + PAGE, end)]


# ---- the two formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SHAPES)
def test_a_dump_has_all_of_the_memory_and_faults_where_there_was_none(format: str, tmp_path: Path) -> None:
    ram = Ram(write(tmp_path / "dump", format))
    for address, data in truth():
        if data is None:
            with pytest.raises(FaultError):
                ram.read(address, 8)
        else:
            assert ram.read(address, len(data)) == data
    for address in (0, 0x9_FC00, 0xF_F000, 0x58_0000):
        with pytest.raises(FaultError):
            ram.read(address, 1)
    ram.close()


def test_a_lime_image_is_what_lime_writes_of_the_readable_ranges(tmp_path: Path) -> None:
    memory = Guest().memory
    bounds = [(0x1000, 0x5000), (0x6000, 0x9_FC00), (0x10_0000, 0x1F_F000), (0x20_1000, 0x40_0000)]
    expected = lime({start: memory[start:end] for start, end in [*bounds, (0x40_4000, 0x57_F000)]})
    assert write(tmp_path / "dump", "lime").read_bytes() == expected


def elf(data: bytes) -> tuple[list[tuple[int, ...]], dict[str, tuple[int, bytes]]]:
    """Program headers of a core, and its notes by name: elf(5), read independently."""
    assert data[:7] == b"\x7fELF\2\1\1"
    kind, machine, _, _, at, sections, _, _, size, count, *_ = struct.unpack_from("<HHIQQQIHHHHHH", data, 16)
    assert (kind, machine, size) == (4, 62, 56)
    if count == 0xFFFF:
        (count,) = struct.unpack_from("<I", data, sections + 44)
    programs = [struct.unpack_from("<IIQQQQQQ", data, at + 56 * number) for number in range(count)]
    notes = {}
    for part, _, offset, _, _, length, _, _ in programs:
        end = offset + length
        while part == 4 and offset < end:
            names, content, note = struct.unpack_from("<III", data, offset)
            name = data[offset + 12 : offset + 12 + names - 1].decode()
            offset += 12 + (names + 3) // 4 * 4
            notes[name] = (note, data[offset : offset + content])
            offset += (content + 3) // 4 * 4
    return programs, notes


def test_a_core_says_at_which_virtual_addresses_the_memory_is(tmp_path: Path) -> None:
    data = write(tmp_path / "dump").read_bytes()
    memory = Guest().memory
    programs, _ = elf(data)
    loads = [each for each in programs if each[0] == 1]
    for _, _, offset, virtual, physical, size, all_, _ in loads:
        assert size == all_
        assert data[offset : offset + size] == memory[physical : physical + size]
        assert offset % PAGE == physical % PAGE
        in_image = IMAGE.physical <= physical < IMAGE.physical + IMAGE.size
        assert virtual == physical + (IMAGE.virtual - IMAGE.physical if in_image else PAGE_OFFSET)
    spans = [(each[4], each[4] + each[5]) for each in loads]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_core_names_what_could_not_be_read_in_a_note(tmp_path: Path) -> None:
    _, notes = elf(write(tmp_path / "dump").read_bytes())
    assert notes["VMCOREINFO"] == (0, INFO.encode())
    kind, said = notes["VMISHIM"]
    assert kind > 512  # no program takes it for registers
    found = json.loads(said)
    assert found["unreadable"] == [f"{start:#x}-{end:#x}" for start, end in HOLES]
    assert found["complete"] is True
    assert "ran on" in found["consistency"]
    assert found["guest"]["name"] == "web-1"


def test_a_core_with_more_segments_than_its_header_can_count_is_read(tmp_path: Path) -> None:
    pieces = [Piece(2 * number * PAGE, 8, SHAPES["elf"].start + number * PAGE, "") for number in range(70_000)]
    described = Described(PAGE_OFFSET, Image(0xFFFF_FFFF_8100_0000, 1 << 40, PAGE), b"", b"")
    with (tmp_path / "dump").open("wb") as file:
        for at, data in SHAPES["elf"].headers(runs(pieces), described):
            file.seek(at)
            file.write(data)
        for piece in pieces[::6999]:
            file.seek(piece.offset)
            file.write(piece.address.to_bytes(8, "little"))
    ram = Ram(tmp_path / "dump")
    for piece in pieces[::6999]:
        assert ram.read(piece.address, 8) == piece.address.to_bytes(8, "little")
    with pytest.raises(FaultError):
        ram.read(pieces[-1].address - PAGE, 8)
    ram.close()


def test_memory_in_more_pieces_than_can_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shapes.RUNS_MAX == dumps.PROGRAMS_MAX
    monkeypatch.setattr(shapes, "RUNS_MAX", 9)
    found = [Run(2 * number * PAGE, (2 * number + 1) * PAGE, number * PAGE) for number in range(10)]
    for shape in SHAPES.values():
        with pytest.raises(ValueError, match="10 separate pieces"):
            list(shape.headers(found, Described(PAGE_OFFSET, IMAGE, b"", b"")))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_each_byte_of_the_ranges_is_asked_for_once_by_chunk() -> None:
    found = list(chunks(RAM))
    assert total(found) == total(RAM)
    assert all(0 < end - start <= CHUNK and start // CHUNK == (end - 1) // CHUNK for start, end in found)
    assert list(chunks(RAM, done=0x20_1000)) == [Range(0x20_1000, 0x30_0000), *found[3:]]


@pytest.mark.parametrize("page_offset", [None, PAGE_OFFSET])
def test_what_cannot_be_read_is_left_out_page_by_page(page_offset: int | None) -> None:
    got = read(Guest(), Range(0x1F_8800, 0x20_2000), page_offset)
    assert got.unreadable == (Range(0x1F_F000, 0x20_1000),)
    assert [(at, len(data)) for at, data in got.found] == [(0x1F_8800, 0x6800), (0x20_1000, 0x1000)]


def test_a_part_with_holes_takes_two_requests_of_an_agent() -> None:
    guest = Guest(breaks=1)
    got = read(guest, Range(0x4_0000, 0x8_0000), PAGE_OFFSET)
    assert got == Got(Range(0x4_0000, 0x8_0000), ((0x4_0000, guest.memory[0x4_0000:0x8_0000]),), ())
    with pytest.raises(LinkError):
        read(Guest(breaks=1), Range(0x1000, 0x4_0000), PAGE_OFFSET)
    got = read(Guest(breaks=2), Range(0x1000, 0x4_0000), PAGE_OFFSET)
    assert got.unreadable == (HOLES[0],)


def test_the_pace_is_kept() -> None:
    now = 0.0
    pace = Pace(100.0, lambda: now)
    assert pace.wait(50) == 0.0
    assert pace.wait(50) == 0.5
    now = 10.0
    assert pace.wait(50) == 0.0  # what was not used is lost
    assert pace.wait(100) == 0.5
    assert pace.wait(1) == 1.5
    assert Pace(0).wait(1 << 40) == 0.0


@given(st.lists(st.sampled_from([b"\0" * PAGE, b"\0" * (PAGE - 1) + b"x", b"y" * PAGE]), max_size=8), st.booleans())
def test_only_whole_pages_of_zeros_become_holes(pages: list[bytes], short: bool) -> None:
    data = b"".join(pages)[: -PAGE // 2 if short else None]
    made = bytearray(len(data))
    for start, end in stored(data):
        made[start:end] = data[start:end]
    assert bytes(made) == data
    assert sum(end - start for start, end in stored(data)) <= PAGE * sum(page != bytes(PAGE) for page in pages)


def test_zeros_take_no_room_on_the_disk(tmp_path: Path) -> None:
    status = write(tmp_path / "dump").stat()
    assert status.st_blocks * 512 < 0.8 * total(RAM)


# ---- the journal -----------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_journal_that_is_cut_off_anywhere_is_a_shorter_one(data: st.DataObject) -> None:
    entries: list[Piece | Range] = [Piece(0, 4096, 64, "aa"), Range(4096, 8192), Piece(8192, 10, 5000, "bb")]
    text = journal.line_of_plan(plan("elf")) + "".join(map(journal.line, entries))
    cut = data.draw(st.integers(len(journal.line_of_plan(plan("elf"))), len(text)))
    found, record = journal.parse(text[:cut])
    assert found == plan("elf")
    whole = text[:cut].count("\n") - 1
    assert [*record.pieces, *record.unreadable] == [
        *(each for each in entries[:whole] if isinstance(each, Piece)),
        *(each for each in entries[:whole] if isinstance(each, Range)),
    ]


def test_a_journal_says_again_what_it_said() -> None:
    sessions: list[dict[str, object]] = [{"begun": "a", "frozen": False, "ended": "b"}, {"begun": "c", "frozen": True}]
    record = Record([Piece(0, 4096, 64, "aa"), Piece(8192, 10, 5000, "bb")], [Range(4096, 8192)], sessions)
    assert journal.parse(journal.lines(plan("lime"), record)) == (plan("lime"), record)


@pytest.mark.parametrize(
    "text", ["", "\n", "{}\n", "[1]\n", '{"vmishim-journal": 2}\n', '{"vmishim-journal": 1, "format": "raw"}\n']
)
def test_what_begins_with_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"its first line is no plan|another version|malformed"):
        journal.parse(text)


def begun(path: Path, format: str = "elf", reads: int = 7) -> Path:
    """An unfinished dump, whose link was lost."""
    guest = Guest(reads)
    with closing(Output.create(path, plan(format))) as output, pytest.raises(LinkError, match="the link is lost"):
        acquire([guest], output, False, Pace(0), quiet)
    return path


def resumed(path: Path) -> Record:
    """The same, finished."""
    with closing(Output.resume(path, lambda plan: None, quiet)) as output:
        acquire([Guest()], output, False, Pace(0), quiet)
        finish(output)
        return output.record


def without_notes(path: Path) -> bytes:
    """A dump without what tells of its sessions."""
    data = path.read_bytes()
    return data if data[:4] == b"EMiL" else data[SHAPES["elf"].start :]


@pytest.mark.parametrize("format", SHAPES)
@pytest.mark.parametrize("reads", [0, 1, 2, 5, 9, 11])
def test_a_resumed_dump_has_the_same_bytes(format: str, reads: int, tmp_path: Path) -> None:
    path = begun(tmp_path / "broken", format, reads)
    assert path.read_bytes().startswith(UNFINISHED)
    record = resumed(path)
    assert without_notes(path) == without_notes(write(tmp_path / "whole", format))
    assert joined(record.unreadable) == HOLES
    assert len(record.sessions) == 2
    assert not beside(path, ".journal").exists()


@pytest.mark.parametrize("format", SHAPES)
def test_what_was_damaged_meanwhile_is_read_again(format: str, tmp_path: Path) -> None:
    path = begun(tmp_path / "broken", format, reads=9)
    piece = journal.parse(beside(path, ".journal").read_text())[1].pieces[2]
    with path.open("r+b") as file:
        file.seek(piece.offset + 8191)
        file.write(b"damaged")
    resumed(path)
    assert without_notes(path) == without_notes(write(tmp_path / "whole", format))


def test_a_dump_that_was_cut_off_goes_on_where_it_ends(tmp_path: Path) -> None:
    path = begun(tmp_path / "broken", reads=9)
    os.truncate(path, 5 << 20)
    resumed(path)
    assert without_notes(path) == without_notes(write(tmp_path / "whole"))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with closing(Output.create(path, plan("elf"))) as output:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (7 << 20, before[1]))
            with pytest.raises(OSError, match="File too large"):
                acquire([Guest()], output, False, Pace(0), quiet)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, old)
    assert len(journal.parse(beside(path, ".journal").read_text())[1].pieces) > 3
    resumed(path)
    assert without_notes(path) == without_notes(write(tmp_path / "whole"))


def test_files_are_yours_alone_and_nothing_is_replaced_or_followed(tmp_path: Path) -> None:
    path = begun(tmp_path / "dump")
    for each in (path, beside(path, ".journal")):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
    with pytest.raises(UnfinishedError):
        unused(path)
    resumed(path)
    for each in (path, tmp_path, tmp_path / "link"):
        if each.name == "link":
            each.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match=r"exists already|is a link|is a folder"):
            unused(each)
        with pytest.raises(OSError, match=r"exists|symbolic|directory"):
            Output.create(each, plan("elf"))
    assert not (tmp_path / "elsewhere").exists()


def test_an_unfinished_dump_that_others_could_change_is_not_followed(tmp_path: Path) -> None:
    path = begun(tmp_path / "dump")
    for each in (path, beside(path, ".journal")):
        each.chmod(0o622)
        with pytest.raises(PermissionError, match="other users can change it"):
            Output.resume(path, lambda plan: None, quiet)
        each.chmod(0o600)
    resumed(path)


# ---- manifest and signature ------------------------------------------------------------------------------------------


def test_a_dump_is_verified(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "core.elf")
    assert cli.main(["dump", "--verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said
    assert "of web-1, Linux 6.1.0" in said
    assert cli.main(["dump", "--signer-line"]) == 0
    line = capsys.readouterr().out.strip()
    assert line in said
    key.unlink()
    assert cli.main(["dump", "--verify", str(path), "--signer", line, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_manifest_has_the_hash_of_each_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "core.elf")
    said = json.loads(beside(path, manifest.SUFFIX).read_bytes())
    memory, data = Guest().memory, path.read_bytes()
    for each in said["chunks"]:
        address, size, offset = (int(word, 0) for word in each.split()[:3])
        assert data[offset : offset + size] == memory[address : address + size]
        assert hashlib.sha256(memory[address : address + size]).hexdigest() == each.split()[3]
    assert said["bytes_read"] == total(RAM) - total(HOLES)
    assert said["attestation"] == {"none": "no hardware"}
    assert said["size"] == len(data)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ((4 << 20) + 0x2001, "the memory from 0x1000 to 0x5000, at offset 4194304, was changed"),
        (0x40, "something else than memory was changed: its headers or notes"),
        (-1, "the memory from 0x500000 to 0x57f000"),
    ],
)
def test_a_changed_byte_is_named(
    at: int, said: str, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "core.elf")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert cli.main(["dump", "--verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n") == 1


def test_a_dump_that_was_cut_off_does_not_fit(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "core.elf")
    size = path.stat().st_size
    os.truncate(path, size - PAGE)
    assert cli.main(["dump", "--verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"it has {size - PAGE} bytes, not {size}" in out
    assert "the memory from 0x500000 to 0x57f000" in out


def test_another_key_or_manifest_does_not_verify(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "core.elf")
    save_private(tmp_path / "other", PrivateKey(bytes(32)))
    assert cli.main(["dump", "--verify", str(path), "--key", str(tmp_path / "other")]) == 1
    assert "which is not yours" in capsys.readouterr().out
    name = beside(path, manifest.SUFFIX)
    name.write_bytes(name.read_bytes().replace(b'"web-1"', b'"web-2"'))
    assert cli.main(["dump", "--verify", str(path)]) == 1
    assert "the signature does not fit the manifest" in capsys.readouterr().out
    beside(path, manifest.SIGNATURE_SUFFIX).write_text("vmishim-signature-v1 AA== AA==")
    assert cli.main(["dump", "--verify", str(path)]) == 1
    assert "was the line cut short" in capsys.readouterr().out
    name.unlink()
    assert cli.main(["dump", "--verify", str(path)]) == 1
    assert "core.elf.manifest.json: No such file" in capsys.readouterr().err


def test_a_signature_is_ed25519_by_a_key_of_its_own() -> None:
    line = signing.sign(KEY, b"manifest")
    by = signing.signed_by(b"manifest", line)
    assert by == signing.signer(KEY) == signing.Signer.from_text(by.text)
    assert by.raw not in (KEY.raw, KEY.public.raw)
    assert signing.signer(PrivateKey(bytes(32))) != by
    signature = base64.b64decode(line.split()[2])
    Ed25519PublicKey.from_public_bytes(by.raw).verify(signature, b"vmishim manifest v1\0manifest")
    with pytest.raises(signing.SignatureError, match="does not fit"):
        signing.signed_by(b"manifesu", line)


def test_what_there_is_of_an_unfinished_dump_can_be_finished(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begun(tmp_path / "core.elf", reads=7)
    assert cli.main(["dump", "--finish", str(path)]) == 0
    assert "were not read before the acquisition ended" in capsys.readouterr().out
    assert cli.main(["dump", "--verify", str(path)]) == 0
    said = json.loads(beside(path, manifest.SUFFIX).read_bytes())
    assert said["complete"] is False
    (rest,) = said["not_read"]
    start, end = (int(word, 16) for word in rest.split("-"))
    assert end == RAM[-1].end
    ram = Ram(path)
    memory = Guest().memory
    assert ram.read(start - PAGE, PAGE) == memory[start - PAGE : start]
    with pytest.raises(FaultError):
        ram.read(start, 1)
    ram.close()


def test_commands_say_what_is_missing(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "core.elf"
    (tmp_path / "config" / "domains.toml").write_text(f'[m]\nramfile = "{tmp_path / "none"}"\n')

    def said(*arguments: str) -> str:
        assert cli.main(["dump", *arguments]) == 1
        return capsys.readouterr().err

    assert "name the file to write: -o FILE" in said("m")
    assert "is a folder; name the file to write" in said("m", "-o", str(tmp_path))
    assert "cannot be read: No such file or directory" in said("m", "-o", str(path))
    assert "which nothing can freeze" in said("m", "-o", str(path), "--freeze")
    assert f"there is no unfinished dump {path}" in said("--finish", str(path))
    path.write_bytes(b"mine")
    assert "exists already and is not replaced" in said("m", "-o", str(path))
    assert f"{path} is no unfinished dump: it has no journal" in said("--finish", str(path))
    assert path.read_bytes() == b"mine"
    path.unlink()
    begun(path, reads=0)
    assert "--resume goes on with it" in said("m", "-o", str(path))
    assert "nothing was read into" in said("--finish", str(path))
    key.unlink()
    assert "make one: vmishim keygen" in said("--signer-line")
    assert "--signer: it must start with vmishim-signer-v1" in said(
        "--verify", str(begun_and_finished(tmp_path)), "--signer", "x"
    )


def begun_and_finished(folder: Path) -> Path:
    return write(folder / "whole.elf")


# ---- the kernel's own memory -----------------------------------------------------------------------------------------

NUMBERS = {
    "SIZE(page)": 64,
    "OFFSET(page.flags)": 0,
    "OFFSET(page.compound_head)": 8,
    "OFFSET(page.mapping)": 24,
    "OFFSET(page.private)": 40,
    "OFFSET(page._mapcount)": 48,
    "NUMBER(PG_lru)": 4,
    "NUMBER(PG_slab)": 9,
    "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)": -129,
}
ARRAY = 0xFFFF_EA00_0000_0000


def info(numbers: dict[str, int]) -> bytes:
    return "".join(f"{name}={value}\n" for name, value in numbers.items()).encode()


def page(flags: int = 0, *, head: int = 0, mapping: int = 0, private: int = 0, mapcount: int = -1) -> bytes:
    """A ``struct page``."""
    return struct.pack("<4Q8xQI12x", flags, head, 0, mapping, private, mapcount % (1 << 32))


FREE, LRU, SLAB, ANON = -129, 1 << 4, 1 << 9, 0xFFFF_8880_0000_0001
KERNEL, USER, FILE = page(), page(LRU, mapping=ANON), page(LRU, mapping=ANON - 1)


def tail(of: int) -> bytes:
    return page(head=ARRAY + of * 64 + 1, mapping=0xDEAD_0000_0000_0400)


def selected(pages: list[bytes], unreadable: range = range(0), numbers: dict[str, int] = NUMBERS) -> set[int]:
    """Numbers of the pages that are the kernel's, without any gap between them being closed."""
    table = b"".join(pages)

    def read(address: int, count: int) -> bytes:
        at = address - ARRAY
        end = min([at + count] + [64 * number for number in unreadable if 64 * number >= at])
        return b"" if at // 64 in unreadable else table[at:end]

    layout = selection.layout(info(numbers))
    assert layout
    ram = [Range(0, len(pages) * PAGE)]
    found = selection._parts(ram, layout, ARRAY, read)
    return {number for start, end in found for number in range(start // PAGE, end // PAGE)}


@pytest.mark.parametrize(
    ("pages", "kept"),
    [
        ([KERNEL, USER, KERNEL, FILE, KERNEL], {0, 2, 4}),
        ([page(mapcount=FREE, private=2), *[KERNEL] * 3, KERNEL], {4}),
        ([page(mapcount=FREE, private=60), KERNEL], {0, 1}),  # no block is so large
        ([page(SLAB, mapping=ANON, head=0), tail(0), KERNEL], {0, 1, 2}),
        ([page(LRU, mapping=ANON), tail(0), tail(0), KERNEL, tail(0)], {3, 4}),
        ([page(mapcount=-1025, mapping=ANON), USER], {0}),  # a page table
        ([page(mapcount=0, mapping=ANON)], set()),  # mapped, not on a list yet
        ([], set()),
    ],
)
def test_the_kernels_pages_are_told_from_others(pages: list[bytes], kept: set[int]) -> None:
    assert selected(pages) == kept


def test_a_page_whose_descriptor_cannot_be_read_is_kept() -> None:
    assert selected([USER] * 200, unreadable=range(64, 128)) == set(range(64, 128))


def test_pages_of_hugetlbfs_are_not_the_kernels() -> None:
    numbers = NUMBERS | {"NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": 0xF400_0000 - (1 << 32)}
    pages = [page(mapcount=0xF400_0000), tail(0), page(mapcount=0xF200_0000)]
    assert selected(pages, numbers=numbers) == {2}


def test_short_gaps_are_read_too_and_long_ones_are_not() -> None:
    layout = selection.layout(info(NUMBERS))
    assert layout
    table = b"".join([KERNEL, *[USER] * 15, KERNEL, *[USER] * 16, KERNEL])
    found = selection.kernel(
        [Range(0x800, len(table) // 64 * PAGE)], layout, ARRAY, lambda at, n: table[at - ARRAY :][:n]
    )
    assert found == [Range(0x800, 17 * PAGE), Range(33 * PAGE, 34 * PAGE)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_description_that_lacks_a_number_or_has_an_impossible_one_is_not_used(name: str) -> None:
    assert (
        selection.layout(info({key: value for key, value in NUMBERS.items() if key != name})) is None
        or name == "NUMBER(PG_slab)"
    )
    if name != "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)":
        assert selection.layout(info(NUMBERS | {name: 513})) is None
