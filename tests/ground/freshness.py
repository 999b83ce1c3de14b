"""The promises of docs/freshness.md, each on lists planted in this machine's kernel, through an agent in this process.

So a test says what the kernel holds at each moment, what becomes of each request, and which thread is where.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from guest_agent.agent import Agent
from guest_agent.kernel import Kernel
from lab import planter
from lab.planter import Planter
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests import agent_profile
from vmishim.guests.agent import AgentGuest, Strategy
from vmishim.libvmi import AccessContext, Libvmi, TranslateMechanism, pause
from vmishim.link import Link
from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import Extent
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD, Field
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.messages import More, Read, Walk
from vmishim.wire.plan import Step

LINK, SIZE = 16, 64
"""Where a planted node has its link, and its bytes."""


class InProcessLink:
    """In place of a link: carries requests to an agent in this process, one at a time."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.requests: list[int] = []
        """The kind of each."""
        self.before: Callable[[int], None] = lambda number: None
        """Called with the number of each request, from 1; may fail or take its time."""
        self._lock = threading.Lock()

    def exchange(self, message: bytes) -> bytes:
        with self._lock:
            self.requests.append(message[0])
            self.before(len(self.requests))
            return self.agent.answer(b"here", message)

    def renew(self) -> None:
        """For a forked child."""
        self._lock = threading.Lock()
        self.before = lambda number: None

    def close(self) -> None:
        pass


class Planted(AgentGuest):
    """This machine as a guest that has the planted lists."""

    def __init__(self, link: InProcessLink, places: list[KernelList], strategy: Strategy = "batch") -> None:
        super().__init__("planted", cast(Link, link), strategy)
        if strategy == "batch":
            self.reader = self._cache = ReadAhead(self.remote, places)
            self.words, self.cells = self._cache.words, self._cache.cells


class Ground:
    """Planted memory, and scripts that read it."""

    def __init__(self, planted: Planter, agent: Agent) -> None:
        self.planter = planted
        self.base = planted.address
        self.agent = agent
        self.link = InProcessLink(agent)

    def put(self, at: int, *values: int) -> None:
        self.planter.words(at, *values)

    def ring(self, first: int, nodes: list[int]) -> None:
        """A ring of links, at offsets; ``first`` is the head."""
        links = [first, *nodes]
        for at, link in enumerate(links):
            self.put(link, self.base + links[(at + 1) % len(links)], self.base + links[at - 1])

    def read(self, *places: KernelList, strategy: Strategy = "batch") -> Libvmi:
        self.link = InProcessLink(self.agent)
        return Libvmi.over(Planted(self.link, list(places), strategy))


@pytest.fixture(scope="module")
def _parts() -> Iterator[tuple[Planter, Agent]]:
    if os.geteuid():
        pytest.skip("only root can plant lists in this kernel")
    kernel = Kernel()
    with planter.here() as planted:
        yield planted, Agent(kernel)
    kernel.close()


@pytest.fixture
def ground(_parts: tuple[Planter, Agent]) -> Ground:
    planted, agent = _parts
    planted.write(0, bytes(1 << 18))
    return Ground(planted, agent)


def tasks(ground: Ground, count: int, *fields: Field) -> tuple[KernelList, list[int]]:
    """A ring like the task list: its head sits in node 0. The place, and the nodes as offsets."""
    nodes = [SIZE * (2 * number + 1) for number in range(count)]
    for number, node in enumerate(nodes):
        ground.put(node, 1000 + number)
    ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])
    own = (Field((), LINK, WORD), Field((), LINK + WORD, WORD), *fields)
    return KernelList("tasks", ground.base + nodes[0] + LINK, Step.RING_NODE, LINK, 0, SIZE, own), nodes


def add(ground: Ground, nodes: list[int]) -> None:
    """A process is started."""
    nodes.append(nodes[-1] + 2 * SIZE)
    ground.put(nodes[-1], 1000 + len(nodes) - 1)
    ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])


def forward(vmi: Libvmi, head: int) -> list[int]:
    """Links by reads of one pointer."""
    found, link = [], vmi.read_addr_va(head, 0)
    while link != head:
        found.append(link)
        link = vmi.read_addr_va(link, 0)
    return found


def backward(vmi: Libvmi, head: int) -> list[int]:
    found, link = [], vmi.read_addr_va(head + 8, 0)
    while link != head:
        found.append(link)
        link = vmi.read_addr_va(link + 8, 0)
    return found[::-1]


def twice(vmi: Libvmi, head: int) -> list[int]:
    """The head is looked at twice: is the list empty?"""
    return [] if vmi.read_addr_va(head, 0) == head else forward(vmi, head)


def pairs(vmi: Libvmi, head: int) -> list[int]:
    """Links by reads of both pointers."""
    found, link = [], int.from_bytes(vmi.read_va(head, 0, 16)[0][:8], "little")
    while link != head:
        found.append(link)
        link = int.from_bytes(vmi.read_va(link, 0, 16)[0][:8], "little")
    return found


