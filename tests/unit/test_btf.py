"""BTF: a small blob made by hand, damaged blobs."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.kernel.btf import Btf, length
from vmishim.kernel.profile import Member

RUNNING = Path("/sys/kernel/btf/vmlinux")
INT, PTR, ARRAY, STRUCT, UNION, TYPEDEF = 1, 2, 3, 4, 5, 8


def blob() -> bytes:
    """struct node { int pid; union { char comm[16]; long key; }; int a:3, b:5; node *next; node_t pair[2]; }"""
    strings = b"\0"

    def name(text: str) -> int:
        nonlocal strings
        at = len(strings)
        strings += text.encode() + b"\0"
        return at

    def head(text: str, kind: int, of: int, entries: int = 0, kind_flag: int = 0) -> bytes:
        return struct.pack("<III", name(text) if text else 0, kind_flag << 31 | kind << 24 | entries, of)

    def member(text: str, of: int, bits: int, width: int = 0) -> bytes:
        return struct.pack("<III", name(text) if text else 0, of, width << 24 | bits)

    types = b"".join(
        (
            head("int", INT, 4) + struct.pack("<I", 32),  # 1
            head("char", INT, 1) + struct.pack("<I", 8),  # 2
            head("long", INT, 8) + struct.pack("<I", 64),  # 3
            head("", ARRAY, 0) + struct.pack("<III", 2, 1, 16),  # 4
            head("", UNION, 16, 2) + member("comm", 4, 0) + member("key", 3, 0),  # 5
            head("", PTR, 7),  # 6
            head("node", STRUCT, 72, 6, 1)  # 7
            + member("pid", 1, 0)
            + member("", 5, 64)
            + member("a", 1, 192, 3)
            + member("b", 1, 195, 5)
            + member("next", 6, 256)
            + member("pair", 9, 320),
            head("pair_t", TYPEDEF, 10),  # 8
            head("", ARRAY, 0) + struct.pack("<III", 8, 1, 2),  # 9
            head("", STRUCT, 16, 2) + member("left", 1, 0) + member("right", 3, 64),  # 10
            head("empty", STRUCT, 0),  # 11
        )
    )
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("pid", Member(0, 4)),
        ("comm", Member(8, 16)),
        ("key", Member(8, 8)),
        ("a", Member(24, 4)),
        ("b", Member(24, 4)),
        ("next", Member(32, 8)),
        ("pair", Member(40, 32)),
        ("pair[1]", Member(56, 16)),
        ("pair[1].right", Member(64, 8)),
    ],
)
def test_member(member: str, expected: Member) -> None:
    assert Btf(blob()).member("node", member) == expected


def test_layout_sees_through_anonymous_members() -> None:
    assert list(Btf(blob()).layout("node")) == ["pid", "comm", "key", "a", "b", "next", "pair"]


def test_typedefs_and_tags_are_found_by_name() -> None:
    btf = Btf(blob())
    assert [btf.size(name) for name in ("pair_t", "struct node", "empty")] == [16, 72, 0]
    assert list(btf.structs()) == ["node", "empty"]
    assert "node" in btf
    assert "nodes" not in btf


@pytest.mark.parametrize(
    ("name", "member"),
    [("node", "no"), ("no", "pid"), ("node", "next.pid"), ("node", "pid[0]"), ("node", "pair[x]"), ("node", "")],
)
def test_unknown_names_are_key_errors(name: str, member: str) -> None:
    with pytest.raises(KeyError, match="no"):
        Btf(blob()).member(name, member)


def test_length_is_known_from_the_header() -> None:
    assert length(blob()[:24]) == len(blob())
    Btf(blob() + bytes(4096))


@given(st.integers(0, len(blob()) - 1))
def test_a_cut_blob_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="BTF"):
        Btf(blob()[:cut])


@given(st.integers(24, len(blob()) - 1), st.integers(0, 255))
def test_a_damaged_blob_never_hangs_or_breaks(at: int, byte: int) -> None:
    damaged = bytearray(blob())
    damaged[at] = byte
    try:
        btf = Btf(bytes(damaged))
    except ValueError:
        return
    for name in btf.structs():
        for ask in (btf.layout, btf.size, lambda name: btf.pointee(name, 0)):
            with suppress(KeyError):
                ask(name)


@pytest.mark.parametrize("deep", [3, 40])
def test_structures_nested_in_more_ways_than_can_be_counted(deep: int) -> None:
    """Each holds the next one twice, without a name and at the same place: 2^40 ways to the innermost."""
    strings = b"\0node\0inner\0"
    types = b""
    for number in range(1, deep + 1):
        name = 1 if number == 1 else 0
        member = struct.pack("<III", 0, number + 1, 0)
        types += struct.pack("<III", name, STRUCT << 24 | 2, 8) + member * 2
    types += struct.pack("<III", 0, STRUCT << 24 | 1, 8) + struct.pack("<III", 6, deep + 2, 0)
    types += struct.pack("<IIII", 0, INT << 24, 4, 32)
    head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    btf = Btf(head + types + strings)
    assert btf.layout("node") == {"inner": Member(0, 4)}
    assert btf.pointee("node", 0) is None


@pytest.mark.parametrize("index", ["-1", "4294967296", "0x" + "f" * 5000])
def test_an_index_that_no_array_has(index: str) -> None:
    with pytest.raises(KeyError):
        Btf(blob()).member("node", f"pair[{index}]")
