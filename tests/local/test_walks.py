"""Walks by plan over lists planted in this machine's kernel; and the interpreter of the unit tests, held to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import planter
from tests.ground.twins import Mirror, Twins
from tests.ground.walks import POISON, LongWalks, Requests
from vmishim.errors import FaultError
from vmishim.guests import local
from vmishim.guests.agent import AgentGuest, connect
from vmishim.wire.plan import Load, Op, Plan, Step, Take, Text


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with local.agent() as domain:

        def another() -> AgentGuest:
            return connect(replace(domain, timeout=30.0), "scalar")

        with closing(another()) as guest, planter.here() as planted:
            yield Twins(Mirror(planted), guest, another)


class TestHere(Requests, LongWalks):
    """By the eBPF programs, and each walk over a byte buffer too: the same records, faults and cycles."""

    @pytest.fixture(scope="class")
    @classmethod
    def ground(cls, twins: Twins) -> Twins:
        return twins


# ---- plans and memory by chance --------------------------------------------------------------------------------------

ROOM = 0x4000
"""Offset of the words that are drawn: what lies around them is mapped, whatever a plan adds or takes away."""
WORDS = 48
EXAMPLES = 3 * settings().max_examples


@st.composite
def pointers(draw: st.DrawFn) -> int:
    """Where a word points to: offsets from the ground's start; negative for what is not an address there."""
    kind = draw(st.sampled_from(["link", "link", "link", "inside", "end", "nulls", "bad"]))
    match kind:
        case "link":
            return ROOM + 16 * draw(st.integers(0, WORDS // 2 - 1))
        case "inside":
            return ROOM + draw(st.integers(0, 8 * WORDS))
        case "end":
            return -1 - draw(st.integers(0, 48))
        case "nulls":
            return -1000 - draw(st.integers(0, 20))
    return -2000 - draw(st.integers(0, 5))


def value(twins: Twins, pointer: int) -> int:
    """The word itself."""
    if pointer >= 0:
        return twins.planter.address + pointer
    if pointer > -1000:  # just before the end of the ground, or behind it
        return twins.nowhere - 24 - (pointer + 1)
    if pointer > -2000:
        return 2 * (-1000 - pointer) + 1
    return (0, 1, 0x7000, POISON, 2**64 - 8, 2**64 - 16)[-2000 - pointer]


@st.composite
def operations(draw: st.DrawFn) -> tuple[Op, ...]:
    known, ops = [0], list[Op]()
    for _ in range(draw(st.integers(0, 6))):
        source, offset = draw(st.sampled_from(known)), draw(st.integers(-40, 40))
        size = draw(st.sampled_from([1, 7, 8, 9, 16, 40, 2048]))
        match draw(st.sampled_from(["load", "take", "text"])):
            case "load":
                known.append(draw(st.integers(1, 4)))
                ops.append(Load(known[-1], source, offset, draw(st.sampled_from([0, 1, 7, 255]))))
            case "take":
                ops.append(Take(source, offset, size))
            case "text":
                ops.append(Text(source, offset, size))
    return tuple(ops)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, list[int]]:
    """A plan whose start is an offset, and its listed heads as pointers."""
    step = draw(st.sampled_from(Step))
    ring = step in (Step.RING, Step.RING_NODE)
    heads, stride = draw(st.integers(1, 20)), draw(st.sampled_from([0, 8, 16, 24]))
    listed = draw(st.lists(pointers(), min_size=heads, max_size=heads)) if not stride else []
    plan = Plan(
        ROOM + 8 * draw(st.integers(0, WORDS - 1)),
        step,
        draw(operations()),
        heads=heads,
        stride=stride,
        link=draw(st.sampled_from([0, 8, 16, -8])),
        next=draw(st.sampled_from([0, 8])) if ring else 0,
        bias=0 if ring else draw(st.sampled_from([0, 0, 8, -16])),
        nulls=draw(st.integers(0, 10)),
        max_nodes=draw(st.sampled_from([1, 5, 1 << 20])),
    )
    return plan, listed


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(pointers(), min_size=WORDS, max_size=WORDS), drawn=plans(), orderly=st.booleans())
def test_any_plan_over_any_memory_brings_the_same_from_a_buffer(
    twins: Twins, words: list[int], drawn: tuple[Plan, list[int]], orderly: bool
) -> None:
    """Rings, chains and tables in every state of disorder: torn, looped, leading nowhere."""
    plan, listed = drawn
    ground = twins.planter
    placed = [value(twins, pointer) for pointer in words]
    if orderly:  # each second word points back to where the first of its kind came from
        for at in range(0, WORDS, 2):
            if 0 <= (target := words[at] - ROOM) < 8 * WORDS and target % 16 == 0:
                placed[target // 8 + 1] = ground.address + ROOM + 8 * at
    ground.words(ROOM, *placed)
    ground.words(ground.size - 24, *placed[:3])
    heads = [value(twins, pointer) for pointer in listed]
    before = next(twins.compared)
    twins.walk(replace(plan, start=ground.address + plan.start if plan.stride else 0), heads)
    assert next(twins.compared) == before + 2, "it was compared"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 20_000), count=st.integers(1, 20_000))
def test_any_read_brings_the_same_from_a_buffer(twins: Twins, at: int, count: int) -> None:
    """Near the end of the ground, and over it."""
    address = twins.nowhere - at
    answers: list[bytes | tuple[int, bytes]] = []
    for guest in (twins.guest, twins.double):
        try:
            answers.append(guest.remote.read(address, count))
        except FaultError as fault:
            answers.append((fault.address, fault.data))
    assert answers[0] == answers[1]
