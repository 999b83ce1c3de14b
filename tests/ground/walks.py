"""Walks by plan over planted lists: what comes back is what was planted, all of it, in order.

The tests of each class run over a byte buffer (``tests/unit``), in this machine's kernel (``tests/local``) and in the
lab VM's (``tests/guest``): a subclass there says what ``ground`` is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest

from guest_agent.agent import WALKS_MAX
from lab.planter import Layout, Planter, Stores
from vmishim.errors import FaultError
from vmishim.guests.agent import AgentGuest
from vmishim.memory.reader import Extent
from vmishim.wire.messages import BULK_MAX, Chunk, Failure, More, Walk, decode, encode, expect
from vmishim.wire.plan import HEADS_MAX, OPS_MAX, RECORD_MAX, TAKE_MAX, Kind, Load, Op, Plan, Step, Take, Text

NUMBER = (Take(0, 0, 8),)
LINK = 16
SIZE = 48
POISON = 0xDEAD000000000100
"""What list_del leaves in a node (include/linux/poison.h); no address at all."""


@dataclass
class Walked:
    """All that a walk brought."""

    rows: list[tuple[Any, ...]]
    chunks: list[Chunk]

    @property
    def nodes(self) -> list[int]:
        """Addresses of the nodes, in order."""
        return [row[0] for row in self.rows if row[3] == Kind.NODE]

    @property
    def values(self) -> list[Any]:
        """The first slot of each node."""
        return [row[4] for row in self.rows if row[3] == Kind.NODE]

    @property
    def trouble(self) -> dict[str, int]:
        """What the walk says went wrong; empty when nothing did."""
        last = self.chunks[-1]
        names = ("truncated", "faulted", "fault_at", "cycles", "cycle_at", "torn")
        return {name: int(getattr(last, name)) for name in names if getattr(last, name)}


@dataclass
class Ground:
    """A kernel to plant lists in, and the guest that reads it."""

    planter: Planter
    guest: AgentGuest
    another: Callable[[], AgentGuest]
    """One more session with the same agent."""
    chunk: int = BULK_MAX
    """Bytes of records that come at once."""

    def layout(self) -> Layout:
        return Layout(self.planter)

    @property
    def nowhere(self) -> int:
        """An address that is not mapped, right behind the ground."""
        return self.planter.address + self.planter.size

    def walk(self, plan: Plan, heads: Sequence[int] = ()) -> Walked:
        chunks = list(self.guest.remote.walk(plan, heads))
        return Walked([row for chunk in chunks for row in plan.records(chunk.bulk)], chunks)

    def ask(self, request: bytes, guest: AgentGuest | None = None) -> Any:
        return decode((guest or self.guest).link.exchange(request))


class Walks:
    """The tests, of whatever kernel ``ground`` is in."""

    # ---- steps ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [1, 2, 3, 100])
    @pytest.mark.parametrize("next_", [0, 8])
    def test_ring(self, ground: Ground, count: int, next_: int) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(count, SIZE)
        layout.ring([head, *(node + LINK for node in nodes)])
        layout.plant()
        walked = ground.walk(Plan(head, Step.RING, NUMBER, link=LINK, next=next_))
        assert walked.nodes == nodes[:: -1 if next_ else 1]
        assert walked.values == list(range(count))[:: -1 if next_ else 1]
        assert walked.chunks[-1].head == [nodes[0] + LINK, nodes[-1] + LINK]
        assert walked.trouble == {}

    @pytest.mark.parametrize("next_", [0, 8])
    def test_ring_whose_head_is_in_a_node(self, ground: Ground, next_: int) -> None:
        layout = ground.layout()
        nodes = layout.nodes(50, SIZE)
        layout.ring([node + LINK for node in nodes])
        layout.plant()
        walked = ground.walk(Plan(nodes[0] + LINK, Step.RING_NODE, NUMBER, link=LINK, next=next_))
        assert walked.nodes == ([nodes[0], *nodes[:0:-1]] if next_ else nodes)
        assert walked.chunks[-1].head == [nodes[1] + LINK, nodes[-1] + LINK]
        assert walked.trouble == {}

    @pytest.mark.parametrize("bias", [0, 8, -16])
    def test_chain(self, ground: Ground, bias: int) -> None:
        """Each node has the pointer that leads on at LINK; what points to the node points ``bias`` bytes before."""
        layout = ground.layout()
        head = layout.room(8)
        nodes = layout.nodes(100, SIZE)
        for here, there in zip([head, *(node + LINK for node in nodes)], [*nodes, None], strict=True):
            layout.put(here, there + LINK - bias if there else 0)
        layout.plant()
        walked = ground.walk(Plan(head, Step.CHAIN, NUMBER, link=LINK, bias=bias))
        assert walked.nodes == nodes
        assert walked.values == list(range(100))
        assert walked.trouble == {}

    def test_chain_that_is_a_ring_through_its_head(self, ground: Ground) -> None:
        """What a chain learned from reads turns out to be when the list was a ring: no cycle, since it met its head."""
        layout = ground.layout()
        nodes = layout.nodes(10, SIZE)
        layout.ring([node + LINK for node in nodes])
        layout.plant()
        walked = ground.walk(Plan(nodes[0] + LINK, Step.CHAIN, NUMBER, link=LINK))
        assert walked.nodes == [*nodes[1:], nodes[0]]
        assert walked.trouble == {}

    def test_once(self, ground: Ground) -> None:
        layout = ground.layout()
        heads = layout.room(8 * 20)
        nodes = layout.nodes(10, SIZE)
        for number, node in enumerate(nodes):
            layout.put(heads + 16 * number + 8, node + LINK)
        layout.plant()
        walked = ground.walk(Plan(heads, Step.ONCE, NUMBER, heads=20, link=LINK))
        assert [(row[0], row[2]) for row in walked.rows] == [(node, 2 * at + 1) for at, node in enumerate(nodes)]
        assert walked.trouble == {}

    def test_self(self, ground: Ground) -> None:
        layout = ground.layout()
        nodes = layout.nodes(100, SIZE)
        layout.plant()
        table = ground.walk(Plan(min(nodes), Step.SELF, NUMBER, heads=100, stride=SIZE))
        assert table.nodes == sorted(nodes)
        listed = ground.walk(Plan(0, Step.SELF, NUMBER, heads=100, stride=0), nodes)
        assert listed.nodes == nodes
        assert listed.values == list(range(100))
        assert [row[2] for row in listed.rows] == list(range(100))

    @pytest.mark.parametrize("stride", [8, 16, 24])
    @pytest.mark.parametrize("step", [Step.CHAIN, Step.NULLS])
    def test_table(self, ground: Ground, step: Step, stride: int) -> None:
        layout, table, expected = _table(ground, step, 100, stride, nulls=1 << 29)
        layout.plant()
        nulls = (1 << 29) if step is Step.NULLS else 0
        walked = ground.walk(Plan(table, step, NUMBER, heads=100, stride=stride, link=LINK, nulls=nulls))
        assert [(row[0], row[2]) for row in walked.rows] == expected
        assert walked.trouble == {}

    def test_rings_listed(self, ground: Ground) -> None:
        """Rings that hang from many nodes, in one walk; some of them empty."""
        layout = ground.layout()
        expected, heads = [], []
        for number in range(40):
            heads.append(layout.room(16))
            nodes = layout.nodes(number % 4, SIZE) if number % 4 else []
            layout.ring([heads[-1], *(node + LINK for node in nodes)])
            expected += [(node, number) for node in nodes]
        layout.plant()
        walked = ground.walk(Plan(0, Step.RING, NUMBER, heads=40, stride=0, link=LINK), heads)
        assert [(row[0], row[2]) for row in walked.rows] == expected
        assert walked.trouble == {}

    @pytest.mark.parametrize("step", [Step.CHAIN, Step.NULLS])
    def test_eight_heads_at_a_time_are_as_one_by_one(self, ground: Ground, step: Step) -> None:
        layout, table, expected = _table(ground, step, 4001, 8)
        layout.plant()
        together = ground.walk(Plan(table, step, NUMBER, heads=4001, link=LINK))
        heads = range(table, table + 4001 * 8, 8)
        alone = ground.walk(Plan(0, step, NUMBER, heads=4001, stride=0, link=LINK), heads)
        assert together.rows == alone.rows
        assert [(row[0], row[2]) for row in together.rows] == expected

    # ---- nothing to find ---------------------------------------------------------------------------------------------

    def test_empty_ring(self, ground: Ground) -> None:
        layout = ground.layout()
        head = layout.room(16)
        layout.ring([head])
        layout.plant()
        for next_ in (0, 8):
            walked = ground.walk(Plan(head, Step.RING, NUMBER, link=LINK, next=next_))
            assert (walked.rows, walked.trouble) == ([], {})
            assert walked.chunks[-1].head == [head, head]
        alone = ground.walk(Plan(head, Step.RING_NODE, NUMBER))
        assert (alone.nodes, alone.trouble) == ([head], {})

    @pytest.mark.parametrize("step", [Step.CHAIN, Step.NULLS, Step.ONCE])
    @pytest.mark.parametrize("heads", [1, 7, 8, 9, 1000])
    def test_empty_table(self, ground: Ground, step: Step, heads: int) -> None:
        layout = ground.layout()
        table = layout.room(8 * heads)
        if step is Step.NULLS:
            layout.put(table, *(number << 1 | 1 for number in range(heads)))
        layout.plant()
        walked = ground.walk(Plan(table, step, NUMBER, heads=heads, link=LINK))
        assert (walked.rows, walked.trouble) == ([], {})

    # ---- operations --------------------------------------------------------------------------------------------------

    def test_every_operation(self, ground: Ground) -> None:
        layout = ground.layout()
        first, second, third = (layout.room(64) for _ in range(3))
        block = layout.room(TAKE_MAX)
        content = random.Random(1).randbytes(TAKE_MAX)
        layout.put(first, 1, second | 0xD)
        layout.put(second, 2, third)
        layout.put(third, 3, block)
        layout.blob(first + 32, b"short\0behind the end")
        layout.blob(second + 32, b"no end in sight")
        layout.blob(block, content)
        layout.plant()
        ops: tuple[Op, ...] = (
            Load(1, 0, 8, 0xF),
            Load(2, 1, 8),
            Load(3, 2, 8),
            Take(3, 0, TAKE_MAX),
            Take(3, 5, 1),
            Take(3, 3, 8),
            Take(2, 0, 8),
            Take(1, -16, 8),
            Text(0, 32, 16),
            Text(1, 32, 8),
            Text(3, 0, 1),
        )
        layout.put(second - 16, 77)
        layout.plant()
        (row,) = ground.walk(Plan(first, Step.SELF, ops)).rows
        assert row[:4] == (first, 0, 0, Kind.NODE)
        assert row[4:] == (
            second | 0xD,
            third,
            block,
            content,
            content[5:6],
            int.from_bytes(content[3:11], "little"),
            3,
            77,
            b"short".ljust(16, b"\0"),
            b"no end \0",
            b"\0",
        )

    def test_as_much_of_a_node_as_a_plan_may_take(self, ground: Ground) -> None:
        layout = ground.layout()
        nodes = layout.nodes(200, RECORD_MAX)
        content = random.Random(2).randbytes(RECORD_MAX - 24)
        for node in nodes:
            layout.blob(node, content)
        layout.plant()
        sizes = [TAKE_MAX, TAKE_MAX, TAKE_MAX, TAKE_MAX - 24]
        ops = tuple(Take(0, at * TAKE_MAX, size) for at, size in enumerate(sizes))
        walked = ground.walk(Plan(0, Step.SELF, ops, heads=200, stride=0), nodes)
        assert walked.nodes == nodes
        assert {b"".join(row[4:]) for row in walked.rows} == {content}
        assert len(walked.chunks) == 200 * RECORD_MAX // ground.chunk + 1, (
            "records of 16 KiB fill chunks to their last byte"
        )

    def test_as_many_operations_as_a_plan_may_hold(self, ground: Ground) -> None:
        layout = ground.layout()
        (node,) = layout.nodes(1, 8 * OPS_MAX)
        layout.put(node, *range(OPS_MAX))
        layout.plant()
        (row,) = ground.walk(Plan(node, Step.SELF, tuple(Take(0, 8 * at, 8) for at in range(OPS_MAX)))).rows
        assert row[4:] == tuple(range(OPS_MAX))
        missing = ground.nowhere - node - 8 * (OPS_MAX - 1)
        (row,) = ground.walk(Plan(node, Step.SELF, tuple(Take(0, missing + 8 * at, 8) for at in range(OPS_MAX)))).rows
        assert row[1] == 1 << (OPS_MAX - 1), "the last operation alone is behind the ground"

    def test_take_and_text_of_the_same_numbers_are_two_plans(self, ground: Ground) -> None:
        layout = ground.layout()
        node = layout.room(32)
        layout.blob(node, b"one\0two\0three\0four\0")
        layout.plant()
        for op, expected in ((Take(0, 0, 16), b"one\0two\0three\0fo"), (Text(0, 0, 16), b"one".ljust(16, b"\0"))) * 2:
            (row,) = ground.walk(Plan(node, Step.SELF, (op,))).rows
            assert row[4] == expected

    def test_what_cannot_be_read_is_marked_and_the_rest_comes_through(self, ground: Ground) -> None:
        layout = ground.layout()
        node, bad = layout.room(64), layout.room(64)
        layout.put(node, 1, bad, 0, ground.nowhere, POISON, 0x1000)
        layout.put(bad, 2)
        layout.plant()
        ops: tuple[Op, ...] = (
            Load(1, 0, 8),
            Load(2, 0, 16),  # NULL: itself readable
            Take(2, 8, 16),
            Load(3, 0, 24),  # behind the ground
            Take(3, 0, 4096),
            Text(3, 0, 64),
            Take(3, -8, 8),
            Take(3, -8, 9),  # one byte too far
            Load(4, 0, 32),
            Load(5, 4, 0),  # through no address
            Take(5, 0, 100),
            Load(6, 0, 40),
            Take(6, 0, 8),  # a user address
            Take(1, 0, 8),
        )
        ground.planter.words(ground.planter.size - 8, 0x1122334455667788)
        # What a slot held in an earlier walk must not shine through.
        full = layout.room(8192)
        layout.blob(full, b"\xff" * 8192)
        layout.plant()
        ground.walk(Plan(full, Step.SELF, (Take(0, 0, 4096), Take(0, 4096, 4096))))
        (row,) = ground.walk(Plan(node, Step.SELF, ops)).rows
        assert {at for at in range(len(ops)) if row[1] & 1 << at} == {2, 4, 5, 7, 9, 10, 12}
        assert row[4:] == (
            bad,
            0,
            bytes(16),
            ground.nowhere,
            bytes(4096),
            bytes(64),
            0x1122334455667788,
            bytes(9),
            POISON,
            0,
            bytes(100),
            0x1000,
            0,
            2,
        )

    # ---- lists that are not as they should be ------------------------------------------------------------------------

    @pytest.mark.parametrize("step", [Step.RING, Step.RING_NODE, Step.CHAIN, Step.NULLS])
    @pytest.mark.parametrize("entry", [0, 1, 2, 37, 99])
    def test_a_cycle_that_misses_the_head_is_one(self, ground: Ground, step: Step, entry: int) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(100, SIZE)
        links = [node + LINK for node in nodes]
        if step is Step.RING_NODE:
            head, entry = links[0], max(entry, 1)
        layout.ring([head, *(link for link in links if link != head)])
        layout.put(links[-1], links[entry])
        layout.plant()
        walked = ground.walk(Plan(head, step, NUMBER, link=LINK))
        assert walked.nodes[:100] == nodes
        assert set(walked.nodes) == set(nodes)
        assert len(walked.nodes) <= 300, "Brent's bound: three times what there is"
        last = walked.chunks[-1]
        assert (last.cycles, last.faulted, last.truncated) == (1, 0, False)
        assert last.cycle_at in links[entry:]

    def test_every_cycle_of_a_table_is_counted_and_its_other_chains_come_through(self, ground: Ground) -> None:
        layout, table, expected = _table(ground, Step.CHAIN, 64, 8)
        chains = [[node for node, head in expected if head == number] for number in range(64)]
        looped = [chain for chain in chains if len(chain) == 3]
        for chain in looped:
            layout.put(chain[-1] + LINK, chain[-1] + LINK)
        layout.plant()
        walked = ground.walk(Plan(table, Step.CHAIN, NUMBER, heads=64, link=LINK))
        assert {(row[0], row[2]) for row in walked.rows} == set(expected)
        assert walked.trouble == {"cycles": len(looped), "cycle_at": looped[0][-1] + LINK}

    @pytest.mark.parametrize("step", [Step.RING, Step.RING_NODE, Step.CHAIN, Step.NULLS])
    @pytest.mark.parametrize("where", ["nowhere", "poison", "user"])
    def test_a_pointer_into_nowhere_ends_the_chain_and_is_named(self, ground: Ground, step: Step, where: str) -> None:
        address = {"nowhere": ground.nowhere, "poison": POISON, "user": 0x7000}[where]
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(60, SIZE)
        links = [node + LINK for node in nodes]
        if step is Step.RING_NODE:
            head = links[0]
        layout.ring([head, *(link for link in links if link != head)])
        layout.put(links[40], address)
        layout.plant()
        walked = ground.walk(Plan(head, step, NUMBER, link=LINK))
        assert walked.nodes == nodes[:41]
        assert walked.trouble == {"faulted": 1, "fault_at": address}

    @pytest.mark.parametrize("step", [Step.RING, Step.RING_NODE])
    def test_a_null_in_a_ring_is_a_fault(self, ground: Ground, step: Step) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(60, SIZE)
        if step is Step.RING_NODE:
            head = nodes.pop(0) + LINK
        layout.ring([head, *(node + LINK for node in nodes)])
        layout.put(nodes[30] + LINK, 0)
        layout.plant()
        walked = ground.walk(Plan(head, step, NUMBER, link=LINK))
        assert walked.nodes[step is Step.RING_NODE :] == nodes[:31]
        assert walked.trouble == {"faulted": 1}

    @pytest.mark.parametrize("next_", [0, 8])
    def test_a_ring_never_initialised_ends_at_once_and_says_so(self, ground: Ground, next_: int) -> None:
        layout = ground.layout()
        heads = layout.room(32)
        layout.ring([heads + 16])
        layout.plant()
        walked = ground.walk(Plan(heads, Step.RING, NUMBER, heads=2, stride=16, link=LINK, next=next_))
        assert [row[:4] for row in walked.rows] == [(0, 2**64 - 1, 0, Kind.HEAD)]
        assert walked.trouble == {"faulted": 1}
        assert len(walked.chunks) == 1

    def test_a_pointer_that_means_address_zero_ends_the_chain(self, ground: Ground) -> None:
        layout = ground.layout()
        head = layout.room(8)
        (node,) = layout.nodes(1, SIZE)
        layout.put(head, node + LINK - 8)
        layout.put(node + LINK, 2**64 - 8)
        layout.plant()
        walked = ground.walk(Plan(head, Step.CHAIN, NUMBER, link=LINK, bias=8))
        assert (walked.nodes, walked.trouble) == ([node], {"faulted": 1})
        layout.put(head, 2**64 - 8)
        layout.plant()
        walked = ground.walk(Plan(head, Step.CHAIN, NUMBER, link=LINK, bias=8))
        assert (walked.nodes, walked.trouble, len(walked.chunks)) == ([], {"faulted": 1}, 1)

    @pytest.mark.parametrize(
        ("step", "stride"),
        [(Step.RING, 16), *((step, stride) for step in (Step.CHAIN, Step.NULLS, Step.ONCE) for stride in (8, 16))],
    )
    def test_heads_that_cannot_be_read_are_told_one_by_one(self, ground: Ground, step: Step, stride: int) -> None:
        """A table that runs over the end of the ground: ten heads are there, ten are not."""
        table = ground.nowhere - 10 * stride
        heads = [table + stride * number for number in range(20)]
        for number, head in enumerate(heads[:10]):
            value = {Step.RING: head, Step.NULLS: number << 1 | 1}.get(step, 0)
            ground.planter.words(head - ground.planter.address, *[value] * (stride // 8))
        walked = ground.walk(Plan(table, step, NUMBER, heads=20, stride=stride, link=LINK, max_nodes=1))
        expected = [(head, 2**64 - 1, number, Kind.FAULT, 0) for number, head in enumerate(heads) if number >= 10]
        assert walked.rows == expected
        assert walked.trouble == {"faulted": 10, "fault_at": ground.nowhere}

    def test_buckets_empty_in_a_foreign_way_are_told(self, ground: Ground) -> None:
        """A bucket that ends in another chain's number, or was never initialised."""
        layout, table, expected = _table(ground, Step.NULLS, 100, 8)
        odd = 1234 << 1 | 1
        layout.put(table + 8 * 4, odd)
        layout.put(table + 8 * 97, 0)  # past the last full eight
        expected = [pair for pair in expected if pair[1] not in (4, 97)]
        full = next(node for node, _ in expected)
        layout.plant()
        for stride, heads in ((8, ()), (0, range(table, table + 800, 8))):
            walked = ground.walk(
                Plan(table if stride else 0, Step.NULLS, NUMBER, heads=100, stride=stride, link=LINK), heads
            )
            assert [row for row in walked.rows if row[3]] == [
                (odd, 2**64 - 1, 4, Kind.HEAD, 0),
                (0, 2**64 - 1, 97, Kind.HEAD, 0),
            ]
            assert [(row[0], row[2]) for row in walked.rows if not row[3]] == expected
            assert walked.nodes[0] == full

    def test_a_chain_that_ends_in_another_ones_number_is_torn(self, ground: Ground) -> None:
        layout = ground.layout()
        table = layout.room(16)
        nodes = layout.nodes(6, SIZE)
        links = [node + LINK for node in nodes]
        layout.chain(table, links[:3], 1 << 1 | 1)
        layout.chain(table + 8, links[3:], 1 << 1 | 1)
        layout.plant()
        walked = ground.walk(Plan(table, Step.NULLS, NUMBER, heads=2, link=LINK))
        assert (walked.nodes, walked.trouble) == (nodes, {"torn": 1})

    @pytest.mark.parametrize("next_", [0, 8])
    def test_links_that_disagree_are_torn(self, ground: Ground, next_: int) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(20, SIZE)
        links = [node + LINK for node in nodes]
        layout.ring([head, *links])
        for number in (5, 11, 12):
            layout.put(links[number] + 8 - next_, POISON)
        layout.plant()
        walked = ground.walk(Plan(head, Step.RING, NUMBER, link=LINK, next=next_))
        assert (walked.nodes, walked.trouble) == (nodes[:: -1 if next_ else 1], {"torn": 3})

    # ---- long lists ----------------------------------------------------------------------------------------------

    def test_more_than_a_chunk_goes_on_and_the_whole_is_exact(self, ground: Ground) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(20_000, 128)
        layout.ring([head, *(node + LINK for node in nodes)])
        layout.plant()
        plan = Plan(head, Step.RING, (Take(0, 0, 8), Take(0, 32, 88)), link=LINK)
        walked = ground.walk(plan)
        assert walked.nodes == nodes
        assert walked.values == list(range(20_000))
        assert walked.trouble == {}
        # 120 bytes a record: a chunk is as full as whole records make it.
        most = ground.chunk // 120 * 120
        full, rest = divmod(20_000 * 120, most)
        assert [len(chunk.bulk) for chunk in walked.chunks] == [*[most] * full, rest]
        assert [bool(chunk.walk) for chunk in walked.chunks] == [*[True] * full, False]

    @pytest.mark.parametrize("step", [Step.RING, Step.CHAIN])
    def test_a_list_longer_than_wanted_is_cut_and_says_so(self, ground: Ground, step: Step) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(50, SIZE)
        links = [node + LINK for node in nodes]
        if step is Step.RING:
            layout.ring([head, *links])
        else:
            layout.chain(head, links)
        layout.plant()
        for wanted in (1, 49, 50, 51):
            walked = ground.walk(Plan(head, step, NUMBER, link=LINK, max_nodes=wanted))
            assert walked.nodes == nodes[:wanted]
            assert walked.trouble == ({"truncated": 1} if wanted < 50 else {})

    def test_empty_buckets_behind_the_last_node_wanted_cut_nothing(self, ground: Ground) -> None:
        layout = ground.layout()
        table = layout.room(8 * 100)
        nodes = layout.nodes(3, SIZE)
        layout.chain(table, [node + LINK for node in nodes])
        layout.plant()
        walked = ground.walk(Plan(table, Step.CHAIN, NUMBER, heads=100, link=LINK, max_nodes=3))
        assert (walked.nodes, walked.trouble) == (nodes, {})

    def test_reads_come_along_with_the_first_chunk(self, ground: Ground) -> None:
        plan, nodes = _long(ground)
        content = random.Random(3).randbytes(4096)
        end = ground.planter.size - 4096
        ground.planter.write(end, content)
        here, there = ground.planter.address + end, ground.nowhere
        found: dict[int, bytes] = {}
        chunks = list(ground.guest.remote.walk(plan, (), [(here, 4096), (there - 8, 16), (here + 1, 3)], found))
        assert found == {here: content, here + 1: content[1:4]}
        assert [row[0] for chunk in chunks for row in plan.records(chunk.bulk)] == nodes