def pairs_backward(vmi: Libvmi, head: int) -> list[int]:
    found, link = [], int.from_bytes(vmi.read_va(head, 0, 16)[0][8:], "little")
    while link != head:
        found.append(link)
        link = int.from_bytes(vmi.read_va(link, 0, 16)[0][8:], "little")
    return found[::-1]


def copies(vmi: Libvmi, head: int) -> list[int]:
    """Each node is copied whole, the head's own too, and taken apart here."""
    found: list[int] = []
    node = head - LINK
    while True:
        link = int.from_bytes(vmi.read_va(node, 0, SIZE)[0][LINK : LINK + 8], "little")
        if link == head:
            return found
        found.append(link)
        node = link - LINK


def copies_by_head(vmi: Libvmi, head: int) -> list[int]:
    found, link = [], vmi.read_addr_va(head, 0)
    while link != head:
        found.append(link)
        link = int.from_bytes(vmi.read_va(link - LINK, 0, SIZE)[0][LINK : LINK + 8], "little")
    return found


def until_head(vmi: Libvmi, head: int) -> list[int]:
    """LibVMI's process-list.py: each round reads the node's number, then its link."""
    found: list[int] = []
    link = head
    vmi.read_addr_va(head, 0)
    while True:
        vmi.read_32_va(link - LINK, 0)
        after = vmi.read_addr_va(link, 0)
        if after == head:
            return found
        found.append(after)
        link = after


def checked(vmi: Libvmi, head: int) -> list[int]:
    """Forward, then a look at the head's other pointer."""
    found = forward(vmi, head)
    vmi.read_addr_va(head + 8, 0)
    return found


def past_the_end(vmi: Libvmi, head: int) -> list[int]:
    """LibVMI's process-list.c: each round reads the link of where it stands, at the end that of the head again."""
    found: list[int] = []
    after = vmi.read_addr_va(head, 0)
    while True:
        link, after = after, vmi.read_addr_va(after, 0)
        if link == head:
            return found
        found.append(link)


def both_ends(vmi: Libvmi, head: int) -> list[int]:
    """The head is looked at before and after."""
    return forward(vmi, head) if vmi.read_addr_va(head, 0) != head and vmi.read_addr_va(head + 8, 0) else []


LOOKS: dict[Callable[[Libvmi, int], list[int]], int] = {
    forward: 1,
    backward: 1,
    twice: 2,
    pairs: 1,
    pairs_backward: 1,
    copies: 1,
    copies_by_head: 1,
    until_head: 2,
    checked: 2,
    past_the_end: 2,
    both_ends: 3,
}
"""Ways to list, and how often each looks at the head."""
LISTINGS = list(LOOKS)


@pytest.mark.parametrize("listing", LISTINGS)
def test_what_was_added_between_two_listings_is_in_the_second(
    ground: Ground, listing: Callable[[Libvmi, int], list[int]]
) -> None:
    place, nodes = tasks(ground, 6, Field((), 0, 4))
    vmi = ground.read(place)
    for _ in range(8):
        assert listing(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
        add(ground, nodes)


@pytest.mark.parametrize("listing", LISTINGS)
def test_an_unchanged_listing_is_one_walk(ground: Ground, listing: Callable[[Libvmi, int], list[int]]) -> None:
    place, _ = tasks(ground, 20, Field((), 0, 4))
    vmi = ground.read(place)
    for _ in range(3):
        listing(vmi, place.start)
        ground.link.requests.clear()
    for _ in range(3):
        listing(vmi, place.start)
        assert sorted(ground.link.requests) == [Read.KIND] * (LOOKS[listing] - 1) + [Walk.KIND]
        ground.link.requests.clear()


@pytest.mark.parametrize("then", LISTINGS)
@pytest.mark.parametrize("listing", LISTINGS)
def test_a_script_that_changes_its_ways_is_told_what_is(
    ground: Ground, listing: Callable[[Libvmi, int], list[int]], then: Callable[[Libvmi, int], list[int]]
) -> None:
    """How often a head is looked at is learned, and may change: that is never the price of an old answer."""
    place, nodes = tasks(ground, 6, Field((), 0, 4))
    vmi = ground.read(place)
    for each in (listing, listing, then, then, listing, then):
        assert each(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
        add(ground, nodes)


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_first_node_that_was_put_there_between_two_listings(
    ground: Ground, listing: Callable[[Libvmi, int], list[int]]
) -> None:
    """As modules are: the newest is the first."""
    place, nodes = tasks(ground, 4, Field((), 0, 4))
    vmi = ground.read(place)
    for number in range(6):
        assert listing(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
        nodes.insert(1, SIZE * (2 * number + 21))
        ground.put(nodes[1], 2000 + number)
        ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])


def test_a_head_that_is_only_looked_at_shows_what_is(ground: Ground) -> None:
    place, nodes = tasks(ground, 6)
    vmi = ground.read(place)
    for listing in (forward, past_the_end):
        listing(vmi, place.start)
        for _ in range(4):
            add(ground, nodes)
            assert vmi.read_addr_va(place.start + 8, 0) == ground.base + nodes[-1] + LINK


def test_a_listing_given_up_early_is_no_part_of_the_next(ground: Ground) -> None:
    """Its first node was the one that was looked for."""
    place, nodes = tasks(ground, 6, Field((), 0, 4))
    vmi = ground.read(place)
    first = vmi.read_addr_va(place.start, 0)
    assert vmi.read_32_va(first - LINK, 0) == 1001
    add(ground, nodes)
    assert len(forward(vmi, place.start)) == 6


def test_the_first_look_of_one_thread_is_not_the_second_of_another(ground: Ground) -> None:
    place, nodes = tasks(ground, 6)
    vmi = ground.read(place)
    vmi.read_addr_va(place.start, 0)
    add(ground, nodes)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.extend(forward(vmi, place.start)))
    other.start()
    other.join()
    assert len(found) == 6


