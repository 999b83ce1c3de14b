"""A kernel's description on disk: what is kept is used only while it is whole, of this kernel, and as the guest has it.

The guest is memory: symbol tables and BTF where VMCOREINFO says they are."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.test_kallsyms import image
from tests.unit.test_types import every_kind
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests import description
from vmishim.guests.description import KERNELS_MAX, describe, folder
from vmishim.guests.target import Target
from vmishim.kernel import kallsyms, vmcoreinfo
from vmishim.memory.reader import KERNEL

TEXT = 0xFFFF_FFFF_8100_0000
BTF_AT, TABLES_AT, INFO_AT, POINTER_AT, BANNER_AT = (
    TEXT + at for at in (0x80_0000, 0xA0_0000, 0xC0_0000, 0xC1_0000, 0xC2_0000)
)


class Guest:
    """Memory of a kernel that was moved by ``moved``; counts the bytes that are read."""

    def __init__(self, moved: int = 0, build: str = "4711", release: str = "6.1.0-test", has_info: bool = True) -> None:
        self.moved, self.bytes, self.agent = moved, 0, None
        tables, _ = image(600, "6.6", per_cpu=True)
        # The table's own addresses: names as in image(), of which the first by address is the kernel's start.
        self.btf = bytearray(every_kind())
        info = f"OSRELEASE={release}\nBUILD-ID={build}\n"
        # Where image() lays out its tables, by finding them again.
        at = tables.find(kallsyms.DIGITS)
        for name, place in {
            "names": 4096,
            "num_syms": 4096,
            "token_table": at - 64,
            "token_index": at + 2048,
            "offsets": at + 2048,
            "relative_base": len(tables) - 8200,
        }.items():
            info += f"SYMBOL(kallsyms_{name})={TABLES_AT + moved + place:x}\n"
        self.memory = {
            BTF_AT: self.btf,
            TABLES_AT: bytearray(tables),
            INFO_AT: bytearray(info.encode().ljust(4096, b"\0")),
            POINTER_AT: bytearray((INFO_AT + moved).to_bytes(8, "little").ljust(512, b"\0")),
            BANNER_AT: bytearray(b"Linux version 6.1.0-test".ljust(512, b"\0")),
        }
        symbols = {"__start_BTF": BTF_AT, "linux_banner": BANNER_AT, "_text": TEXT, "vmcoreinfo_data": POINTER_AT}
        if not has_info:
            del symbols["vmcoreinfo_data"]
        self.symbols = {name: address + moved for name, address in symbols.items()}
        self.profile = SimpleNamespace(release=release, kaslr_offset=moved, levels=4, symbol=self.symbols.__getitem__)

    @property
    def reader(self) -> Guest:
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        for start, data in self.memory.items():
            within = address - self.moved - start
            if 0 <= within < len(data):
                part = bytes(data[within : within + count])
                self.bytes += len(part)
                if len(part) < count:
                    raise FaultError(address + len(part), part)
                return part
        raise FaultError(address)

    @property
    def target(self) -> Target:
        return cast(Target, self)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Symbols that say where the guest's parts are; the tables in memory are test_kallsyms' subject."""
    found = [
        (0x1000, "runqueues"),
        (TEXT, "_text"),
        (BTF_AT, "__start_BTF"),
        (BTF_AT + len(every_kind()), "__stop_BTF"),
        (BANNER_AT, "linux_banner"),
    ]
    monkeypatch.setattr(kallsyms, "pairs", lambda memory, digits: list(found))
    return found


def only_file(kept: Path) -> Path:
    (path,) = kept.glob("*.kernel")
    return path


def test_a_kernel_that_was_seen_is_not_read_again(tmp_path: Path, pairs: list[tuple[int, str]]) -> None:
    first = describe(Guest().target, tmp_path)
    guest = Guest()
    again = describe(guest.target, tmp_path)
    assert (first.was_kept, again.was_kept) == (False, True)
    assert (again.btf, again.symbols, again.vmcoreinfo) == (first.btf, first.symbols, first.vmcoreinfo)
    assert first.symbols == pairs
    assert guest.bytes < 4096 + 2 * 512 + (description.SAMPLES + 1) * description.SAMPLE + 1


def test_the_image_may_be_elsewhere_in_each_boot(tmp_path: Path, pairs: list[tuple[int, str]]) -> None:
    describe(Guest().target, tmp_path)
    moved = describe(Guest(moved=0x200_0000).target, tmp_path)
    assert moved.was_kept
    assert moved.symbols == [(at + 0x200_0000 if at > TEXT - 1 else at, name) for at, name in pairs]


