"""The promises of docs/freshness.md as scenes: lists are planted, a script reads them, time passes.

Each scene runs over a byte buffer, where the clock is the test's own (``tests/unit``), and in this machine's kernel,
where the clock is real (``tests/local``). The agent is in the test's process, so a scene controls what memory holds at
each moment, what happens to each request, and which thread is where.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from guest_agent.agent import Agent
from guest_agent.kernel import Kernel
from lab.planter import Planter
from tests.ground.buffer import Buffer, BufferKernel
from tests.ground.connection import Connection
from tests.until import until
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests import agent_profile
from vmishim.guests.agent import AgentGuest, Strategy
from vmishim.libvmi import AccessContext, Libvmi, TranslateMechanism, pause
from vmishim.memory.lifetimes import COMPANION_STALE, STALE
from vmishim.memory.reader import Extent
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD, Field, Hop
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.messages import More, Read, Walk
from vmishim.wire.plan import Step

LINK, SIZE = 16, 64
"""Where a planted node has its link, and its bytes."""


class PlantedGuest(AgentGuest):
    """A guest that has the planted lists."""

    def __init__(self, link: Connection, places: list[KernelList], strategy: Strategy, **clock: Any) -> None:
        super().__init__("planted", link.as_link(), strategy)
        if strategy == "batch":
            self.reader = self._cache = ReadAhead(self.remote, places, **clock)
            self.words, self.cells = self._cache.words, self._cache.cells


class Ground:
    """Planted memory, scripts that read it, and the time.

    :param kernel: the kernel that has the memory
    :ivar link: the connection of the script made last
    :ivar margin: seconds by which something may be forgotten late, on a busy machine
    """

    margin = 0.5

    def __init__(self, planted: Planter, kernel: Kernel) -> None:
        self.planter = planted
        self.base = planted.address
        self.kernel = kernel
        self.link = Connection(Agent(kernel))

    def put(self, at: int, *values: int) -> None:
        self.planter.words(at, *values)

    def ring(self, first: int, nodes: list[int]) -> None:
        """A ring of links, at offsets; ``first`` is the head."""
        links = [first, *nodes]
        for at, link in enumerate(links):
            self.put(link, self.base + links[(at + 1) % len(links)], self.base + links[at - 1])

    def read(self, *places: KernelList, strategy: Strategy = "batch") -> Libvmi:
        """A script's object, with an agent of its own."""
        self.link = Connection(Agent(self.kernel))
        return Libvmi.over(self.connect(list(places), strategy))

    def connect(self, places: list[KernelList], strategy: Strategy) -> PlantedGuest:
        return PlantedGuest(self.link, places, strategy)

    def own_kernel(self) -> None:
        """In a forked child: programs and maps that the parent has no part in. To the parent's self-check, what the
        child's reads leave in the parent's maps was written by an intruder."""
        self.kernel = Kernel()
        self.link.agent = Agent(self.kernel)

    # ---- time ----

    def now(self) -> float:
        return time.monotonic()

    def let_pass(self, seconds: float) -> None:
        due = self.now() + seconds
        until(lambda: self.now() >= due, what=f"{seconds:g} s to pass")

    def in_time(self, condition: Callable[[], bool], what: str) -> None:
        """``condition`` comes true before what is known now is older than promised."""
        until(condition, deadline_s=STALE + self.margin, what=what)

    # ---- page tables ----

    @contextmanager
    def all_of_memory(self, mask: int) -> Iterator[None]:
        """The ground is all there is of memory, and page tables have ``mask`` in each entry."""
        from guest_agent.kernel import Kernel
        from guest_agent.programs import Programs

        fix, levels, before = Programs.fix, self.kernel.levels, self.kernel

        def other(programs: Programs, name: str, value: bytes) -> None:
            fix(programs, name, struct.pack("<3Q", self.base, levels, mask) if name == "layout" else value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Programs, "fix", other)  # what is frozen once can't be told otherwise later
            kernel = Kernel()
        kernel.page_offset = self.base
        self.kernel = kernel
        try:
            yield
        finally:
            self.kernel = before
            kernel.close()


class BufferGround(Ground):
    """The same over a byte buffer. Time passes only when a test says so, and then at once.

    :ivar kernel: a `BufferKernel`
    :ivar memory: its buffer
    """

    margin = 0.0

    def __init__(self) -> None:
        self._now = 1000.0
        self._readers: list[ReadAhead] = []
        self.memory = Buffer()
        self._buffer = BufferKernel(self.memory, {"init_task": self.memory.address + 0x50000})
        super().__init__(self.memory, self._buffer.as_kernel())

    def own_kernel(self) -> None:
        """A forked child has a copy of the buffer."""

    def connect(self, places: list[KernelList], strategy: Strategy) -> PlantedGuest:
        guest = PlantedGuest(self.link, places, strategy, now=self.now, background=False)
        if isinstance(guest.reader, ReadAhead):
            self._readers.append(guest.reader)
        return guest

    def now(self) -> float:
        return self._now

    def let_pass(self, seconds: float) -> None:
        self._now += seconds
        for reader in self._readers:
            reader.expire()

    def in_time(self, condition: Callable[[], bool], what: str) -> None:
        self.let_pass(STALE)
        assert condition(), what

    @contextmanager
    def all_of_memory(self, mask: int) -> Iterator[None]:
        self._buffer.page_offset, self._buffer.encrypted = self.base, mask
        yield


@contextmanager
def waiting_for_the_agent(ground: Ground, read: Callable[[], Any]) -> Iterator[None]:
    """Another thread reads, and the agent does not answer before the block ends."""
    asked, answered = threading.Event(), threading.Event()

    def before(number: int) -> None:
        asked.set()
        assert answered.wait(30)

    ground.link.before = before
    other = threading.Thread(target=read)
    other.start()
    try:
        assert asked.wait(30), "the agent is asked"
        ground.link.before = lambda number: None
        yield
    finally:
        answered.set()
        other.join()


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