def test_a_list_that_was_learned_is_as_fresh_as_one_that_was_known(ground: Ground) -> None:
    """A ring that nobody declared: a chain of reads from its head."""
    _, nodes = tasks(ground, 20)
    vmi = ground.read()
    for _ in range(6):
        assert len(forward(vmi, ground.base + nodes[0] + LINK)) == len(nodes) - 1
        add(ground, nodes)
    before = len(ground.link.requests)
    forward(vmi, ground.base + nodes[0] + LINK)
    assert len(ground.link.requests) - before == 1


def test_a_ring_that_a_pointer_leads_into_is_no_loop(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    """As ``module_kset`` points to a ring's head from outside. A chain that runs into itself is one, and is told."""
    _, nodes = tasks(ground, 20)
    ground.put(ARRAY, ground.base + nodes[0] + LINK)
    vmi = ground.read()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            head = vmi.read_addr_va(ground.base + ARRAY, 0)
            assert forward(vmi, head) == [ground.base + node + LINK for node in nodes[1:]]
        assert not caplog.records
        ground.put(nodes[-1] + LINK, ground.base + nodes[5] + LINK)
        vmi.read_addr_va(ground.base + ARRAY, 0)
    assert [record.getMessage() for record in caplog.records if "loop" in record.getMessage()]


def test_what_points_at_the_head_is_no_way_around_it(ground: Ground) -> None:
    """Each node points to its parent, all to that which holds the head, and the parents are copied whole."""
    place, nodes = tasks(ground, 6, Field((), 8, WORD))
    vmi = ground.read(place)

    def parents() -> list[int]:
        found, link = [], vmi.read_addr_va(place.start, 0)
        while link != place.start:
            found.append(link)
            vmi.read_va(vmi.read_addr_va(link - LINK + 8, 0), 0, SIZE)
            link = vmi.read_addr_va(link, 0)
        return found

    for _ in range(4):
        for node in nodes:
            ground.put(node + 8, ground.base + nodes[0])
        assert len(parents()) == len(nodes) - 1
        add(ground, nodes)
        assert len(copies(vmi, place.start)) == len(nodes) - 1


def test_what_another_list_knows_of_the_head_is_forgotten_in_time(ground: Ground) -> None:
    place, nodes = tasks(ground, 6)
    ground.ring(0x40000, [node + 40 for node in nodes])
    fields = (Field((), -40, SIZE), Field((), 0, 8), Field((), 8, 8))
    other = KernelList("other", ground.base + 0x40000, Step.RING, 0, 40, SIZE, fields)
    vmi = ground.read(place, other)
    assert len(forward(vmi, other.start)) == 6
    assert vmi.read_32_va(ground.base + nodes[0], 0) == 1000
    ground.put(nodes[0], 77)
    time.sleep(STALE + 0.2)
    assert vmi.read_32_va(ground.base + nodes[0], 0) == 77
    add(ground, nodes)
    assert len(copies(vmi, place.start)) == 6


@pytest.mark.parametrize("listings", [0, 2])
def test_the_first_node_as_another_list_knows_it(ground: Ground, listings: int) -> None:
    """Two lists through the same links; the other was walked before a process ended. The head brings the list, or comes
    alone since more looks are expected."""
    place, nodes = tasks(ground, 6)
    ground.put(ARRAY, ground.base + nodes[1] + LINK)
    other = KernelList("other", ground.base + ARRAY, Step.CHAIN, 0, 0, 16, (Field((), 0, WORD),))
    vmi = ground.read(place, other)
    for _ in range(listings):
        both_ends(vmi, place.start)
        time.sleep(STALE + 0.2)
    link = vmi.read_addr_va(other.start, 0)
    for _ in nodes[2:]:
        link = vmi.read_addr_va(link, 0)
    del nodes[2]
    ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])
    assert forward(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]