def damaged(at: int) -> Any:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def other_kernel(path: Path) -> None:
    """A whole file, of another build, under this one's name."""
    elsewhere = path.parent / "elsewhere"
    describe(Guest(build="0815").target, elsewhere)
    only_file(elsewhere).rename(path)


def poisoned(path: Path) -> None:
    """A whole file of this kernel's identity, whose types are not the guest's."""
    blob, symbols = description._unpacked(path.read_bytes(), identity := path_identity(path), TEXT)
    path.write_bytes(description._packed(identity, bytes(reversed(blob)), symbols, TEXT))


def misplaced(path: Path) -> None:
    """A whole file of this kernel's identity, with a symbol where the guest has none."""
    blob, symbols = description._unpacked(path.read_bytes(), identity := path_identity(path), TEXT)
    lied = [(at + 64 if name == "linux_banner" else at, name) for at, name in symbols]
    path.write_bytes(description._packed(identity, blob, lied, TEXT))


def path_identity(path: Path) -> bytes:
    return path.read_bytes()[len(description._MAGIC) + 32 :][:32]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged(0), "not a kernel of this version"),
        (damaged(40), "changed or cut off"),
        (damaged(-1), "changed or cut off"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "changed or cut off"),
        (lambda path: path.write_bytes(b""), "not a kernel of this version"),
        (other_kernel, "of another kernel"),
        (poisoned, "differs at byte"),
        (misplaced, "linux_banner elsewhere"),
        (lambda path: path.chmod(0o666), "other users can change it"),
    ],
    ids=["magic", "hash", "a bit", "cut off", "empty", "another kernel", "poisoned", "misplaced", "writable"],
)
def test_a_bad_file_is_refused_and_made_again(
    change: Any, said: str, tmp_path: Path, pairs: list[tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    good = describe(Guest().target, tmp_path)
    change(only_file(tmp_path))
    found = describe(Guest().target, tmp_path)
    assert not found.was_kept
    assert (found.btf, found.symbols) == (good.btf, good.symbols)
    assert said in caplog.text
    assert describe(Guest().target, tmp_path).was_kept


def test_few_kernels_are_kept(tmp_path: Path, pairs: list[tuple[int, str]]) -> None:
    for number in range(KERNELS_MAX + 2):
        describe(Guest(build=str(number)).target, tmp_path)
        os.utime(max(tmp_path.glob("*.kernel"), key=lambda path: path.stat().st_mtime_ns), (number, number))
    assert len(list(tmp_path.glob("*.kernel"))) == KERNELS_MAX
    assert not describe(Guest(build="0").target, tmp_path).was_kept


def test_without_a_place_to_keep_it_a_kernel_is_read(tmp_path: Path, pairs: list[tuple[int, str]]) -> None:
    (tmp_path / "file").touch()
    assert not describe(Guest().target, tmp_path / "file" / "below").was_kept


def test_vmcoreinfo_is_made_where_the_kernel_has_none(tmp_path: Path, pairs: list[tuple[int, str]]) -> None:
    described = describe(Guest().target, tmp_path)
    assert described.has_vmcoreinfo
    made = vmcoreinfo.parse(
        vmcoreinfo.make("6.1.0-test", described.addresses, described.types, moved=0x200_0000, phys_base=-7, levels=5)
    )
    assert made["OSRELEASE"] == "6.1.0-test"
    assert made["KERNELOFFSET"] == "2000000"
    assert made["NUMBER(phys_base)"] == "-7"
    assert made["NUMBER(pgtable_l5_enabled)"] == "1"
    assert made["OFFSET(list_head.prev)"] == "8"


def test_unreadable_tables_are_one_error(tmp_path: Path) -> None:
    guest = Guest()
    del guest.memory[TABLES_AT]
    with pytest.raises(LibvmiError, match=r"types and symbols of Linux 6.1.0-test cannot be read .* is unreadable"):
        describe(guest.target, tmp_path)


def test_a_kernel_without_symbols_says_so(tmp_path: Path) -> None:
    with pytest.raises(LibvmiError, match="neither where its symbol table is"):
        describe(Guest(has_info=False).target, tmp_path)


def test_the_folder_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert folder() == Path("/somewhere/vmishim/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative is ignored")
    assert folder() == Path("~/.cache/vmishim/kernels").expanduser()
