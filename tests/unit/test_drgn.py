"""drgn's finders over BTF made by hand, its memory over a buffer, and what plans bring: all without a guest."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import pytest

pytest.importorskip("drgn", reason="pip install 'vmishim[drgn]', or run ci/setup again")

import drgn

from tests.unit.test_pagecache import START, Memory
from tests.unit.test_types import every_kind
from vmishim.drgn.finders import Finders
from vmishim.drgn.memory import Segments
from vmishim.drgn.plans import fetch
from vmishim.errors import LinkError
from vmishim.guests.description import Description
from vmishim.memory.pagecache import PageCache
from vmishim.memory.reader import PAGE_SIZE, PHYSICAL, Extent
from vmishim.wire.messages import Chunk
from vmishim.wire.plan import Kind, Load, Plan, Step, Take, Text

TEXT = 0xFFFF_FFFF_8100_0000
SYMBOLS = [
    (0x1000, "runqueues"),
    (TEXT, "_text"),
    (TEXT, "_stext"),
    (TEXT + 0x100, "open"),
    (TEXT + 0x200, "_etext"),
    (TEXT + 0x1000, "modules"),
    (TEXT + 0x1010, "alias"),
    (TEXT + 0x1010, "unknown"),
    (TEXT + 0x1020, "static"),
    (TEXT + 0x1028, "static"),
    (TEXT + 0x2000, "_end"),
]


@pytest.fixture
def prog() -> drgn.Program:
    """A program whose kernel has one type of each kind."""
    made = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    kernel = Description("6.1", "", b"", every_kind(), SYMBOLS, b"", True, 0, False)
    Finders(made, kernel, lambda: drgn.SymbolIndex([])).register()
    return made


def test_types_are_those_of_btf(prog: drgn.Program) -> None:
    head = prog.type("struct list_head")
    assert [(member.name, member.offset, member.type.type_name()) for member in head.members] == [
        ("next", 0, "struct list_head *"),
        ("prev", 8, "struct list_head *"),
    ]
    assert (head.size, head.members[0].type.type.type_name()) == (16, "struct list_head")
    assert prog.type("hue").type.type_name() == "const volatile enum colour"
    colour = prog.type("enum colour")
    assert [(value.name, value.value) for value in colour.enumerators] == [("RED", -1), ("GREEN", 7)]
    assert [value.value for value in prog.type("enum wide").enumerators] == [1 | 2 << 32, 3]
    assert prog.type("char").is_signed
    assert prog.type("_Bool").kind == drgn.TypeKind.BOOL
    assert not prog.type("union beyond").is_complete()
    bits = prog.type("struct bits").members
    assert [(member.name, member.bit_offset, member.bit_field_size) for member in bits] == [
        ("low", 0, 3),
        ("high", 3, 61),
    ]
    assert prog["open"].type_.type_name() == "int (void *path, ...)"
    with pytest.raises(LookupError):
        prog.type("struct colour")


def test_objects_are_values_functions_and_variables(prog: drgn.Program) -> None:
    assert prog["GREEN"].value_() == 7
    assert (prog["open"].address_, prog["open"].type_.kind) == (TEXT + 0x100, drgn.TypeKind.FUNCTION)
    assert prog["modules"].type_.type_name() == "struct list_head"
    assert (prog["runqueues"].address_, prog["runqueues"].type_.type_name()) == (0x1000, "struct list_head")
    assert (prog["unknown"].address_, prog["unknown"].type_.kind) == (TEXT + 0x1010, drgn.TypeKind.VOID)
    with pytest.raises(KeyError):
        prog["no_such"]


def test_symbols_reach_to_the_next_one(prog: drgn.Program) -> None:
    assert [(found.name, found.address, found.size) for found in prog.symbols("modules")] == [
        ("modules", TEXT + 0x1000, 16)
    ]
    assert {found.name for found in prog.symbols(TEXT + 0x1011)} == {"alias", "unknown"}
    assert [found.address for found in prog.symbols("static")] == [TEXT + 0x1020, TEXT + 0x1028]
    assert prog.symbol(TEXT + 0x1F0).name == "open"
    assert prog.symbol(TEXT + 0x1FFF).name == "static"
    for nowhere in (TEXT - 1, TEXT + 0x2001, 0x1000):
        with pytest.raises(LookupError):
            prog.symbol(nowhere)
    assert len(prog.symbols()) == len(SYMBOLS) - 1


@pytest.mark.parametrize("loop", [(8, 8), (10, 2), (2, 2), (3, 2)])
def test_types_that_contain_themselves_are_an_error(loop: tuple[int, int]) -> None:
    """A hostile guest's BTF: a type without an end is refused, a structure that points to itself is none."""
    kinds = {8: b"", 10: b"", 2: b"", 3: struct.pack("<III", 2, 1, 4)}
    strings = b"\0a\0int\0"
    types = b"".join(
        (
            struct.pack("<III", 3, 1 << 24, 4) + struct.pack("<I", 1 << 24 | 32),
            struct.pack("<III", 1 if loop[0] == 8 else 0, loop[0] << 24, 3) + kinds[loop[0]],
            struct.pack("<III", 1 if loop[1] == 8 else 0, loop[1] << 24, 2) + b"",
            struct.pack("<III", 1, 8 << 24, 2),
        )
    )
    blob = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
    made = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    Finders(
        made,
        Description("6.1", "", b"", blob, SYMBOLS, b"", True, 0, False),
        lambda: drgn.SymbolIndex([]),
    ).register()
    with pytest.raises(LookupError, match=r"refers to itself|could not find"):
        made.type("a")