def test_a_ring_walked_from_another_node_than_its_head(ground: Ground) -> None:
    """It begins no listing: what is known of it may be as old as anything; but past the head all is of that moment."""
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    vmi = ground.read(place)
    links = forward(vmi, place.start)
    forward(vmi, links[2])  # passes the head
    add(ground, nodes)
    ground.put(nodes[4], 77)
    ground.link.requests.clear()
    assert vmi.read_64_va(vmi.read_addr_va(links[2], 0) - LINK, 0) == 1004
    assert not ground.link.requests
    assert vmi.read_addr_va(place.start, 0) == links[0]
    assert forward(vmi, links[2]) == [*links[3:], ground.base + nodes[-1] + LINK, place.start, *links[:2]]
    add(ground, nodes)
    deadline = time.monotonic() + STALE + 0.3
    while vmi.read_addr_va(ground.base + nodes[-2] + LINK, 0) == place.start:
        assert time.monotonic() < deadline, "it is older than promised"


# ---- tables ----------------------------------------------------------------------------------------------------------

HEADS, TABLE = 256, 0x10000


def table(ground: Ground, filled: dict[int, int]) -> KernelList:
    """A table of chains at TABLE, pointer and mask before it; ``filled`` are buckets and how many nodes each has."""
    ground.put(TABLE - 16, ground.base + TABLE, HEADS - 1)
    ground.put(TABLE, *(number << 1 | 1 for number in range(HEADS)))
    for number, count in filled.items():
        fill(ground, number, count)
    fields = (Field((), LINK, WORD), Field((), 0, 4))
    at = ground.base + TABLE
    return KernelList("table", 0, Step.NULLS, LINK, 0, SIZE, fields, stride=8, table=(at - 16, at - 8, 0))


def fill(ground: Ground, number: int, count: int) -> None:
    links = [0x20000 + (number * 4 + node) * SIZE + LINK for node in range(count)]
    for here, there in zip([TABLE + 8 * number, *links], [*links, None], strict=True):
        ground.put(here, number << 1 | 1 if there is None else ground.base + there)


def sockets(vmi: Libvmi, ground: Ground, order: Callable[[range], Any] = iter) -> list[int]:
    """Links of all nodes."""
    found = []
    start = vmi.read_addr_va(ground.base + TABLE - 16, 0)
    count = vmi.read_32_va(ground.base + TABLE - 8, 0) + 1
    for at in order(range(start, start + 8 * count, 8)):
        link = vmi.read_addr_va(at, 0)
        while not link & 1:
            found.append(link)
            link = vmi.read_addr_va(link, 0)
    return found


def in_bulk(vmi: Libvmi, ground: Ground) -> list[int]:
    """The table in one read, and then the chains."""
    start = vmi.read_addr_va(ground.base + TABLE - 16, 0)
    data, _ = vmi.read_va(start, 0, 8 * HEADS)
    found = []
    for at in range(0, len(data), 8):
        link = int.from_bytes(data[at : at + 8], "little")
        while not link & 1:
            found.append(link)
            link = vmi.read_addr_va(link, 0)
    return found


@pytest.mark.parametrize("order", [iter, reversed])
def test_a_table_whose_pointer_is_looked_at_twice(ground: Ground, order: Callable[[range], Any]) -> None:
    """And then but once, when the walk is still due."""
    place = table(ground, {7: 2})
    vmi = ground.read(place)
    for looks in (2, 2, 1, 2, 1, 1):
        for number in (1, 100):
            fill(ground, number, 1)
            ground.link.requests.clear()
            for _ in range(looks - 1):
                vmi.read_addr_va(ground.base + TABLE - 16, 0)
            assert len(sockets(vmi, ground, order)) == 3
            fill(ground, number, 0)
    if order is iter:  # else the first chain comes last, and is a look at the head
        assert ground.link.requests.count(Walk.KIND) == 1


@pytest.mark.parametrize("order", [iter, reversed])
@pytest.mark.parametrize("number", [0, 1, 2, 100, HEADS - 1])
def test_a_chain_that_was_empty_a_listing_ago(ground: Ground, number: int, order: Callable[[range], Any]) -> None:
    place = table(ground, {7: 2})
    vmi = ground.read(place)
    for _ in range(3):
        for count in (0, 3, 1):
            fill(ground, number, count)
            assert len(sockets(vmi, ground, order)) == 2 + count


def test_chains_behind_a_table_that_is_read_at_once(ground: Ground) -> None:
    place = table(ground, {7: 1})
    vmi = ground.read(place)
    for _ in range(3):
        for count in (1, 3, 2):
            fill(ground, 7, count)
            assert len(in_bulk(vmi, ground)) == count