class LongWalks:
    """What takes too long over a buffer, or is a matter of two processors."""

    def test_as_many_listed_heads_as_there_may_be(self, ground: Ground) -> None:
        layout = ground.layout()
        nodes = layout.nodes(HEADS_MAX, 16)
        layout.plant()
        walked = ground.walk(Plan(0, Step.SELF, NUMBER, heads=HEADS_MAX, stride=0), nodes)
        assert walked.nodes == nodes
        assert walked.values == list(range(HEADS_MAX))

    def test_table_of_a_quarter_million_buckets_mostly_empty(self, ground: Ground) -> None:
        count = 1 << 18
        layout = ground.layout()
        table = layout.room(8 * count)
        layout.put(table, *(number << 1 | 1 for number in range(count)))
        nodes = layout.nodes(200, SIZE)
        full = sorted(random.Random(7).sample(range(count), 100))  # the first and last of eight among them by chance
        full[0], full[-1] = 0, count - 1
        expected = []
        for at, number in enumerate(full):
            pair = nodes[2 * at : 2 * at + 2]
            layout.chain(table + 8 * number, [node + LINK for node in pair], number << 1 | 1)
            expected += [(node, number) for node in pair]
        layout.plant()
        walked = ground.walk(Plan(table, Step.NULLS, NUMBER, heads=count, link=LINK))
        assert [(row[0], row[2]) for row in walked.rows] == expected
        assert walked.trouble == {}
        assert len(walked.chunks) == 1

    @pytest.mark.parametrize("poison", [False, True])
    def test_a_list_that_changes_under_the_walk(self, ground: Ground, poison: bool) -> None:
        """Nodes come and go while walks run. Nothing is invented; what stays is brought, or the walk says why not."""
        layout = ground.layout()
        head = layout.room(16)
        staying = layout.nodes(40_000, 32)
        guests = layout.nodes(64, 32)
        layout.ring([head, *(node + LINK for node in staying)])
        layout.plant()
        base, rounds = ground.planter.address, []
        for number, node in enumerate(guests):
            before, new, after = (
                address + LINK - base for address in (staying[600 * number], node, staying[600 * number + 1])
            )
            # As __list_add and __list_del_entry store them (include/linux/list.h); list_del poisons, list_del_rcu half.
            stores: Stores = [
                (after + 8, base + new),
                (new, base + after),
                (new + 8, base + before),
                (before, base + new),
            ]
            stores += [(after + 8, base + before), (before, base + after)]
            stores += [(new, POISON), (new + 8, POISON + 0x22)] if poison else []
            rounds.append(stores)
        everyone, whole = {*staying, *guests}, 0
        with ground.planter.stirring(rounds) as done:
            enough = monotonic() + 5  # an emulated CPU does few walks in that time
            for _ in range(20):
                walked = ground.walk(Plan(head, Step.RING, NUMBER, link=LINK))
                assert set(walked.nodes) <= everyone
                assert len(walked.chunks) >= (1 if walked.trouble else 2)
                last = walked.chunks[-1]
                if not (last.faulted or last.cycles):
                    assert [node for node in walked.nodes if node not in guests] == staying
                    whole += 1
                assert not last.faulted or last.fault_at == POISON
                if monotonic() > enough and (whole or poison):
                    break
        assert done[0] > 0, "the writer has written"
        assert whole or poison

    def test_a_hundred_thousand_nodes(self, ground: Ground) -> None:
        layout = ground.layout()
        head = layout.room(16)
        nodes = layout.nodes(100_000, 80)
        layout.ring([head, *(node + LINK for node in nodes)])
        layout.plant()
        walked = ground.walk(Plan(head, Step.RING, (Take(0, 0, 8), Take(0, 16, 56)), link=LINK))
        assert walked.nodes == nodes
        assert walked.values == list(range(100_000))
        assert walked.trouble == {}