def test_the_c_bit_is_no_part_of_an_address() -> None:
    """drgn takes bits 12 to 51 of a page-table entry; in a confidential VM, bit 47 or 51 says that it is encrypted."""
    memory = Memory((START, 4))
    segments = Segments(PageCache(memory), START, 4 * PAGE_SIZE)
    for bit in (47, 51):
        assert segments.read_physical(1 << bit | 0x2008, 8, 0, True) == memory.raw(START + 0x2008, 8)
    with pytest.raises(drgn.FaultError, match="the guest has no memory") as caught:
        segments.read_physical(4 * PAGE_SIZE - 8, 16, 0, True)
    assert caught.value.address == 4 * PAGE_SIZE


def test_physical_memory_without_a_direct_map_is_asked_for_as_such() -> None:
    memory = Memory((0, 2), space=PHYSICAL)
    segments = Segments(PageCache(memory), 0, 0)
    assert segments.read_physical(0x1008, 8, 0, True) == memory.raw(0x1008, 8, PHYSICAL)
    with pytest.raises(drgn.FaultError, match="the guest has no readable memory") as caught:
        segments.read_physical(0x5000, 8, 0, True)
    assert caught.value.address == 0x5000


def test_a_fault_is_drgns_and_a_broken_connection_is_not(prog: drgn.Program) -> None:
    memory = Memory((START, 1))
    Segments(PageCache(memory), START, 0).register(prog)
    assert prog.read(START + 8, 8) == memory.raw(START + 8, 8)
    with pytest.raises(
        drgn.FaultError, match="the guest has no readable memory at this address: 0xffff888000001000"
    ) as caught:
        prog.read(START + PAGE_SIZE - 8, 16)
    assert caught.value.address == START + PAGE_SIZE
    memory.broken = True
    with pytest.raises(LinkError, match="the agent is gone"):
        prog.read(0xFFFF_C900_0000_0000, 8)


class Agent:
    """One that answers any plan with these records."""

    def __init__(self, bulk: bytes, head: Sequence[int] = (0, 0)) -> None:
        self._chunk = Chunk(0, False, 0, 0, 0, 0, 0, [], list(head), bulk)

    def walk(self, plan: Plan, heads: Sequence[int] = ()) -> list[Chunk]:
        return [self._chunk]


def brought(plan: Plan, *records: tuple[Any, ...], head: Sequence[int] = (0, 0)) -> list[Extent]:
    bulk = b"".join(plan.record.pack(*record) for record in records)
    return list(fetch(cast(Any, Agent(bulk, head)), plan))


def test_what_a_plan_brings_is_memory_and_nothing_that_it_could_not_read() -> None:
    plan = Plan(START, Step.RING, (Take(0, 0, 4), Load(1, 0, 8), Take(1, 16, 8), Take(0, 4, 2)), link=0)
    node, pointer = START + 0x100, START + 0x200
    assert brought(plan, (node, 0, 0, Kind.NODE, b"abcd", pointer, 7, b"ef"), head=(1, 2)) == [
        Extent(START, struct.pack("<QQ", 1, 2)),
        Extent(node, b"abcd"),
        Extent(pointer + 16, struct.pack("<Q", 7)),
        Extent(node + 4, b"ef"),
    ]
    assert brought(plan, (node, 0b0010, 0, Kind.NODE, b"abcd", 0, 0, b"ef")) == [
        Extent(node, b"abcd"),
        Extent(node + 4, b"ef"),
    ]
    assert brought(plan, (node, 0b1101, 0, Kind.NODE, b"", pointer, 0, b"")) == []
    assert brought(plan, (0, 0, 0, Kind.FAULT, b"", 0, 0, b"")) == []


@pytest.mark.parametrize(
    ("slot", "memory"),
    [(b"ab\0\xff\xff\xff\xff\xff", b"ab\0"), (b"abcdefg\0", b"abcdefg"), (b"\0" * 8, b"\0")],
)
def test_a_string_is_memory_up_to_its_end_and_the_end_of_one_cut_off_is_not(slot: bytes, memory: bytes) -> None:
    plan = Plan(START, Step.RING, (Text(0, 32, 8),), link=0)
    assert brought(plan, (START, 0, 0, Kind.NODE, slot)) == [Extent(START + 32, memory)]
