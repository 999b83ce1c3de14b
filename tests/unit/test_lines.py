"""Stages carried out over lines, held to the interpreter that stands in for the eBPF programs."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as some

from tests.ground.buffer import Buffer, Walk
from vmishim.memory.reader import KERNEL_FLOOR
from vmishim.readahead.fields import Stage
from vmishim.readahead.lines import LINES_MAX, Lines
from vmishim.readahead.trails import LINE
from vmishim.wire.plan import Load, Op, Plan, Step, Take, Text

SIZE = 4096
OFFSETS = some.integers(-80, 160)
WORDS = some.one_of(
    some.integers(0, SIZE + 200).map(lambda at: Buffer().address + at),  # a pointer, also past the end
    some.sampled_from([0, 7, 0x4142434445464748, 0xFFFF_8000_A0AA_A000, (1 << 64) - 8, KERNEL_FLOOR]),
)


@some.composite
def stages(draw: some.DrawFn) -> Stage:
    """Operations of which each begins at the node or at a pointer loaded before."""
    ops: list[Op] = []
    loaded = 0
    for _ in range(draw(some.integers(1, 6))):
        src, offset = draw(some.integers(0, loaded)), draw(OFFSETS)
        match draw(some.sampled_from(["load", "take", "text"])):
            case "load":
                loaded += 1
                ops.append(Load(loaded, src, offset, draw(some.sampled_from([0, 7, 255]))))
            case "take":
                ops.append(Take(src, offset, draw(some.sampled_from([1, 4, 8, 16, 256]))))
            case _:
                ops.append(Text(src, offset, draw(some.sampled_from([8, 64]))))
    return Stage((), tuple(ops), ())


def walked(memory: Buffer, stage: Stage, nodes: list[int]) -> list[list[Any]]:
    if not nodes:
        return [[] for _ in range(4 + len(stage.ops))]
    plan = Plan(0, Step.SELF, stage.ops, heads=len(nodes), stride=0)
    walk = Walk(plan, tuple(nodes))
    walk.run(memory, 1 << 20)
    return plan.columns(b"".join(walk.records))


def brought(memory: Buffer, addresses: list[int]) -> Lines:
    lines = {at: memory.read(at, LINE) for at in addresses}
    return Lines(addresses, {at: data for at, data in lines.items() if data is not None})


@given(
    words=some.lists(WORDS, min_size=8, max_size=64), stage=stages(), nodes=some.lists(WORDS, max_size=8, unique=True)
)
def test_what_is_brought_of_lines_is_what_a_plan_brings(words: list[int], stage: Stage, nodes: list[int]) -> None:
    memory, nodes = Buffer(size=SIZE), [node for node in nodes if node]
    memory.write(64, struct.pack(f"<{len(words)}Q", *words))
    there, truth = list(range(memory.address - LINE, memory.address + SIZE + LINE, LINE)), walked(memory, stage, nodes)
    # What the guest would be asked about is asked for once, as of a pass before, and then all is here.
    first = brought(memory, there)
    _, elsewhere = first.carry_out(stage, nodes)
    first.use(stage, walked(memory, stage, elsewhere))
    lines = brought(memory, sorted({*there, *first.used}))
    columns, rest = lines.carry_out(stage, nodes)
    assert not rest
    assert columns[0:2] + columns[4:] == truth[0:2] + truth[4:]


@given(
    words=some.lists(WORDS, min_size=8, max_size=64),
    stage=stages(),
    nodes=some.lists(WORDS, max_size=8, unique=True),
    missing=some.sets(some.integers(0, SIZE // LINE)),
)
def test_a_node_whose_memory_is_not_all_there_is_left_to_the_guest(
    words: list[int], stage: Stage, nodes: list[int], missing: set[int]
) -> None:
    memory, nodes = Buffer(size=SIZE), [node for node in nodes if node]
    memory.write(64, struct.pack(f"<{len(words)}Q", *words))
    there = [memory.address + LINE * number for number in range(SIZE // LINE) if number not in missing]
    columns, rest = brought(memory, there).carry_out(stage, nodes)
    assert sorted([*columns[0], *rest]) == sorted(nodes)
    whole = walked(memory, stage, columns[0])
    assert columns[0:2] + columns[4:] == whole[0:2] + whole[4:]


def test_what_was_used_last_time_is_all_that_is_needed() -> None:
    memory = Buffer(size=SIZE)
    memory.write(8, struct.pack("<Q", memory.address + 1000))
    stage = Stage((), (Load(1, 0, 8), Take(1, 50, 256), Text(1, 0, 64)), ())
    first = Lines([], {})
    nodes = [memory.address]
    assert first.carry_out(stage, nodes)[1] == nodes
    first.use(stage, walked(memory, stage, nodes))
    assert first.used == [memory.address + at for at in (0, 960, 1024, 1088, 1152, 1216, 1280)]
    assert not brought(memory, first.used).carry_out(stage, nodes)[1]


def test_of_too_many_lines_none_is_brought() -> None:
    lines = Lines([], {})
    for last in (LINES_MAX, LINES_MAX + 1):
        nodes = [Buffer().address + LINE * number for number in range(last)]
        lines.use(Stage((), (Take(0, 0, 8),), ()), [nodes, [], [], [], []])
        assert lines.used == (nodes if last == LINES_MAX else [])
