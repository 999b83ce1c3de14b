"""All of BTF, decoded twice: by us, and by the tests' own reader of it (tests/guest/isf.py)."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest import isf
from tests.unit.test_btf import blob
from vmishim.kernel import variables
from vmishim.kernel.types import Field, Integer, Kind, Parameter, Types
from vmishim.kernel.variables import Array, Pointer

RUNNING = Path("/sys/kernel/btf/vmlinux")


def every_kind() -> bytes:
    """One type of each kind. Numbers as in the comments."""
    strings = b"\0"

    def name(text: str) -> int:
        nonlocal strings
        at = len(strings)
        strings += text.encode() + b"\0"
        return at if text else 0

    def head(text: str, kind: int, of: int, entries: int = 0, flag: int = 0) -> bytes:
        return struct.pack("<III", name(text), flag << 31 | kind << 24 | entries, of)

    types = b"".join(
        (
            head("int", 1, 4) + struct.pack("<I", 1 << 24 | 32),  # 1
            head("long unsigned int", 1, 8) + struct.pack("<I", 64),  # 2
            head("_Bool", 1, 1) + struct.pack("<I", 4 << 24 | 8),  # 3
            head("char", 1, 1) + struct.pack("<I", 3 << 24 | 8),  # 4
            head("", 2, 0),  # 5 void *
            head("list_head", 4, 16, 2) + struct.pack("<6I", name("next"), 7, 0, name("prev"), 7, 64),  # 6
            head("", 2, 6),  # 7 struct list_head *
            head("colour", 6, 4, 2, 1) + struct.pack("<IiIi", name("RED"), -1, name("GREEN"), 7),  # 8
            head("wide", 19, 8, 2) + struct.pack("<6I", name("BIG"), 1, 2, name("SMALL"), 3, 0),  # 9
            head("beyond", 7, 0, 0, 1),  # 10 union beyond;
            head("", 13, 1, 2) + struct.pack("<4I", name("path"), 5, 0, 0),  # 11 int (void *path, ...)
            head("open", 12, 11, 1),  # 12
            head("", 10, 14),  # 13 const
            head("", 9, 8),  # 14 volatile enum colour
            head("hue", 8, 13),  # 15 typedef
            head("double", 16, 8),  # 16
            head("", 4, 16, 2) + struct.pack("<6I", name("seq"), 1, 0, name("timekeeper"), 2, 64),  # 17
            head("runqueues", 14, 6) + struct.pack("<I", 1),  # 18
            head(".data..percpu", 15, 64, 1) + struct.pack("<3I", 18, 32, 16),  # 19
            head("user", 18, 6),  # 20 type tag
            head("", 2, 20),  # 21
            head("deprecated", 17, 6) + struct.pack("<i", -1),  # 22
            head("bits", 4, 8, 2, 1) + struct.pack("<6I", name("low"), 2, 3 << 24, name("high"), 2, 61 << 24 | 3),  # 23
            head("", 11, 5),  # 24 restrict
            head("", 3, 0) + struct.pack("<III", 7, 1, 4),  # 25 struct list_head *[4]
            head("core_t", 8, 17),  # 26 typedef struct { int seq; unsigned long timekeeper; } core_t
        )
    )
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def test_each_kind_is_decoded() -> None:
    types = Types(every_kind())
    assert [types.type(number).kind for number in range(len(types))] == [
        *(0, 1, 1, 1, 1, 2, 4, 2, 6, 19, 7, 13, 12, 10, 9, 8, 16, 4, 14, 15, 18, 2, 17, 4, 11, 3, 8),
    ]
    assert types.integer(1) == Integer(4, True, False, False, 32)
    assert types.integer(3) == Integer(1, False, False, True, 8)
    assert types.integer(4) == Integer(1, True, True, False, 8)
    assert types.fields(6) == [Field("next", 7, 0, 0), Field("prev", 7, 64, 0)]
    assert types.fields(23) == [Field("low", 2, 0, 3), Field("high", 2, 3, 61)]
    assert types.values(8) == {"RED": -1, "GREEN": 7}
    assert types.values(9) == {"BIG": 1 | 2 << 32, "SMALL": 3}
    assert types.parameters(11) == [Parameter("path", 5), Parameter("", 0)]
    assert types.array(25) == (7, 4)
    assert (types.type(10).name, types.type(10).flag) == ("beyond", True)
    assert types.resolved(15).name == "colour"
    assert types.enumerators["GREEN"] == (8, 7)
    assert types.variables["runqueues"][1:] == (6, 32, 16, ".data..percpu")
    assert types.anonymous["seq", "timekeeper"] == 17
    assert types.named[Kind.TYPEDEF, "hue"] == 15
    assert [types.size_of(number) for number in (0, 5, 12, 15, 16, 25)] == [0, 8, 0, 4, 8, 32]


def test_what_is_of_another_kind_is_a_key_error() -> None:
    types = Types(every_kind())
    for ask in (types.integer, types.array, types.fields, types.values, types.parameters):
        with pytest.raises(KeyError, match="of kind POINTER, not"):
            ask(5)
    for number in (-1, len(types)):
        with pytest.raises(KeyError, match="BTF refers to type"):
            types.type(number)


@pytest.mark.parametrize("data", [every_kind(), blob()])
@given(st.data())
def test_a_damaged_blob_gives_values_or_errors_of_its_own(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 8))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with suppress(ValueError, KeyError):
        types = Types(bytes(damaged))
        for number in range(min(len(types), 64)):
            for ask in (types.resolved, types.size_of, types.fields, types.values, types.parameters, types.integer):
                with suppress(KeyError):
                    ask(number)
        for read in ("named", "enumerators", "variables", "anonymous"):
            with suppress(KeyError):
                getattr(types, read)


@pytest.mark.skipif(not RUNNING.exists(), reason="this kernel has no BTF")
def test_the_running_kernel_as_the_tests_own_reader_has_it() -> None:
    data = RUNNING.read_bytes()
    ours, theirs = Types(data), isf.Types(data)
    assert len(ours) == len(theirs.starts)
    for number in range(1, len(ours), 7):
        name, kind, flag, count, last, _ = theirs.head(number)
        one = ours.type(number)
        assert (one.name, one.kind, one.flag, one.entries) == (name, kind, flag, count)
        assert last in (one.size, one.target) or one.kind in (Kind.ARRAY, Kind.FORWARD)
        if one.kind in (Kind.ENUM, Kind.ENUM64):
            assert ours.values(number) == theirs.constants(number)
        if one.kind in (Kind.STRUCT, Kind.UNION):
            where = [field["offset"] + field["type"].get("bit_position", 0) / 8 for _, field in theirs.fields(number)]
            named = [field for field in ours.fields(number) if field.name]
            if len(named) == len(where) == len(dict(theirs.fields(number))):
                assert [field.bit / 8 for field in named] == where


def test_types_as_c_spells_them() -> None:
    types = Types(every_kind())
    head = types.named[Kind.STRUCT, "list_head"]
    assert variables.parse(types, "struct list_head") == head
    assert variables.parse(types, "struct list_head * *") == Pointer(Pointer(head))
    assert variables.parse(types, "struct list_head * [4]") == Array(Pointer(head), 4)
    assert variables.parse(types, "unsigned long [3][GREEN]") == Array(Array(2, 7), 3)
    assert variables.parse(types, "unsigned long [2][]", 80) == Array(Array(2, 5), 2)
    assert variables.parse(types, "void *") == Pointer(0)
    assert variables.parse(types, "{seq timekeeper}") == 17
    assert variables.parse(types, "struct task_struct") is None
    assert variables.parse(types, "int [NO_SUCH]") is None
    with pytest.raises(ValueError, match="not a type"):
        variables.parse(types, "int (*)(void)")


def test_a_variable_is_never_larger_than_its_space() -> None:
    types = Types(every_kind())
    assert variables.declared(types, "modules", 16) == 6
    assert variables.declared(types, "modules", 8) is None
    assert variables.declared(types, "tk_core", 64) == 17
    assert variables.declared(types, "no_such_variable", 64) is None


def test_every_entry_of_the_table_is_a_type() -> None:
    types = Types(every_kind())
    for name, texts in variables.TABLE.items():
        assert texts, name
        for text in texts:
            variables.parse(types, text)
