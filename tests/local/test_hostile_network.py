"""A real agent of this machine under attack: on the network, at its port, and by an IDS with a permitted key."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from trials.hostile import flood, resident
from trials.hostile.port import listening
from trials.hostile.sockets import Agent, sockets
from vmishim.client import Remote
from vmishim.wire.messages import (
    BULK_MAX,
    Answer,
    Chunk,
    Failure,
    Lookup,
    Members,
    Memory,
    Message,
    More,
    Names,
    Pointees,
    Read,
    Symbols,
    Walk,
    decode,
    encode,
)
from vmishim.wire.plan import Load, Plan, PlanError, Step, Take, Text

FRAMES = 1000
GROWTH_MAX = 32 << 10
"""KiB that an agent may have grown by in the end; a session and a walk are a few MiB at most."""
BASE = 0xFFFF_8880_0000_0000


@pytest.fixture(scope="module")
def ours() -> Iterator[Agent]:
    with listening() as agent:
        yield agent


def test_an_ids_on_a_hostile_network_gets_what_is_right_or_an_error(ours: Agent) -> None:
    outcome = sockets(FRAMES, seed=1, agent=ours)
    print(outcome)
    assert (outcome.tally.accepted, outcome.tally.crashed) == (0, 0)
    assert outcome.tally.frames >= FRAMES
    assert outcome.right > 0
    assert outcome.errors > 0
    assert outcome.ids[1] - outcome.ids[0] < GROWTH_MAX
    assert outcome.agent[1] - outcome.agent[0] < GROWTH_MAX


@pytest.mark.parametrize("pour", [flood.handshakes, flood.half_open, flood.oversize])
def test_a_flood_neither_starves_a_session_nor_fills_the_agent(ours: Agent, pour: Callable[[Agent], str]) -> None:
    pressed = flood.flood(ours, pour)
    print(pressed)
    assert pressed.wrong == []
    assert pressed.answers > 0
    assert pressed.most - pressed.before < GROWTH_MAX


def test_half_open_connections_that_take_every_descriptor_make_way() -> None:
    """The live session does not notice; a new one waits for libzmq to close them, not for those who hold them."""
    with listening(descriptors=100) as few, ExitStack() as stack:
        with few.link() as live:
            remote = Remote(live.exchange)
            remote.symbols(["vsnprintf"])
            with suppress(OSError):
                for _ in range(250):  # what is not accepted waits in the listener's queue, up to 100
                    stack.enter_context(flood.connected(few, timeout=4.0))
            assert remote.symbols(["vsnprintf"]) != [None]
            assert live.handshakes == 1
        with few.link(timeout=20.0) as fresh:
            assert Remote(fresh.exchange).symbols(["vsnprintf"]) != [None]


def requests(seed: int, count: int) -> Iterator[Message]:
    """What an IDS may ask that holds a permitted key and no good intentions."""
    chance = random.Random(seed)
    edges = [0, 1, 8, 0x1000, BASE, 2**47 - 1, 2**63, 2**64 - 1, 2**64 - 8, 0xFFFF_FFFF_8100_0000]

    def number() -> int:
        return chance.choice(edges) if chance.random() < 0.7 else chance.getrandbits(64)

    def plan() -> Plan:
        ops = [
            chance.choice((Take, Text))(0, chance.randrange(-(2**31), 2**31), chance.choice((1, 8, 64, 4096))),
            Load(1, 0, chance.randrange(-4096, 4096), chance.choice((0, 7, 4095))),
            Take(1, chance.randrange(-64, 64), 8),
        ]
        step, heads = chance.choice(list(Step)), chance.choice((1, 2, 1000, 2**32))
        ring = step in (Step.RING, Step.RING_NODE)
        most = chance.choice((1, 5, 1000, 1 << 24))
        return Plan(number(), step, tuple(ops), heads, 8, 0, 8 * ring * chance.randrange(2), max_nodes=most)

    made = 0
    while made < count:
        try:
            yield chance.choice(
                (
                    lambda: Read(
                        chance.choice((0, 1, number())), number(), chance.choice((0, 1, 4096, BULK_MAX, number()))
                    ),
                    lambda: Lookup(number(), number()),
                    lambda: Walk(plan(), [[number(), chance.choice((1, 4096))]]),
                    lambda: More(chance.randrange(50)),
                    lambda: Names([number() for _ in range(chance.choice((1, 5, 1025)))]),
                    lambda: Symbols(["", "\n", "init_task", "a\0b", "\ud800", "x" * 100_000]),
                    lambda: Members(
                        ["task_struct", "task_struct comm[-1]", " ", "a" * 5000 + " b", "list_head next.next"]
                    ),
                    lambda: Pointees(["task_struct 99999999999999999999", "#-1 0", "#99999999 8", "x", ""]),
                    lambda: Symbols(["vsnprintf"]),
                )
            )()
            made += 1
        except PlanError:
            continue


def test_whatever_a_permitted_ids_asks_is_answered(ours: Agent) -> None:
    with ours.link(timeout=20.0) as link:
        asked = list(requests(1, 400))
        before = resident(ours.pid)
        for request in asked:
            reply = decode(link.exchange(encode(request)))
            assert isinstance(reply, Answer | Chunk | Failure | Memory)
        assert link.handshakes == 1
        assert resident(ours.pid) - before < GROWTH_MAX
        known = decode(link.exchange(encode(Symbols(["vsnprintf"]))))
        assert isinstance(known, Answer)
        assert known.values[0] is not None