def test_no_thread_finds_a_chain_empty_while_another_walks(ground: Ground) -> None:
    heads, at = 1 << 15, 0x80000
    node, full = ground.base + 0x20000 + LINK, ground.base + at + 8 * 1000
    ground.put(at - 16, ground.base + at, heads - 1)
    ground.put(at, *(number << 1 | 1 for number in range(heads)))
    ground.put(at + 8 * 1000, node)
    ground.put(0x20000 + LINK, 1000 << 1 | 1)
    start = ground.base + at
    fields = (Field((), LINK, WORD),)
    place = KernelList("table", 0, Step.NULLS, LINK, 0, SIZE, fields, stride=8, table=(start - 16, start - 8, 0))
    vmi = ground.read(place)
    over = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def walks() -> None:
        while not over.is_set():
            vmi.read_addr_va(start - 16, 0)
            vmi.read_addr_va(start + 8, 0)

    other = threading.Thread(target=walks)
    other.start()
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert vmi.read_addr_va(full, 0) == node
    finally:
        sys.setswitchinterval(interval)
        over.set()
        other.join()


def test_an_empty_chain_is_forgotten_in_time(ground: Ground) -> None:
    """In a table that has nothing at all, so that nothing else is to be forgotten."""
    place = table(ground, {})
    vmi = ground.read(place)
    vmi.read_addr_va(ground.base + TABLE - 16, 0)
    assert vmi.read_addr_va(ground.base + TABLE + 800, 0) & 1
    fill(ground, 100, 1)
    time.sleep(STALE + 0.2)
    assert vmi.read_addr_va(ground.base + TABLE + 800, 0) & 1 == 0


def test_an_empty_chain_is_forgotten_when_the_agent_is_gone(ground: Ground) -> None:
    place = table(ground, {7: 2})
    vmi = ground.read(place)
    sockets(vmi, ground)

    def gone(number: int) -> None:
        raise LinkError("the agent is gone")

    ground.link.before = gone
    with pytest.raises(LinkError):
        sockets(vmi, ground)
    ground.link.before = lambda number: None
    fill(ground, 100, 1)
    assert vmi.read_addr_va(ground.base + TABLE + 800, 0) & 1 == 0


def test_a_chain_whose_first_node_cannot_be_read_is_not_empty(ground: Ground) -> None:
    place = table(ground, {7: 2})
    poison = 0xDEAD000000000100 + LINK
    ground.put(TABLE + 8 * 50, poison)
    vmi = ground.read(place)
    vmi.read_addr_va(ground.base + TABLE - 16, 0)
    assert vmi.read_addr_va(ground.base + TABLE + 8 * 50, 0) == poison
    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
        sockets(vmi, ground)


def test_chains_past_a_walk_that_was_cut_short_are_not_empty(ground: Ground) -> None:
    place = table(ground, dict.fromkeys(range(HEADS), 2))
    vmi = ground.read(replace(place, max_nodes=100))
    for _ in range(2):
        assert len(sockets(vmi, ground)) == 2 * HEADS


def test_a_ring_past_a_walk_that_was_cut_short_goes_on(ground: Ground) -> None:
    place, nodes = tasks(ground, 50)
    vmi = ground.read(replace(place, max_nodes=10))
    for _ in range(3):
        assert len(forward(vmi, place.start)) == len(nodes) - 1
        add(ground, nodes)


# ---- age -------------------------------------------------------------------------------------------------------------

ARRAY = 0x30000


def test_an_array_that_is_read_through_slowly_is_no_older_than_promised(ground: Ground) -> None:
    """Each part that is brought has its own time."""
    vmi = ground.read()
    at = ground.base + ARRAY
    for number in range(6):
        assert vmi.read_64_va(at + 8 * number, 0) == 0
    ground.put(ARRAY + 40, 77)
    deadline = time.monotonic() + STALE + 0.3
    number = 6
    while vmi.read_64_va(at + 40, 0) != 77:
        assert time.monotonic() < deadline, "it is older than promised"
        for _ in range(400):
            vmi.read_64_va(at + 8 * number, 0)
            number += 1
        time.sleep(0.1)


def test_four_words_read_over_and_over_change_in_time(ground: Ground) -> None:
    vmi = ground.read()
    at = ground.base + ARRAY
    for value in range(1, 4):
        ground.put(ARRAY, *[value] * 4)
        deadline = time.monotonic() + STALE + 0.3
        while [vmi.read_64_va(at + 8 * number, 0) for number in range(4)] != [value] * 4:
            assert time.monotonic() < deadline


def test_what_a_program_brought_is_no_older_than_promised(ground: Ground) -> None:
    vmi = ground.read()
    target = cast(Planted, vmi.vmi)
    target.learned([Extent(ground.base + ARRAY, bytes(8))])
    ground.put(ARRAY, 77)
    deadline = time.monotonic() + STALE + 0.3
    while vmi.read_64_va(ground.base + ARRAY, 0) != 77:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        target.learned([Extent(ground.base + ARRAY + 64, bytes(8))])