def with_two_listings(ground: Ground) -> tuple[Libvmi, KernelList, KernelList]:
    """A script's object that has read two lists in turn, and a counter with each, three times; and the lists."""
    place, _ = tasks(ground, 6)
    ground.ring(0x40000, [0x40080, 0x40100])
    other = KernelList("other", ground.base + 0x40000, Step.RING, 0, 0, 16, (Field((), 0, WORD),))
    vmi = ground.read(place, other)
    for head in (place.start, other.start) * 3:
        forward(vmi, head)
        vmi.read_64_va(ground.base + ARRAY, 0)
    return vmi, place, other


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


SHARED = 40
"""Where a planted node has the link of a second list."""


def sharing(ground: Ground, nodes: list[int], *fields: Field) -> KernelList:
    """A ring of nodes that are in another list too."""
    ground.ring(0x40000, [node + SHARED for node in nodes])
    own = (*fields, Field((), SHARED, WORD), Field((), SHARED + WORD, WORD))
    return KernelList("other", ground.base + 0x40000, Step.RING, SHARED, 0, SIZE, own)


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


def of_a_pause(vmi: Libvmi) -> None:
    """What is read within a pause is forgotten at its end."""
    vmi.pause_vm()
    vmi.resume_vm()


ARRAY, TREE = 0x30000, 0x60000