class Requests(Walks):
    """And what is asked of an agent that reads in the clear, request by request."""

    # ---- walks under way -----------------------------------------------------------------------------------------

    def test_unfinished_walks_are_bounded_and_the_oldest_makes_room(self, ground: Ground) -> None:
        plan, nodes = _long(ground)
        begun = [expect(ground.guest.link.exchange(encode(Walk(plan))), Chunk) for _ in range(WALKS_MAX + 1)]
        assert len({chunk.walk for chunk in begun}) == WALKS_MAX + 1
        gone = ground.ask(encode(More(begun[0].walk)))
        assert isinstance(gone, Failure)
        assert (gone.code, str(begun[0].walk) in gone.text) == ("walk", True)
        for chunk in begun[1:]:
            rest = expect(ground.guest.link.exchange(encode(More(chunk.walk))), Chunk)
            rows = [*plan.records(chunk.bulk), *plan.records(rest.bulk)]
            assert ([row[0] for row in rows], rest.walk) == (nodes, 0)

    def test_a_chunk_is_handed_out_once(self, ground: Ground) -> None:
        plan, _ = _long(ground)
        first = expect(ground.guest.link.exchange(encode(Walk(plan))), Chunk)
        expect(ground.guest.link.exchange(encode(More(first.walk))), Chunk)
        assert isinstance(ground.ask(encode(More(first.walk))), Failure)

    def test_another_session_cannot_go_on_with_a_walk(self, ground: Ground) -> None:
        plan, nodes = _long(ground)
        first = expect(ground.guest.link.exchange(encode(Walk(plan))), Chunk)
        with closing(ground.another()) as other:
            refused = ground.ask(encode(More(first.walk)), other)
            assert isinstance(refused, Failure)
            assert refused.code == "walk"
        rest = expect(ground.guest.link.exchange(encode(More(first.walk))), Chunk)
        rows = [*plan.records(first.bulk), *plan.records(rest.bulk)]
        assert [row[0] for row in rows] == nodes

    def test_walks_side_by_side_do_not_mix(self, ground: Ground) -> None:
        """Two sessions, walks of listed heads, chunk by chunk in turns."""
        layout = ground.layout()
        lists = [layout.nodes(30_000, 16), layout.nodes(30_000, 32)]
        layout.plant()
        found: list[list[int]] = [[], []]
        with closing(ground.another()) as other:
            plan = Plan(0, Step.SELF, (Take(0, 0, 8), Take(0, 0, 16)), heads=30_000, stride=0)
            walks = [ground.guest.remote.walk(plan, lists[0]), other.remote.walk(plan, lists[1])]
            for chunks in zip(*walks, strict=True):
                for nodes, chunk in zip(found, chunks, strict=True):
                    nodes += [row[0] for row in plan.records(chunk.bulk)]
        assert found == lists

    # ---- bad input -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("part", "value", "says"),
        [
            ("start", 2**64, "start"),
            ("step", 6, "6"),
            ("heads", 0, "heads"),
            ("heads", 2**32 + 1, "0x100000000"),
            ("stride", 1 << 21, "stride"),
            ("link", 1 << 21, "link"),
            ("next", 16, "next"),
            ("bias", 1 << 21, "bias"),
            ("nulls", -1, "nulls"),
            ("max_nodes", 1 << 25, "max_nodes"),
            ("ops", [[1, 0, 0, 4097]], "0x1000"),
            ("ops", [[1, 0, 0, 0]], "size"),
            ("ops", [[1, 0, 1 << 31, 8]], "offset"),
            ("ops", [[1, 1, 0, 8]], "register 1"),
            ("ops", [[0, 16, 0, 0, 0]], "0xf"),
            ("ops", [[0, 1, 0, 0, 4096]], "tags"),
            ("ops", [[3, 0, 0, 8]], "plan"),
            ("ops", [[-1, 0, 0, 8]], "operation"),
            ("ops", [[1, 0, 0, 8]] * 49, "48"),
            ("ops", [[1, 0, 0, 4096]] * 4, "16384"),
        ],
    )
    def test_a_plan_out_of_bounds_is_refused_with_the_limit_named(
        self, ground: Ground, part: str, value: Any, says: str
    ) -> None:
        names = ("start", "step", "ops", "heads", "stride", "link", "next", "bias", "nulls", "max_nodes")
        good = Plan(ground.planter.address, Step.SELF, NUMBER).to_json()
        bad = [value if name == part else known for name, known in zip(names, good, strict=True)]
        text = json.dumps([bad, []]).encode()
        refused = ground.ask(Walk.KIND.to_bytes(1) + len(text).to_bytes(4, "little") + text)
        assert isinstance(refused, Failure)
        assert refused.code == "plan"
        assert says in refused.text

    def test_heads_that_do_not_match_the_plan_are_refused(self, ground: Ground) -> None:
        listed, table = (Plan(0, Step.SELF, NUMBER, heads=2, stride=stride) for stride in (0, 8))
        for plan, heads in ((listed, b""), (listed, bytes(8)), (listed, bytes(17)), (table, bytes(16))):
            refused = ground.ask(encode(Walk(plan, bulk=heads)))
            assert isinstance(refused, Failure)
            assert refused.code == "plan"

    def test_names_that_are_none_are_answered_as_unknown(self, ground: Ground) -> None:
        names = ["no_such_symbol", "", "\ud800", "\n", "init_task\n"]
        assert ground.guest.remote.symbols(names) == [None] * 5
        assert ground.guest.remote.members(["no_such_struct", "task_struct no_such", "\ud800 x"]) == [None] * 3
        questions = ["no_such 0", "#999999999 0", "#-1 0", "# 0", "task_struct", "task_struct -8", "\ud800 0", ""]
        assert ground.guest.remote.pointees(questions) == [None] * 8

    def test_oversize_reads_are_refused_with_the_limit_named(self, ground: Ground) -> None:
        text = json.dumps([0, ground.planter.address, BULK_MAX + 1]).encode()
        refused = ground.ask(b"\5" + len(text).to_bytes(4, "little") + text)
        assert isinstance(refused, Failure)
        assert refused.code == "oversize"
        assert str(BULK_MAX) in refused.text

    @pytest.mark.parametrize("size", [1, 8, 4095, 4096, 4097, BULK_MAX, BULK_MAX + 1, 3 * BULK_MAX + 5])
    def test_reads_are_exact(self, ground: Ground, size: int) -> None:
        content = random.Random(size).randbytes(size)
        ground.planter.write(4000, content)
        assert ground.guest.remote.read(ground.planter.address + 4000, size) == content

    @pytest.mark.parametrize("count", [1, 7, 8, 9, 4095, 4096])
    def test_a_scatter_read_brings_what_can_be_read_of_each_address_in_their_order(
        self, ground: Ground, count: int
    ) -> None:
        content = random.Random(count).randbytes(600 * 4096)
        ground.planter.write(0, content)
        places = random.Random(1).sample(range(600 * 4096 - count), 500)
        wanted = [ground.planter.address + at for at in places]
        wanted[100:100] = [ground.nowhere, ground.nowhere - 1 if count > 1 else ground.nowhere, 0, 4096, 2**64 - 1]
        assert list(ground.guest.remote.scatter(wanted, count)) == [
            Extent(ground.planter.address + at, content[at : at + count]) for at in places
        ]

    @pytest.mark.parametrize("count", [0, -1, 4097])
    def test_a_scatter_read_of_too_much_or_nothing_is_refused(self, ground: Ground, count: int) -> None:
        with pytest.raises(ValueError, match=f"1 to 4096 bytes of each address, not {count}"):
            list(ground.guest.remote.scatter([ground.planter.address], count))

    @pytest.mark.parametrize("size", [1, 8, 5000, BULK_MAX + 100])
    def test_a_read_over_the_end_brings_what_is_there(self, ground: Ground, size: int) -> None:
        content = random.Random(size).randbytes(size)
        ground.planter.write(ground.planter.size - size, content)
        with pytest.raises(FaultError) as caught:
            ground.guest.remote.read(ground.nowhere - size, size + 1)
        assert (caught.value.data, caught.value.address) == (content, ground.nowhere)


def _table(
    ground: Ground, step: Step, heads: int, stride: int, nulls: int = 0
) -> tuple[Layout, int, list[tuple[int, int]]]:
    """A hash table whose buckets hold none to three nodes: the layout, the table, and (node, bucket) in order."""
    layout = ground.layout()
    table = layout.room(stride * heads)
    expected = []
    lengths = random.Random(heads).choices([0, 1, 2, 3], [8, 4, 2, 1], k=heads)
    nodes = iter(layout.nodes(sum(lengths), SIZE))
    for number, length in enumerate(lengths):
        chain = [next(nodes) for _ in range(length)]
        end = (nulls + number) << 1 | 1 if step is Step.NULLS else 0
        layout.chain(table + stride * number, [node + LINK for node in chain], end)
        expected += [(node, number) for node in chain]
    return layout, table, expected


def _long(ground: Ground) -> tuple[Plan, list[int]]:
    """A planted ring of two chunks."""
    layout = ground.layout()
    head = layout.room(16)
    nodes = layout.nodes(1500, 1024)
    layout.ring([head, *(node + LINK for node in nodes)])
    layout.plant()
    return Plan(head, Step.RING, (Take(0, 0, 1000),), link=LINK), nodes