def test_a_counter_that_goes_with_a_listing_counts_on(ground: Ground) -> None:
    """Read once a listing it comes along; read again it is asked for."""
    place, _ = tasks(ground, 6)
    vmi = ground.read(place)
    counter = ground.base + ARRAY
    costs = []
    for value in range(6):
        ground.put(ARRAY, value)
        before = len(ground.link.requests)
        forward(vmi, place.start)
        assert vmi.read_64_va(counter, 0) == value
        costs.append(len(ground.link.requests) - before)
        for more in range(100, 104):
            ground.put(ARRAY, more + value)
            assert vmi.read_64_va(counter, 0) == more + value
    assert costs[-1] == 1
    forward(vmi, place.start)
    ground.put(ARRAY, 77)
    time.sleep(0.15)
    assert vmi.read_64_va(counter, 0) == 77


def test_nothing_is_too_old_while_another_thread_waits_for_the_agent(ground: Ground) -> None:
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    vmi = ground.read(place)
    forward(vmi, place.start)
    at = ground.base + nodes[3]
    assert vmi.read_64_va(at, 0) == 1003
    ground.link.before = lambda number: time.sleep(STALE + 1)
    other = threading.Thread(target=lambda: vmi.read_64_va(ground.base + ARRAY, 0))
    other.start()
    ground.put(nodes[3], 77)
    time.sleep(STALE + 0.2)
    try:
        assert vmi.read_64_va(at, 0) == 77
    finally:
        ground.link.before = lambda number: None
        other.join()


@pytest.mark.parametrize("learning", [False, True])
def test_what_comes_due_while_another_thread_goes_on_waiting(ground: Ground, learning: bool) -> None:
    """One list is due soon after the wait began, another later; the wait may be for more of that list."""
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    ground.ring(0x40000, [0x40080, 0x40100])
    first = KernelList("first", ground.base + 0x40000, Step.RING, 0, 0, 16, (Field((), 0, WORD),))
    vmi = ground.read(place, first)
    forward(vmi, first.start)
    time.sleep(STALE / 2)
    forward(vmi, place.start)
    vmi.read_32_va(ground.base + nodes[1] + 32, 0)
    asked = ground.base + (nodes[2] + 32 if learning else ARRAY)
    ground.link.before = lambda number: time.sleep(2 * STALE)
    other = threading.Thread(target=lambda: vmi.read_32_va(asked, 0))
    other.start()
    ground.put(nodes[3], 77)
    time.sleep(STALE + 0.2)
    try:
        assert vmi.read_64_va(ground.base + nodes[3], 0) == 77
    finally:
        ground.link.before = lambda number: None
        other.join()


def test_a_table_that_comes_due_while_it_is_walked_is_all_known(ground: Ground) -> None:
    place = table(ground, {7: 2})
    vmi = ground.read(place)
    sockets(vmi, ground)
    ground.link.before = lambda number: time.sleep(2 * STALE)
    vmi.read_addr_va(ground.base + TABLE - 16, 0)
    ground.link.before = lambda number: None
    ground.link.requests.clear()
    for number in range(HEADS):
        vmi.read_addr_va(ground.base + TABLE + 8 * number, 0)
    assert not ground.link.requests


def test_a_field_learned_of_one_list_makes_none_of_another_older(ground: Ground) -> None:
    """Two lists through the same nodes; the one is listed, then the other, then something is learned of the first."""
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    ground.ring(0x40000, [node + 40 for node in nodes])
    other = KernelList("other", ground.base + 0x40000, Step.RING, 40, 0, 16, (Field((), 0, 8), Field((), 40, 8)))
    vmi = ground.read(place, other)
    forward(vmi, place.start)
    ground.put(nodes[3], 77)
    forward(vmi, other.start)
    assert vmi.read_64_va(ground.base + nodes[3], 0) == 77
    for node in nodes[1:4]:
        vmi.read_16_va(ground.base + node + 32, 0)
    assert vmi.read_64_va(ground.base + nodes[3], 0) == 77


# ---- holds -----------------------------------------------------------------------------------------------------------


def test_what_is_learned_in_a_hold_changes_no_answer(ground: Ground) -> None:
    place, nodes = tasks(ground, 6)
    vmi = ground.read(place)
    with pause(vmi):
        listed = forward(vmi, place.start)
        first = [vmi.read_32_va(listed[0] - LINK, 0)]
        for node in nodes:
            ground.put(node, 5)
        for link in listed[1:]:
            vmi.read_32_va(link - LINK, 0)
        assert vmi.read_32_va(listed[0] - LINK, 0) == first[0]
    forward(vmi, place.start)
    assert vmi.read_32_va(listed[0] - LINK, 0) == 5