def in_a_child(ground: Ground, check: Callable[[], bool], seconds: float = 10) -> bool:
    """What ``check`` returns in a forked child, whose script asks an agent of its own."""
    child = os.fork()
    if not child:
        signal.alarm(int(seconds))
        status = 1
        with suppress(BaseException):
            ground.own_kernel()
            status = 0 if check() else 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Lists:
    """A list is as you find it when you look at its head."""

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_what_was_added_between_two_listings_is_in_the_second(
        self, ground: Ground, listing: Callable[[Libvmi, int], list[int]]
    ) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, 4))
        vmi = ground.read(place)
        for _ in range(8):
            assert listing(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
            add(ground, nodes)

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_an_unchanged_listing_is_one_walk(
        self, ground: Ground, listing: Callable[[Libvmi, int], list[int]]
    ) -> None:
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
    def test_a_script_that_looks_more_or_less_often_than_before_gets_fresh_memory(
        self, ground: Ground, listing: Callable[[Libvmi, int], list[int]], then: Callable[[Libvmi, int], list[int]]
    ) -> None:
        """How often a script looks at a head is learned. When that changes, no answer is old."""
        place, nodes = tasks(ground, 6, Field((), 0, 4))
        vmi = ground.read(place)
        for each in (listing, listing, then, then, listing, then):
            assert each(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
            add(ground, nodes)

    @pytest.mark.parametrize("listing", LISTINGS)
    def test_a_new_first_node_is_in_the_next_listing(
        self, ground: Ground, listing: Callable[[Libvmi, int], list[int]]
    ) -> None:
        """As with modules: the newest is the first."""
        place, nodes = tasks(ground, 4, Field((), 0, 4))
        vmi = ground.read(place)
        for number in range(6):
            assert listing(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]
            nodes.insert(1, SIZE * (2 * number + 21))
            ground.put(nodes[1], 2000 + number)
            ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])

    def test_looks_at_a_head_alone_are_fresh(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6)
        vmi = ground.read(place)
        for listing in (forward, past_the_end):
            listing(vmi, place.start)
            for _ in range(4):
                add(ground, nodes)
                assert vmi.read_addr_va(place.start + 8, 0) == ground.base + nodes[-1] + LINK

    def test_a_listing_that_stops_early_does_not_serve_the_next(self, ground: Ground) -> None:
        """The script found what it wanted in the first node."""
        place, nodes = tasks(ground, 6, Field((), 0, 4))
        vmi = ground.read(place)
        first = vmi.read_addr_va(place.start, 0)
        assert vmi.read_32_va(first - LINK, 0) == 1001
        add(ground, nodes)
        assert len(forward(vmi, place.start)) == 6

    def test_the_first_look_of_one_thread_does_not_count_for_another(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6)
        vmi = ground.read(place)
        vmi.read_addr_va(place.start, 0)
        add(ground, nodes)
        found: list[int] = []
        other = threading.Thread(target=lambda: found.extend(forward(vmi, place.start)))
        other.start()
        other.join()
        assert len(found) == 6

    def test_a_learned_list_is_as_fresh_as_a_known_one(self, ground: Ground) -> None:
        """A ring that is not in the catalogue: a chain of reads from its head."""
        _, nodes = tasks(ground, 20)
        vmi = ground.read()
        for _ in range(6):
            assert len(forward(vmi, ground.base + nodes[0] + LINK)) == len(nodes) - 1
            add(ground, nodes)
        before = len(ground.link.requests)
        forward(vmi, ground.base + nodes[0] + LINK)
        assert len(ground.link.requests) - before == 1

    def test_a_ring_reached_by_a_pointer_is_not_reported_as_a_loop(
        self, ground: Ground, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As ``module_kset`` points to a ring's head. A chain that runs into itself is a loop, and is logged."""
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

    def test_pointers_to_the_head_do_not_bypass_it(self, ground: Ground) -> None:
        """Each node points to its parent, here the node that holds the head, and parents are copied whole."""
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

    def test_what_cannot_be_read_is_an_error_and_never_zeros(self, ground: Ground) -> None:
        """One of the pointers that the walk follows leads to no memory."""
        place, nodes = tasks(ground, 6, Field((), 8, WORD), Field((Hop(8),), 0, WORD), Field((Hop(8),), 16, 4))
        for number, node in enumerate(nodes):
            ground.put(node + 8, ground.base + ARRAY + 64 * number)
            ground.put(ARRAY + 64 * number, number, 0, number)
        lost = 0xDEAD000000000100
        ground.put(nodes[3] + 8, lost)
        vmi = ground.read(place)
        for number, link in enumerate(forward(vmi, place.start), 1):
            pointer = vmi.read_addr_va(link - LINK + 8, 0)
            if number != 3:
                assert (vmi.read_64_va(pointer, 0), vmi.read_32_va(pointer + 16, 0)) == (number, number)
                continue
            assert pointer == lost
            for read in (vmi.read_64_va, vmi.read_32_va):
                for at in (lost, lost + 16):
                    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
                        read(at, 0)

    def test_the_look_after_the_heads_own_node_is_part_of_that_listing(self, ground: Ground) -> None:
        """Only the first one; and only if the walk is not too old by then."""
        place, nodes = tasks(ground, 6, Field((), 0, 4))
        vmi = ground.read(place)
        ground.link.requests.clear()
        assert vmi.read_32_va(ground.base + nodes[0], 0) == 1000
        assert ground.link.requests == [Walk.KIND]
        as_of_then = [ground.base + node + LINK for node in nodes[1:]]
        add(ground, nodes)
        assert vmi.read_addr_va(place.start + 8, 0) == as_of_then[-1]
        assert ground.link.requests == [Walk.KIND]
        assert vmi.read_addr_va(place.start + 8, 0) == ground.base + nodes[-1] + LINK
        assert vmi.read_32_va(ground.base + nodes[0], 0) == 1000
        add(ground, nodes)
        assert vmi.read_addr_va(place.start + 8, 0) == ground.base + nodes[-1] + LINK
        ground.in_time(lambda: not vmi.vmi.words, "all to be forgotten")
        assert vmi.read_32_va(ground.base + nodes[0], 0) == 1000
        ground.in_time(lambda: not vmi.vmi.words, "all to be forgotten")
        add(ground, nodes)
        assert forward(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]

    def test_another_threads_look_after_the_heads_own_node_asks_the_guest(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, 4))
        vmi = ground.read(place)
        vmi.read_32_va(ground.base + nodes[0], 0)
        add(ground, nodes)
        found: list[int] = []
        other = threading.Thread(target=lambda: found.extend(forward(vmi, place.start)))
        other.start()
        other.join()
        assert found == [ground.base + node + LINK for node in nodes[1:]]

    def test_what_another_list_brought_of_the_head_expires(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6)
        ground.ring(0x40000, [node + 40 for node in nodes])
        fields = (Field((), -40, SIZE), Field((), 0, 8), Field((), 8, 8))
        other = KernelList("other", ground.base + 0x40000, Step.RING, 0, 40, SIZE, fields)
        vmi = ground.read(place, other)
        assert len(forward(vmi, other.start)) == 6
        assert vmi.read_32_va(ground.base + nodes[0], 0) == 1000
        ground.put(nodes[0], 77)
        ground.in_time(lambda: vmi.read_32_va(ground.base + nodes[0], 0) == 77, "the new value")
        add(ground, nodes)
        assert len(copies(vmi, place.start)) == 6

    @pytest.mark.parametrize("listings", [0, 2])
    def test_a_look_replaces_what_another_list_brought_of_the_first_node(self, ground: Ground, listings: int) -> None:
        """Two lists share links, and the other was walked before a process ended. The look brings the list, or the head
        alone because more looks are expected."""
        place, nodes = tasks(ground, 6)
        ground.put(ARRAY, ground.base + nodes[1] + LINK)
        other = KernelList("other", ground.base + ARRAY, Step.CHAIN, 0, 0, 16, (Field((), 0, WORD),))
        vmi = ground.read(place, other)
        for _ in range(listings):
            both_ends(vmi, place.start)
            ground.in_time(lambda: not vmi.vmi.words, "all to be forgotten")
        link = vmi.read_addr_va(other.start, 0)
        for _ in nodes[2:]:
            link = vmi.read_addr_va(link, 0)
        del nodes[2]
        ground.ring(nodes[0] + LINK, [node + LINK for node in nodes[1:]])
        assert forward(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]

    @pytest.mark.parametrize("first", [1, 3], ids=["next to both heads", "next to one head"])
    @pytest.mark.parametrize("known_first", ["tasks", "other"])
    def test_a_look_at_one_list_does_not_keep_a_node_old_for_another(
        self, ground: Ground, known_first: str, first: int
    ) -> None:
        """Two lists share nodes. One's head was looked at, and nothing else; then the other is listed."""
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        other = sharing(ground, [nodes[first], *(node for node in nodes[1:] if node != nodes[first])], Field((), 0, 8))
        vmi = ground.read(*((place, other) if known_first == "tasks" else (other, place)))
        vmi.read_addr_va(place.start, 0)
        ground.put(nodes[1], 77)
        found = {link - SHARED: vmi.read_64_va(link - SHARED, 0) for link in forward(vmi, other.start)}
        assert found[ground.base + nodes[1]] == 77
        assert forward(vmi, place.start) == [ground.base + node + LINK for node in nodes[1:]]

    @pytest.mark.parametrize("wide", [Field((), 0, SIZE), Field((), SHARED - 4, 12)], ids=["copies", "a part"])
    def test_wide_reads_of_shared_nodes_have_the_links_of_the_list_that_is_read(
        self, ground: Ground, wide: Field
    ) -> None:
        """One list brought its nodes in wide pieces; then another was listed, whose links lie in them."""
        place, nodes = tasks(ground, 6, wide)
        members = nodes[1:4]
        other = sharing(ground, members)
        vmi = ground.read(place, other)
        for listing in (pairs, both_ends, both_ends, pairs):
            forward(vmi, place.start)
            vmi.read_va(ground.base + nodes[2] + wide.offset, 0, wide.size)
            members.append(nodes[-1])
            sharing(ground, members)
            assert len(listing(vmi, other.start)) == len(members)
            link = ground.base + members[-2] + SHARED
            copy = vmi.read_va(link - SHARED + wide.offset, 0, wide.size)[0][SHARED - wide.offset :][:8]
            assert int.from_bytes(copy, "little") == ground.base + nodes[-1] + SHARED
            add(ground, nodes)

    def test_a_ring_read_from_another_node_than_its_head(self, ground: Ground) -> None:
        """It does not begin a listing, so answers may be a second old; from the head on they are fresh."""
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
        last = ground.base + nodes[-2] + LINK
        ground.in_time(lambda: vmi.read_addr_va(last, 0) != place.start, "the node that was added")


