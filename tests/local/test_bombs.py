"""Small inputs that describe more than any memory holds, or more work than any machine does: what they may cost."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from struct import pack

import pytest

from trials.fuzz import ram
from trials.fuzz.bombs import BOMBS, btf_blob, btf_struct
from trials.fuzz.budget import MEMORY_MIB, OverBudgetError, within_budget
from vmishim.errors import LibvmiError
from vmishim.guests.ramfile import RamFile
from vmishim.kernel.btf import Btf
from vmishim.kernel.kallsyms import DIGITS, decode
from vmishim.kernel.profile import Member
from vmishim.libvmi.profiles import JsonProfile


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little(name: str) -> None:
    within_budget(partial(BOMBS[name].parse, BOMBS[name].make()))


def test_the_budget_ends_what_takes_too_long() -> None:
    def endless() -> None:
        while True:
            pass

    with pytest.raises(OverBudgetError, match="too much CPU time"):
        within_budget(endless)


@pytest.mark.parametrize("mib", [2 * MEMORY_MIB, 64 * MEMORY_MIB])
def test_the_budget_counts_memory_that_was_freed(mib: int) -> None:
    with pytest.raises(OverBudgetError, match="MiB"):
        within_budget(lambda: len(b"x" * (mib << 20)))


def kernel(folder: Path, extra: bytes = b"") -> RamFile:
    """The small guest, with what a process has in its memory."""
    path = folder / "ram"
    path.write_bytes(ram.guest(blob(), extra))
    return RamFile("small", path)


def blob() -> bytes:
    """BTF of ``struct a { u64 b; }``."""
    return btf_blob(bytes.fromhex("00000000000000010800000040000000") + btf_struct(1, [(3, 1, 0)]), b"\0a\0b\0")


DECOYS = {
    "nothing": b"",
    "version texts": ram.BANNER,
    "version texts and token tables": ram.BANNER + bytes(6) + ram.tokens(),
    "version texts and symbol tables": ram.BANNER
    + bytes(6)
    + ram.kallsyms([(0xFFFF_FFFF_8100_0000 + number, b"Tdecoy%d" % number) for number in range(300)]),
    "digits": DIGITS,
}


@pytest.mark.parametrize("what", DECOYS)
def test_what_a_process_has_in_its_memory_hides_no_kernel(tmp_path: Path, what: str) -> None:
    decoy = DECOYS[what]
    guest = kernel(tmp_path, decoy * (ram.IMAGE // max(len(decoy), 1)))
    profile = guest.profile
    assert profile.release == "6.12.0-small"
    assert profile.symbol("function_399") == 0xFFFF_FFFF_8100_3000 + 399
    assert (profile.vcpus, profile.page_offset, profile.memory_size) == (2, ram.PAGE_OFFSET, ram.SIZE)
    assert profile.btf.layout("a") == {"b": Member(0, 8)}
    with pytest.raises(KeyError):
        profile.symbol("decoy1")
    guest.close()


@pytest.mark.parametrize("offset", [0x1000, 0x1004, 0x1384, 1001])
def test_a_kernel_is_found_wherever_a_core_has_its_memory(tmp_path: Path, offset: int) -> None:
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header += pack("<IIQQQQQQ", 1, 7, offset, 0, 0, ram.SIZE, ram.SIZE, 0)
    path = tmp_path / "core"
    path.write_bytes(header.ljust(offset, b"\0") + ram.guest(blob(), ram.BANNER * 100))
    guest = RamFile("core", path)
    assert guest.profile.symbol("function_399") == 0xFFFF_FFFF_8100_3000 + 399
    guest.close()


def test_what_looks_like_a_kernel_without_its_page_tables_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    memory = ram.guest(blob())
    path.write_bytes(memory[: ram.IMAGE + 0x10_0000] + bytes(0x8000) + memory[ram.IMAGE + 0x10_8000 :])
    with pytest.raises(LibvmiError, match=r"^OS: no Linux kernel found"):
        RamFile("none", path)


def test_very_many_page_tables_are_refused_by_name(tmp_path: Path) -> None:
    """Each page of a process begins a chain of tables of its own."""
    chain = bytearray()
    for number in range(0, ram.IMAGE // 4096 - 1, 3):
        for step in (1, 2):
            page = bytearray(4096)
            page[4096 - 8 * step : 4096 - 8 * step + 8] = pack("<Q", (number + step) * 4096 | 0x63)
            chain += page
        chain += ram.BANNER.ljust(4096, b"\0")
    with pytest.raises(LibvmiError, match="gave up: more than 256 pages"):
        kernel(tmp_path, bytes(chain))


def test_names_longer_than_the_kernels_limit_are_refused_by_name() -> None:
    def memory(length: int) -> bytes:
        short = [(0xFFFF_FFFF_8100_0000 + number, b"T%d" % number) for number in range(300)]
        return bytes(4096) + ram.kallsyms([*short, (0xFFFF_FFFF_8100_0000, b"T".ljust(length, b"x"))])

    longest = memory(512)
    assert decode(longest, longest.find(DIGITS)).addresses["x" * 511] == 0xFFFF_FFFF_8100_0000
    longer = memory(513)
    with pytest.raises(ValueError, match="limit of 512"):
        decode(longer, longer.find(DIGITS))


def test_btf_names_longer_than_the_kernels_limit_are_refused_by_name() -> None:
    assert list(Btf(btf_blob(btf_struct(1, []), b"\0" + b"a" * 512 + b"\0")).structs()) == ["a" * 512]
    with pytest.raises(ValueError, match="limit of 512"):
        Btf(btf_blob(btf_struct(1, []), b"\0" + b"a" * 513 + b"\0"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a dump of every other page", "more than 1048576 separate pieces"),
        ("a dump of one page", "share their bytes"),
        ("program headers in a hole", "more than the limit of 262144"),
        ("records in a hole", "is empty"),
        ("a bitmap in a hole", "more than the limit of 1073741824"),
        ("damaged pages", "more than 256 pages of the dump are damaged"),
    ],
)
def test_a_dump_that_is_a_bomb_is_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / "dump"
    path.write_bytes(BOMBS[name].make())
    if "hole" in name:
        os.truncate(path, 1 << 43)
    with pytest.raises(LibvmiError, match=words):
        RamFile("bomb", path)


@pytest.mark.parametrize(
    "text",
    [
        b'{"user_types": {}, "symbols": {"a": {}}}',
        b'{"user_types": {}, "symbols": {"a": []}}',
        b'{"user_types": {}, "symbols": []}',
        b'{"$STRUCTS": {}, "$CONSTANTS": {"a": "much"}}',
        b'{"$STRUCTS": {}, "$CONSTANTS": {"a": 1e999}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_profile_is_one_clear_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text)
    with pytest.raises(LibvmiError, match=r"^OS: profile .* (is damaged at|cannot be read)"):
        JsonProfile(str(path))