def test_a_wider_read_in_a_hold_says_of_each_byte_what_was_said(ground: Ground) -> None:
    """Words of the walk, then memory around them, once learned for all nodes; and the other way round."""
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    vmi = ground.read(place)
    with pause(vmi):
        links = forward(vmi, place.start)
        ground.put(ARRAY + 24, 5)
        for node in nodes:
            ground.put(node, 77, 78)
        wide = [vmi.read_va(link - LINK, 0, LINK)[0] for link in links]
        assert wide == [
            (1001 + number).to_bytes(8, "little") + (78).to_bytes(8, "little") for number in range(len(links))
        ]
        first = vmi.read_va(ground.base + ARRAY, 0, 64)[0]
        learned = vmi.read_va(ground.base + nodes[0] + LINK + 16, 0, 16)[0]
        for at in (ARRAY, nodes[0] + LINK + 16):
            ground.put(at, *[9] * 8)
        assert [vmi.read_64_va(ground.base + ARRAY + at, 0) for at in range(0, 64, 8)] == [0, 0, 0, 5, 0, 0, 0, 0]
        assert vmi.read_va(ground.base + ARRAY + 4, 0, 60)[0] == first[4:]
        for node in nodes:  # whose words are learned and come at once, later than what was said of the first
            vmi.read_64_va(ground.base + node + LINK + 24, 0)
        assert vmi.read_64_va(ground.base + nodes[0] + LINK + 24, 0) == int.from_bytes(learned[8:], "little")
        assert [vmi.read_va(link - LINK, 0, LINK)[0] for link in links] == wide
    assert vmi.read_64_va(ground.base + nodes[1], 0) == 77


@pytest.mark.parametrize("wide", [False, True])
def test_a_head_in_a_hold_has_one_answer(ground: Ground, wide: bool) -> None:
    """One that sits in a node, and one that stands alone: read by itself, then with what is around it, or before."""
    place, nodes = tasks(ground, 6)
    ground.ring(0x40000 + LINK, [0x40080])
    alone = KernelList("alone", ground.base + 0x40000 + LINK, Step.RING, 0, 0, 16, (Field((), 0, WORD),))
    vmi = ground.read(place, alone)

    def heads(wide: bool) -> list[bytes]:
        reads = [(at - LINK, SIZE, LINK) if wide else (at, 16, 0) for at in (place.start, alone.start)]
        return [vmi.read_va(at, 0, count)[0][skip : skip + 16] for at, count, skip in reads]

    with pause(vmi):
        said = heads(wide)
        add(ground, nodes)
        ground.ring(0x40000 + LINK, [0x40100])
        assert [heads(not wide), heads(wide)] == [said, said]
        assert vmi.read_addr_va(alone.start, 0) == ground.base + 0x40080
    assert vmi.read_addr_va(alone.start, 0) == ground.base + 0x40100


def test_what_comes_along_in_a_hold_changes_no_answer(ground: Ground) -> None:
    place, _ = tasks(ground, 6)
    vmi = ground.read(place)
    wide = ground.base + ARRAY + 8
    for _ in range(3):
        forward(vmi, place.start)
        vmi.read_va(wide, 0, 24)
    with pause(vmi):
        assert vmi.read_32_va(wide + 8, 0) == 0
        ground.put(ARRAY + 8, 5, 5, 5)
        forward(vmi, place.start)
        assert vmi.read_va(wide, 0, 24)[0][8:12] == bytes(4)


def test_an_array_in_a_hold_has_one_answer(ground: Ground) -> None:
    vmi = ground.read()
    at = ground.base + ARRAY
    with pause(vmi):
        assert vmi.read_64_va(at + 64, 0) == 0
        ground.put(ARRAY, *[7] * 20)
        answers = [vmi.read_64_va(at + 8 * number, 0) for number in range(20)]
        assert answers == [vmi.read_64_va(at + 8 * number, 0) for number in range(20)]
        assert vmi.read_64_va(at + 64, 0) == 0


def test_a_chain_that_came_to_nothing_in_a_hold_changes_no_answer(ground: Ground) -> None:
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    vmi = ground.read(place)
    ground.put(ARRAY, *(ground.base + ARRAY + 8 * number for number in range(100, 0, -1)))
    for number, target in ((0, 0x31000), (0x200, 0x32000), (0x400, 0x33000)):
        ground.put(ARRAY + 0x1000 * (number >> 9) if number else ARRAY, ground.base + target)
    ground.put(0x33000, ground.base + nodes[3])
    with pause(vmi):
        forward(vmi, place.start)
        link = ground.base + ARRAY
        ground.put(nodes[3], 77)
        for _ in range(4):
            link = vmi.read_addr_va(link, 0)
        assert vmi.read_64_va(ground.base + nodes[3], 0) == 1003


# ---- forks -----------------------------------------------------------------------------------------------------------