def tree(ground: Ground, numbers: list[int]) -> None:
    """A search tree of ``numbers``, each at its own place; `ARRAY` has the pointer to its root."""
    at = {number: TREE + 0x500 * number for number in numbers}

    def grow(some: list[int]) -> int:
        if not some:
            return 0
        middle = len(some) // 2
        node = at[some[middle]]
        ground.put(node, some[middle], grow(some[:middle]), grow(some[middle + 1 :]))
        return ground.base + node

    ground.put(ARRAY, grow(sorted(numbers)))


def climb(vmi: Libvmi, node: int) -> list[int]:
    """Numbers of a tree's nodes, from a node down, in order."""
    if not node:
        return []
    left, right = vmi.read_addr_va(node + 8, 0), vmi.read_addr_va(node + 16, 0)
    return [*climb(vmi, left), vmi.read_32_va(node, 0), *climb(vmi, right)]


def cost(ground: Ground, script: Callable[[], Any]) -> int:
    """How many requests a script takes."""
    before = len(ground.link.requests)
    script()
    return len(ground.link.requests) - before


class Trails:
    """What is behind pointers, further than any field of a list reaches."""

    def test_a_tree_is_one_request_behind_the_pointer_to_it(self, ground: Ground) -> None:
        numbers = list(range(40))
        tree(ground, numbers)
        vmi = ground.read()
        costs = [cost(ground, lambda: climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))) for _ in range(5)]
        assert costs[0] > len(numbers)
        assert costs[1:] == [2] * 4

    def test_a_tree_is_as_it_is_when_the_pointer_to_it_is_read(self, ground: Ground) -> None:
        numbers = list(range(0, 60, 2))
        vmi = ground.read()
        for number in range(1, 60, 4):
            tree(ground, numbers)
            assert climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0)) == sorted(numbers)
            numbers.append(number)
            numbers.remove(number - 1)

    def test_a_path_from_each_node_up_to_its_own_parent_is_two_requests(
        self, ground: Ground, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As each process's executable has a path, and the root's dentry is its own parent."""
        place, nodes = tasks(ground, 20, Field((), 0, 8))
        deep = 14
        paths = {
            node: [TREE + 0x600 * (number * deep + step) for step in range(deep)] for number, node in enumerate(nodes)
        }
        root = TREE - 0x1000
        ground.put(root + 24, ground.base + root)
        for number, (node, path) in enumerate(paths.items()):
            ground.put(node + 8, ground.base + path[0])
            for step, (here, above) in enumerate(zip(path, [*path[1:], root], strict=True)):
                ground.put(here + 24, ground.base + above, 0, number << 8 | step)
        vmi = ground.read(place)

        def names() -> list[int]:
            found = []
            for link in forward(vmi, place.start):
                here = vmi.read_addr_va(link - LINK + 8, 0)
                while (above := vmi.read_addr_va(here + 24, 0)) != here:
                    found.append(vmi.read_64_va(here + 40, 0))
                    here = above
            return found

        with caplog.at_level(logging.INFO):
            costs = [cost(ground, names) for _ in range(5)]
        assert costs[2:] == [2] * 3, costs
        assert names() == [number << 8 | step for number in range(1, 20) for step in range(deep)]
        assert not caplog.records

    def test_a_chain_that_ends_in_itself_is_learned_once(
        self, ground: Ground, caplog: pytest.LogCaptureFixture
    ) -> None:
        links = [TREE + 0x600 * number for number in range(30)]
        for here, above in zip(links, [*links[1:], links[-1]], strict=True):
            ground.put(here + 24, ground.base + above)
        ground.put(ARRAY, ground.base + links[0])
        vmi = ground.read()

        def up() -> int:
            count, here = 0, vmi.read_addr_va(ground.base + ARRAY, 0)
            while (above := vmi.read_addr_va(here + 24, 0)) != here:
                count, here = count + 1, above
            return count

        with caplog.at_level(logging.INFO):
            costs = [cost(ground, lambda: up() == len(links) - 1) for _ in range(4)]
        assert costs[1:] == [1] * 3
        assert up() == len(links) - 1
        assert not caplog.records

    def test_what_the_nodes_of_a_ring_behind_a_pointer_point_to_is_on_its_trail(self, ground: Ground) -> None:
        """Such as the super block of each mount. In the first pass the ring is a list of its own, whose first nodes are
        read before it is known what is wanted of each."""
        place, (_, first, *_) = tasks(ground, 3, Field((), 0, 8))
        nodes, head = [TREE + 0x4000 * number for number in range(20)], ARRAY + 0x800
        ground.put(first + 8, ground.base + ARRAY)
        ground.ring(head, nodes)
        for number, node in enumerate(nodes):
            ground.put(node + 16, ground.base + node + 0x2000)
            ground.put(node + 0x2000, ground.base + number)
        vmi = ground.read(place)

        def values() -> list[int]:
            task = vmi.read_addr_va(place.start, 0) - LINK
            links = forward(vmi, vmi.read_addr_va(task + 8, 0) + 0x800)
            return [vmi.read_addr_va(vmi.read_addr_va(link + 16, 0), 0) - ground.base for link in links]

        costs = [cost(ground, lambda: values() == list(range(20))) for _ in range(6)]
        assert values() == list(range(20))
        assert costs[3:] == [2] * 3, costs

    def test_trees_of_arrays_behind_each_node_are_few_requests(self, ground: Ground) -> None:
        """As the mappings of each process are, by its maple tree: arrays of pointers to arrays. In each pass something
        is somewhere else, and something else is where it was."""
        place, nodes = tasks(ground, 12, Field((), 0, 8))
        truth: dict[int, list[int]] = {}

        def plant(number: int, value: int) -> None:
            """A tree of three levels, of two arrays each."""
            here = [TREE + 0x4000 * number + 0x800 * part for part in range(8)]
            ground.put(nodes[number] + 24, ground.base + here[0])
            ground.put(here[0], *(ground.base + at for at in here[1:3] * 3))
            for middle in (1, 2):
                ground.put(here[middle], *(ground.base + at for at in here[1 + 2 * middle : 3 + 2 * middle] * 3))
            for leaf in range(3, 7):
                ground.put(here[leaf], *range(value + leaf, value + leaf + 6))
            halves = [[*range(value + leaf, value + leaf + 6)] for leaf in range(3, 7)]
            truth[number] = [*(halves[0] + halves[1]) * 3, *(halves[2] + halves[3]) * 3] * 3

        for number in range(1, 12):
            plant(number, 100 * number)
        vmi = ground.read(place)

        def values() -> dict[int, list[int]]:
            found = {}
            for number, link in enumerate(forward(vmi, place.start), 1):
                top = vmi.read_addr_va(link - LINK + 24, 0)
                middles = [vmi.read_addr_va(top + 8 * slot, 0) for slot in range(6)]
                leaves = [vmi.read_addr_va(middle + 8 * slot, 0) for middle in middles for slot in range(6)]
                found[number] = [vmi.read_addr_va(leaf + 8 * slot, 0) for leaf in leaves for slot in range(6)]
            return found

        costs = []
        for turn in range(12):
            plant(1 + turn % 11, 1000 + turn)
            costs.append(cost(ground, lambda: values() == truth))
            assert values() == truth
        assert sorted(costs[6:])[3] <= 4, costs

    def test_what_a_script_polls_is_of_this_moment(self, ground: Ground) -> None:
        """Until the next look at where it began, the guest is asked each time."""
        tree(ground, [1, 2, 3])
        vmi = ground.read()
        node = vmi.read_addr_va(ground.base + ARRAY, 0)
        at = vmi.read_addr_va(node + 8, 0)
        for value in range(5):
            ground.put(at - ground.base, value)
            assert vmi.read_32_va(at, 0) == value

    def test_a_head_that_a_script_kept_is_of_this_moment(self, ground: Ground) -> None:
        """It never reads what leads there. The ring is too short for a list of its own, and its nodes lead back."""
        _, nodes = tasks(ground, 3)
        vmi = ground.read()
        for _ in range(4):
            assert forward(vmi, ground.base + nodes[0] + LINK) == [ground.base + node + LINK for node in nodes[1:]]
            add(ground, nodes)

    def test_what_a_trail_brought_expires(self, ground: Ground) -> None:
        tree(ground, list(range(20)))
        vmi = ground.read()
        for _ in range(3):
            climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))
        at = ground.base + TREE + 0x500 * 7 + 8
        assert at in vmi.vmi.words
        ground.put(at - ground.base, 77)
        ground.in_time(lambda: at not in vmi.vmi.words, "the old value to be forgotten")
        assert vmi.read_addr_va(at, 0) == 77

    def test_what_a_script_kept_of_a_trail_is_of_this_moment_once_the_pass_is_old(self, ground: Ground) -> None:
        tree(ground, list(range(20)))
        vmi = ground.read()
        for _ in range(3):
            climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))
        at = ground.base + TREE + 0x500 * 7
        ground.let_pass(2 * STALE)
        for value in range(5):
            ground.put(at - ground.base, value)
            assert vmi.read_32_va(at, 0) == value

    def test_a_trail_in_a_hold_changes_no_answer(self, ground: Ground) -> None:
        tree(ground, list(range(20)))
        vmi = ground.read()
        for _ in range(3):
            climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))
        with pause(vmi):
            node = vmi.read_addr_va(ground.base + ARRAY, 0)
            assert vmi.read_32_va(node, 0) == 10
            ground.put(node - ground.base, 77)
            climb(vmi, node)
            assert vmi.read_32_va(node, 0) == 10
        assert 77 in climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))

    def test_a_trail_forgets_what_nothing_leads_to(self, ground: Ground) -> None:
        vmi = ground.read()
        lengths = []
        for first in range(0, 400, 10):
            tree(ground, list(range(first, first + 40)))
            assert len(climb(vmi, vmi.read_addr_va(ground.base + ARRAY, 0))) == 40
            reader = cast(PlantedGuest, vmi.vmi).reader
            assert isinstance(reader, ReadAhead)
            trail = reader._lists.trails.at(ground.base + ARRAY)
            assert trail is not None
            lengths.append(len(trail))
        assert max(lengths) < 1000


class Tables:
    """Hash tables, whose chains are mostly empty."""

    @pytest.mark.parametrize("order", [iter, reversed])
    def test_a_table_whose_pointer_is_read_twice(self, ground: Ground, order: Callable[[range], Any]) -> None:
        """And then only once, when the walk has yet to be made."""
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
    def test_a_chain_that_was_empty_in_the_listing_before(
        self, ground: Ground, number: int, order: Callable[[range], Any]
    ) -> None:
        place = table(ground, {7: 2})
        vmi = ground.read(place)
        for _ in range(3):
            for count in (0, 3, 1):
                fill(ground, number, count)
                assert len(sockets(vmi, ground, order)) == 2 + count

    def test_a_table_that_is_read_at_once_has_fresh_chains(self, ground: Ground) -> None:
        place = table(ground, {7: 1})
        vmi = ground.read(place)
        for _ in range(3):
            for count in (1, 3, 2):
                fill(ground, 7, count)
                assert len(in_bulk(vmi, ground)) == count

    def test_a_chain_never_looks_empty_while_another_thread_walks(self, ground: Ground) -> None:
        heads, at = 1 << 14, 0x80000
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
            until(lambda: len(ground.link.requests) > 3, what="the first walks")
            for _ in range(20_000):
                assert vmi.read_addr_va(full, 0) == node
        finally:
            sys.setswitchinterval(interval)
            over.set()
            other.join()

    def test_an_empty_chain_expires(self, ground: Ground) -> None:
        """In a table of empty chains only, so that there is nothing else to forget."""
        place = table(ground, {})
        vmi = ground.read(place)
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        assert vmi.read_addr_va(ground.base + TABLE + 800, 0) & 1
        fill(ground, 100, 1)
        ground.in_time(lambda: vmi.read_addr_va(ground.base + TABLE + 800, 0) & 1 == 0, "the chain's first node")

    def test_an_empty_chain_is_forgotten_when_the_agent_does_not_answer(self, ground: Ground) -> None:
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

    def test_a_chain_whose_first_node_cannot_be_read_is_not_empty(self, ground: Ground) -> None:
        place = table(ground, {7: 2})
        poison = 0xDEAD000000000100 + LINK
        ground.put(TABLE + 8 * 50, poison)
        vmi = ground.read(place)
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        assert vmi.read_addr_va(ground.base + TABLE + 8 * 50, 0) == poison
        with pytest.raises(LibvmiError, match="VMI_FAILURE"):
            sockets(vmi, ground)

    def test_a_chain_that_became_empty_comes_with_the_walk(self, ground: Ground) -> None:
        place = table(ground, {7: 2, 100: 1})
        vmi = ground.read(place)
        sockets(vmi, ground)
        for number in (7, 100):
            fill(ground, number, 0)
            sockets(vmi, ground)
            ground.link.requests.clear()
            assert sockets(vmi, ground) == [ground.base + 0x20000 + 400 * SIZE + LINK] * (number == 7)
            assert ground.link.requests == [Walk.KIND]

    def test_a_chain_beyond_a_walk_that_was_cut_short_is_not_empty_for_it_was_before(self, ground: Ground) -> None:
        place = table(ground, {7: 2})
        vmi = ground.read(replace(place, max_nodes=100))
        assert len(sockets(vmi, ground)) == 2
        for number in range(HEADS):
            fill(ground, number, 2)
        assert len(sockets(vmi, ground)) == 2 * HEADS

    def test_a_first_node_that_is_known_otherwise_ends_the_look(self, ground: Ground) -> None:
        """The next read of the first chain is a look of its own."""
        place = table(ground, {0: 1, 7: 2})
        vmi = ground.read(place)
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        first = ground.base + 0x20000 + LINK
        cast(PlantedGuest, vmi.vmi).learned([Extent(first, (1).to_bytes(WORD, "little"))])
        assert vmi.read_addr_va(first, 0) == 1
        fill(ground, 0, 2)
        link = vmi.read_addr_va(ground.base + TABLE, 0)
        assert link == first
        assert vmi.read_addr_va(link, 0) == first + SIZE

    def test_chains_beyond_a_walk_that_was_cut_short_are_read(self, ground: Ground) -> None:
        place = table(ground, dict.fromkeys(range(HEADS), 2))
        vmi = ground.read(replace(place, max_nodes=100))
        for _ in range(2):
            assert len(sockets(vmi, ground)) == 2 * HEADS

    def test_a_ring_beyond_a_walk_that_was_cut_short_is_read(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 50)
        vmi = ground.read(replace(place, max_nodes=10))
        for _ in range(3):
            assert len(forward(vmi, place.start)) == len(nodes) - 1
            add(ground, nodes)


class Ages:
    """Nothing is older than promised."""

    def test_an_array_that_is_read_slowly_expires_part_by_part(self, ground: Ground) -> None:
        """Each part that was read ahead has its own age."""
        vmi = ground.read()
        at = ground.base + ARRAY
        for number in range(6):
            assert vmi.read_64_va(at + 8 * number, 0) == 0
        ground.put(ARRAY + 40, 77)
        deadline = ground.now() + STALE + ground.margin
        number = 6
        while vmi.read_64_va(at + 40, 0) != 77:
            assert ground.now() < deadline, "it is older than promised"
            for _ in range(400):
                vmi.read_64_va(at + 8 * number, 0)
                number += 1
            ground.let_pass(0.125)

    def test_four_words_read_again_and_again_are_never_too_old(self, ground: Ground) -> None:
        vmi = ground.read()
        at = ground.base + ARRAY
        for value in range(1, 4):
            ground.put(ARRAY, *[value] * 4)
            deadline = ground.now() + STALE + ground.margin
            while [vmi.read_64_va(at + 8 * number, 0) for number in range(4)] != [value] * 4:
                assert ground.now() < deadline, "they are older than promised"
                ground.let_pass(0.0625)

    def test_what_an_injected_program_brought_expires(self, ground: Ground) -> None:
        vmi = ground.read()
        target = cast(PlantedGuest, vmi.vmi)
        target.learned([Extent(ground.base + ARRAY, bytes(8))])
        ground.put(ARRAY, 77)
        deadline = ground.now() + STALE + ground.margin
        while vmi.read_64_va(ground.base + ARRAY, 0) != 77:
            assert ground.now() < deadline, "it is older than promised"
            ground.let_pass(0.0625)
            target.learned([Extent(ground.base + ARRAY + 64, bytes(8))])

    def test_a_counter_that_comes_with_a_listing_is_fresh_at_each_read(self, ground: Ground) -> None:
        """Read once a listing, it comes with the walk; read again, the agent is asked."""
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
        ground.let_pass(COMPANION_STALE)
        assert vmi.read_64_va(counter, 0) == 77

    def test_a_counter_that_comes_with_two_listings_is_fresh_when_read_again(self, ground: Ground) -> None:
        vmi, place, other = with_two_listings(ground)
        forward(vmi, place.start)
        forward(vmi, other.start)
        vmi.read_64_va(ground.base + ARRAY, 0)
        ground.put(ARRAY, 77)
        assert vmi.read_64_va(ground.base + ARRAY, 0) == 77

    def test_a_counter_that_comes_with_two_listings_is_the_last_ones(self, ground: Ground) -> None:
        vmi, place, other = with_two_listings(ground)
        for value, (first, second) in enumerate([(place, other), (other, place)]):
            forward(vmi, first.start)
            ground.let_pass(COMPANION_STALE / 8)
            ground.put(ARRAY, 77 + value)
            forward(vmi, second.start)
            assert vmi.read_64_va(ground.base + ARRAY, 0) == 77 + value

    def test_half_a_walk_is_not_kept(self, ground: Ground) -> None:
        """It failed in the middle: then what the listing before had brought is not known either."""
        place, nodes = tasks(ground, 200, Field((), 0, 8))
        wide = tuple(Field((), at, 4096) for at in (SIZE, SIZE + 4096, SIZE + 8192))
        vmi = ground.read(replace(place, fields=(*place.fields, *wide)))
        forward(vmi, place.start)
        ground.put(nodes[3], 77)

        def fail(number: int) -> None:
            if ground.link.requests[-1] == More.KIND:
                raise LinkError("the agent is gone")

        ground.link.before = fail
        with pytest.raises(LinkError, match="the agent is gone"):
            vmi.read_addr_va(place.start, 0)
        ground.link.before = lambda number: None
        ground.link.requests.clear()
        assert vmi.read_64_va(ground.base + nodes[3], 0) == 77
        assert ground.link.requests == [Read.KIND]

    @pytest.mark.parametrize("forget", [Libvmi.pagecache_flush, lambda vmi: pause(vmi).__enter__(), of_a_pause])
    def test_nothing_that_was_brought_outlives_a_flush(self, ground: Ground, forget: Callable[[Libvmi], Any]) -> None:
        """Nodes, a single read that came with the listing, an array, and what an injected program brought."""
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        vmi = ground.read(place)
        array, single, learned = (ARRAY, *range(ARRAY + 64, ARRAY + 72, 8)), ARRAY + 0x8000, ARRAY + 0x9000
        for _ in range(3):
            forward(vmi, place.start)
            vmi.read_64_va(ground.base + single, 0)
        forward(vmi, place.start)
        for at in range(0, 48, 8):
            vmi.read_64_va(ground.base + ARRAY + at, 0)
        cast(PlantedGuest, vmi.vmi).learned([Extent(ground.base + learned, bytes(8))])
        wanted = (nodes[3], *array, single, learned)
        for at in wanted:
            ground.put(at, 77)
        ground.link.requests.clear()
        forget(vmi)
        assert [vmi.read_64_va(ground.base + at, 0) for at in wanted] == [77] * len(wanted)

    def test_memory_expires_while_another_thread_waits_for_the_agent(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        vmi = ground.read(place)
        forward(vmi, place.start)
        at = ground.base + nodes[3]
        assert vmi.read_64_va(at, 0) == 1003
        with waiting_for_the_agent(ground, lambda: vmi.read_64_va(ground.base + ARRAY, 0)):
            ground.put(nodes[3], 77)
            ground.in_time(lambda: at not in vmi.vmi.words, "the old value to be forgotten")
        assert vmi.read_64_va(at, 0) == 77

    @pytest.mark.parametrize("learning", [False, True])
    def test_lists_expire_one_by_one_while_another_thread_waits(self, ground: Ground, learning: bool) -> None:
        """One list expires soon after the wait began, another later; the wait may be for more of that list."""
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        ground.ring(0x40000, [0x40080, 0x40100])
        first = KernelList("first", ground.base + 0x40000, Step.RING, 0, 0, 16, (Field((), 0, WORD),))
        vmi = ground.read(place, first)
        forward(vmi, first.start)
        ground.let_pass(STALE / 2)
        forward(vmi, place.start)
        vmi.read_32_va(ground.base + nodes[1] + 32, 0)
        asked, at = ground.base + (nodes[2] + 32 if learning else ARRAY), ground.base + nodes[3]
        with waiting_for_the_agent(ground, lambda: vmi.read_32_va(asked, 0)):
            ground.put(nodes[3], 77)
            ground.let_pass(STALE / 2)
            ground.in_time(lambda: at not in vmi.vmi.words, "the old value to be forgotten")
        assert vmi.read_64_va(at, 0) == 77

    def test_a_table_that_expires_while_it_is_walked_is_complete_afterwards(self, ground: Ground) -> None:
        place = table(ground, {7: 2})
        vmi = ground.read(place)
        sockets(vmi, ground)
        ground.link.before = lambda number: ground.let_pass(2 * STALE)
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        ground.link.before = lambda number: None
        ground.link.requests.clear()
        for number in range(HEADS):
            vmi.read_addr_va(ground.base + TABLE + 8 * number, 0)
        assert not ground.link.requests

    def test_learning_a_field_of_one_list_does_not_bring_back_old_memory_of_another(self, ground: Ground) -> None:
        """Two lists share nodes: one is listed, then the other, then a field of the first is learned."""
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


class Holds:
    """Between `pause_vm` and `resume_vm` no byte has two answers."""

    def test_learning_in_a_hold_changes_no_answer(self, ground: Ground) -> None:
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

    def test_a_wider_read_in_a_hold_repeats_each_byte_that_was_answered(self, ground: Ground) -> None:
        """Words of the walk, then the memory around them, learned for all nodes; and the reverse."""
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
    def test_a_head_in_a_hold_has_one_answer(self, ground: Ground, wide: bool) -> None:
        """A head in a node, and one that stands alone: first read by itself, or first with the bytes around it."""
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

    def test_a_read_that_comes_with_a_listing_in_a_hold_changes_no_answer(self, ground: Ground) -> None:
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

    def test_wide_reads_in_a_hold_are_not_forgotten_for_another_list(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, SIZE))
        other = sharing(ground, nodes[1:4])
        vmi = ground.read(place, other)
        with pause(vmi):
            forward(vmi, place.start)
            copies = [vmi.read_va(ground.base + node, 0, SIZE)[0] for node in nodes]
            sharing(ground, nodes[2:])
            members = pairs(vmi, other.start)
            assert [vmi.read_va(ground.base + node, 0, SIZE)[0] for node in nodes] == copies
            assert pairs(vmi, other.start) == members

    def test_an_array_in_a_hold_has_one_answer(self, ground: Ground) -> None:
        vmi = ground.read()
        at = ground.base + ARRAY
        with pause(vmi):
            assert vmi.read_64_va(at + 64, 0) == 0
            ground.put(ARRAY, *[7] * 20)
            answers = [vmi.read_64_va(at + 8 * number, 0) for number in range(20)]
            assert answers == [vmi.read_64_va(at + 8 * number, 0) for number in range(20)]
            assert vmi.read_64_va(at + 64, 0) == 0

    def test_a_chain_that_is_given_up_in_a_hold_changes_no_answer(self, ground: Ground) -> None:
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


class Forks:
    """A forked child."""

    def test_a_hold_goes_on_in_a_forked_child(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        vmi = ground.read(place)
        with pause(vmi):
            listed = forward(vmi, place.start)
            assert vmi.read_64_va(ground.base + ARRAY, 0) == 0
            add(ground, nodes)
            ground.put(ARRAY, 77)
            assert in_a_child(
                ground, lambda: forward(vmi, place.start) == listed and vmi.read_64_va(ground.base + ARRAY, 0) == 0
            )
        assert in_a_child(
            ground, lambda: len(forward(vmi, place.start)) == 6 and vmi.read_64_va(ground.base + ARRAY, 0) == 77
        )

    def test_a_child_forgets_what_its_parent_read_ahead(self, ground: Ground) -> None:
        place, nodes = tasks(ground, 6, Field((), 0, 8))
        vmi = ground.read(place)
        forward(vmi, place.start)
        ground.put(nodes[3], 77)
        assert vmi.read_64_va(ground.base + nodes[3], 0) == 1003
        assert in_a_child(ground, lambda: vmi.read_64_va(ground.base + nodes[3], 0) == 77)
        assert vmi.read_64_va(ground.base + nodes[3], 0) == 1003

    @pytest.mark.parametrize("strategy", ["batch", "page"])
    def test_a_child_forked_while_a_thread_waits_for_the_agent_can_read(
        self, ground: Ground, strategy: Strategy
    ) -> None:
        place, _ = tasks(ground, 6)
        vmi = ground.read(place, strategy=strategy)

        def lists() -> bool:
            ground.link.renew()
            vmi.pause_vm()
            found = len(forward(vmi, place.start))
            vmi.resume_vm()
            return found == 5

        with waiting_for_the_agent(ground, lambda: vmi.read_64_va(ground.base + ARRAY, 0)):
            pausing = threading.Thread(target=vmi.pause_vm)
            pausing.start()
            assert in_a_child(ground, lists)
        pausing.join()


class Histories:
    """Restarted agents, and memory that must not grow."""

    @pytest.mark.parametrize("times", [1, 2])
    def test_an_agent_restarted_in_the_middle_of_a_walk(self, ground: Ground, times: int) -> None:
        """Its unfinished walks are lost, so the walk is begun again, once. Then the listing fails, not the next one."""
        place, nodes = tasks(ground, 200)
        wide = tuple(Field((), at, 4096) for at in (SIZE, SIZE + 4096, SIZE + 8192))
        vmi = ground.read(replace(place, fields=(*place.fields, *wide)))

        restarts = iter(range(times))

        def restart(number: int) -> None:
            if ground.link.requests[-1] == More.KIND and next(restarts, None) is not None:
                ground.link.agent = Agent(ground.kernel)

        ground.link.before = restart
        with pytest.raises(LinkError, match="start the walk again") if times > 1 else nullcontext():
            assert len(forward(vmi, place.start)) == len(nodes) - 1
        add(ground, nodes)
        assert len(forward(vmi, place.start)) == len(nodes) - 1
        assert next(restarts, None) is None

    def test_the_number_of_given_up_chains_is_bounded(self, ground: Ground) -> None:
        vmi = ground.read()
        for number in range(1100):
            at = 0x40000 + number * 128
            ground.put(at, *(ground.base + at + 32 * link for link in range(1, 4)))
            for link in range(4):
                ground.put(at + 32 * link, ground.base + at + 32 * (link + 1))
            link = ground.base + at
            for _ in range(4):
                link = vmi.read_addr_va(link, 0)
        reader = cast(PlantedGuest, vmi.vmi).reader
        assert isinstance(reader, ReadAhead)
        assert len(reader._chains.fruitless) <= 1024

    def test_the_number_of_remembered_names_is_bounded(self, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agent_profile, "NAMES_MAX", 8)
        profile = cast(PlantedGuest, ground.read().vmi).profile
        for at in range(20):
            with pytest.raises(KeyError):
                profile.symbol_at(ground.base + at)
        assert profile.symbol_at(profile.symbol("init_task")) == "init_task"
        assert len(profile._names) == 8


class Encryption:
    """A guest whose memory is encrypted."""

    @pytest.mark.parametrize("bit", [0, 47, 51])
    def test_page_tables_of_an_encrypted_guest(self, ground: Ground, bit: int) -> None:
        """Under AMD SEV each entry has the C-bit, which is not part of the address."""
        mask = 1 << bit if bit else 0
        levels = ground.kernel.levels
        for level in range(1, levels + 1):
            ground.put(4096 * level, 4096 * (level + 1) | mask | 0x67)
        ground.put(4096 * (levels + 1) + 8, 77)
        with ground.all_of_memory(mask):
            vmi = ground.read()
            context = AccessContext(TranslateMechanism.PROCESS_DTB, addr=8, dtb=4096 | mask)
            assert vmi.read_64(context) == 77
            assert vmi.pagetable_lookup(4096 | mask, 8) == 4096 * (levels + 1) + 8