def in_a_child(check: Callable[[], bool], seconds: float = 5) -> bool:
    """What ``check`` says in a forked child."""
    child = os.fork()
    if not child:
        signal.alarm(int(seconds))
        status = 1
        with suppress(BaseException):
            status = 0 if check() else 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_hold_goes_on_in_a_forked_child(ground: Ground) -> None:
    place, nodes = tasks(ground, 6, Field((), 0, 8))
    vmi = ground.read(place)
    with pause(vmi):
        listed = forward(vmi, place.start)
        assert vmi.read_64_va(ground.base + ARRAY, 0) == 0
        add(ground, nodes)
        ground.put(ARRAY, 77)
        assert in_a_child(lambda: forward(vmi, place.start) == listed and vmi.read_64_va(ground.base + ARRAY, 0) == 0)
    assert in_a_child(lambda: len(forward(vmi, place.start)) == 6 and vmi.read_64_va(ground.base + ARRAY, 0) == 77)


@pytest.mark.parametrize("strategy", ["batch", "page"])
def test_a_child_forked_while_a_thread_waits_for_the_agent_is_not_stuck(ground: Ground, strategy: Strategy) -> None:
    place, _ = tasks(ground, 6)
    vmi = ground.read(place, strategy=strategy)
    waiting = threading.Event()

    def slow(number: int) -> None:
        waiting.set()
        time.sleep(1)

    ground.link.before = slow
    threads = [threading.Thread(target=lambda: vmi.read_64_va(ground.base + ARRAY, 0))]
    threads[0].start()
    assert waiting.wait(5)
    threads.append(threading.Thread(target=vmi.pause_vm))
    threads[1].start()
    time.sleep(0.1)

    def lists() -> bool:
        ground.link.renew()
        vmi.pause_vm()
        found = len(forward(vmi, place.start))
        vmi.resume_vm()
        return found == 5

    assert in_a_child(lists)
    for thread in threads:
        thread.join()


# ---- in the long run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_an_agent_that_is_restarted_in_the_middle_of_a_walk(ground: Ground, times: int) -> None:
    """Its unfinished walks are lost: this one is begun anew, once. Then the listing fails, and the next is whole."""
    place, nodes = tasks(ground, 200)
    wide = tuple(Field((), at, 4096) for at in (SIZE, SIZE + 4096, SIZE + 8192))
    vmi = ground.read(replace(place, fields=(*place.fields, *wide)))

    restarts = iter(range(times))

    def restart(number: int) -> None:
        if ground.link.requests[-1] == More.KIND and next(restarts, None) is not None:
            ground.link.agent = Agent(ground.agent._kernel)

    ground.link.before = restart
    with pytest.raises(LinkError, match="start the walk again") if times > 1 else nullcontext():
        assert len(forward(vmi, place.start)) == len(nodes) - 1
    add(ground, nodes)
    assert len(forward(vmi, place.start)) == len(nodes) - 1
    assert next(restarts, None) is None


def test_chains_that_come_to_nothing_are_not_remembered_for_ever(ground: Ground) -> None:
    vmi = ground.read()
    for number in range(1500):
        at = 0x40000 + number * 128
        ground.put(at, *(ground.base + at + 32 * link for link in range(1, 4)))
        for link in range(4):
            ground.put(at + 32 * link, ground.base + at + 32 * (link + 1))
        link = ground.base + at
        for _ in range(4):
            link = vmi.read_addr_va(link, 0)
    reader = cast(Planted, vmi.vmi).reader
    assert isinstance(reader, ReadAhead)
    assert len(reader._chains.fruitless) <= 1024


def test_names_that_were_asked_for_are_not_remembered_for_ever(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_profile, "NAMES_MAX", 8)
    profile = cast(Planted, ground.read().vmi).profile
    for at in range(20):
        with pytest.raises(KeyError):
            profile.symbol_at(ground.base + at)
    assert profile.symbol_at(profile.symbol("init_task")) == "init_task"
    assert len(profile._names) == 8


# ---- encrypted memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 47, 51])
def test_page_tables_of_an_encrypted_guest(ground: Ground, bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry has the C-bit, as under AMD SEV: no part of the address. The ground is all there is of memory."""
    mask = 1 << bit if bit else 0
    kernel = ground.agent._kernel
    levels = kernel.levels
    for level in range(1, levels + 1):
        ground.put(4096 * level, 4096 * (level + 1) | mask | 0x67)
    ground.put(4096 * (levels + 1) + 8, 77)
    told = kernel._read
    before = told["page_offset"], told["encrypted"]
    monkeypatch.setattr(kernel, "page_offset", ground.base)
    told["page_offset"], told["encrypted"] = ground.base, mask
    try:
        vmi = ground.read()
        context = AccessContext(TranslateMechanism.PROCESS_DTB, addr=8, dtb=4096 | mask)
        assert vmi.read_64(context) == 77
        assert vmi.pagetable_lookup(4096 | mask, 8) == 4096 * (levels + 1) + 8
    finally:
        told["page_offset"], told["encrypted"] = before
