"""Whatever an IDS follows from a list is learned, exact, and soon one request: on planted processes, without a kernel.

The truth is what was planted. ``tests/guest/test_readahead.py`` shows the same of real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from guest_agent.agent import Agent
from tests.ground.connection import Connection
from tests.ground.freshness import BufferGround
from vmishim.libvmi import Libvmi
from vmishim.memory.lifetimes import STALE
from vmishim.readahead.catalogue import InnerRing, KernelList
from vmishim.readahead.fields import RING, WORD, Field, Hop
from vmishim.wire.plan import Step

COUNT = 50
TASK, SIZE = 0x1000, 256
TASKS, CHILDREN, SIBLING, CRED, FILES, COMM, SIGNAL, THREAD = 16, 32, 48, 64, 72, 80, 96, 104
"""Members of a planted task, whose number is its first word."""
CREDS, TABLES, ARRAYS, OBJECTS, NAMES, SIGNALS, THREADS = 0x8000, 0xA000, 0xC000, 0x10000, 0x20000, 0x30000, 0x40000
THREADS_HEAD = 8
"""Member of a planted signal_struct."""
TYPES = {
    f"task_struct {CRED}": [1, 64],
    f"task_struct {FILES}": [2, 64],
    "#2 8": [3, 8],  # a pointer to pointers: an array
    "#3 0": [4, 64],
    "#4 24": [5, 1],  # characters
    f"task_struct {SIGNAL}": [6, 64],
}
"""What the kernel's types say of pointers: ``"struct offset"`` or ``"#type offset"`` -> [type, size]."""
NULL = 0


@dataclass
class Process:
    """What was planted of one, by which a listing is judged."""

    at: int
    uid: int
    comm: str
    parent: int
    files: dict[int, str]
    threads: list[int] = field(default_factory=list)


class Processes(BufferGround):
    """Tasks in a ring whose head is in the first, each with children, threads and open files."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer.pointees = TYPES
        self.processes = {number: self._plant(number) for number in range(COUNT)}
        nodes = [TASK + SIZE * number for number in range(COUNT)]
        self.ring(nodes[0] + TASKS, [node + TASKS for node in nodes[1:]])
        for number, node in enumerate(nodes):
            children = [other for other in range(1, COUNT) if self.processes[other].parent == number]
            self.ring(node + CHILDREN, [nodes[child] + SIBLING for child in children])
        threads = (Hop(SIGNAL), Hop(THREADS_HEAD, span=RING, link=THREAD))
        brought = (Field(threads, THREAD, WORD), Field(threads, THREAD + 8, WORD), Field(threads, 0, 4))
        inner = InnerRing(Field((Hop(SIGNAL),), THREADS_HEAD, WORD), brought, "task_struct", SIZE)
        own = (Field((), TASKS, WORD), Field((), TASKS + 8, WORD), Field((), 0, 4), Field((), COMM, 16))
        start = self.base + TASK + TASKS
        self.list = KernelList("tasks", start, Step.RING_NODE, TASKS, 0, SIZE, own, "task_struct", inner=(inner,))
        self.vmi = self.read(self.list)

    def _plant(self, number: int) -> Process:
        node, parent = TASK + SIZE * number, number // 3
        files = {at: f"/tmp/{number}-{at}" for at in range(number % 5, 8, 2)}
        planted = Process(node, 1000 + number, f"task-{number}", parent, files)
        self.put(node, number)
        self.planter.write(node + COMM, planted.comm.encode().ljust(16, b"\0"))
        cred, table, array, signal = (each + 64 * number for each in (CREDS, TABLES, ARRAYS, SIGNALS))
        self.put(node + CRED, self.base + cred, self.base + table)
        self.put(cred, planted.uid << 32)
        self.put(table + 8, self.base + array)
        for at in range(8):
            opened = OBJECTS + 512 * number + 64 * at
            self.put(array + 8 * at, self.base + opened if at in files else NULL)
            self.put(opened + 24, self.base + NAMES + 512 * number + 64 * at)
            self.planter.write(NAMES + 512 * number + 64 * at, files.get(at, "").encode() + b"\0")
        self.put(node + SIGNAL, self.base + signal)
        planted.threads = [number, *(500 + 10 * number + each for each in range(number % 3))]
        others = [THREADS + SIZE * (3 * number + each) for each in range(number % 3)]
        for at, thread in zip(others, planted.threads[1:], strict=True):
            self.put(at, thread)
        self.ring(signal + THREADS_HEAD, [each + THREAD for each in (node, *others)])
        return planted

    # ---- as an IDS reads ---------------------------------------------------------------------------------------------

    def links(self, head: int) -> Iterator[int]:
        link = self.vmi.read_addr_va(head, 0)
        while link != head:
            yield link
            link = self.vmi.read_addr_va(link, 0)

    def tasks(self) -> Iterator[int]:
        yield self.base + TASK
        for link in self.links(self.list.start):
            yield link - TASKS

    def number(self, task: int) -> int:
        return self.vmi.read_32_va(task, 0)

    def names(self) -> dict[int, tuple[str, int]]:
        found = {}
        for task in self.tasks():
            uid = self.vmi.read_32_va(self.vmi.read_addr_va(task + CRED, 0) + 4, 0)
            found[self.number(task)] = self.vmi.read_str_va(task + COMM, 0), uid
        return found

    def tree(self) -> dict[int, list[int]]:
        return {
            self.number(task): [self.number(link - SIBLING) for link in self.links(task + CHILDREN)]
            for task in self.tasks()
        }

    def threads(self) -> dict[int, list[int]]:
        found = {}
        for task in self.tasks():
            head = self.vmi.read_addr_va(task + SIGNAL, 0) + THREADS_HEAD
            found[self.number(task)] = [self.number(link - THREAD) for link in self.links(head)]
        return found

    def files(self) -> dict[int, dict[int, str]]:
        found: dict[int, dict[int, str]] = {}
        for task in self.tasks():
            opened = found.setdefault(self.number(task), {})
            array = self.vmi.read_addr_va(self.vmi.read_addr_va(task + FILES, 0) + 8, 0)
            for at in range(8):
                file = self.vmi.read_addr_va(array + 8 * at, 0)
                if file:
                    opened[at] = self.vmi.read_str_va(self.vmi.read_addr_va(file + 24, 0), 0)
        return found

    def copies(self) -> dict[int, bytes]:
        return {self.number(task): self.vmi.read_va(task, 0, SIZE)[0] for task in self.tasks()}

    def requests(self, listing: Callable[[], Any]) -> int:
        before = len(self.link.requests)
        listing()
        return len(self.link.requests) - before


@pytest.fixture
def guest() -> Processes:
    return Processes()


LISTINGS: dict[str, tuple[Callable[[Processes], Any], Callable[[Process], Any], int]] = {
    "names and owners": (Processes.names, lambda planted: (planted.comm, planted.uid), 1),
    "threads": (Processes.threads, lambda planted: planted.threads, 2),
    "open files": (Processes.files, lambda planted: planted.files, 2),
}
"""How an IDS lists, what it should find of a process, and requests once it is known how it goes."""


@pytest.mark.parametrize("name", LISTINGS)
def test_what_hangs_from_tasks_is_learned_and_exact(guest: Processes, name: str) -> None:
    listing, expected, most = LISTINGS[name]
    for _ in range(4):
        assert listing(guest) == {number: expected(planted) for number, planted in guest.processes.items()}
    assert guest.requests(lambda: listing(guest)) <= most


def test_a_process_tree_by_children_lists_is_one_request(guest: Processes) -> None:
    """Each task has a list head of its own, ``children``: reading it begins no snapshot of its own."""
    truth = {
        number: [child for child in range(1, COUNT) if guest.processes[child].parent == number]
        for number in range(COUNT)
    }
    for _ in range(4):
        assert guest.tree() == truth
    assert guest.requests(guest.tree) == 1


def test_whole_structures_are_learned(guest: Processes) -> None:
    """The first copy has the list's head in it: a look, and another follows."""
    truth = {
        number: bytes(guest.memory.memory[planted.at : planted.at + SIZE])
        for number, planted in guest.processes.items()
    }
    for _ in range(4):
        assert guest.copies() == truth
    assert guest.requests(guest.copies) <= 2


def test_an_array_is_read_in_few_requests(guest: Processes) -> None:
    """Such as the system call table, entry by entry."""
    guest.put(0x80000, *range(7, 447))
    found: list[int] = []
    cost = guest.requests(
        lambda: found.extend(guest.vmi.read_64_va(guest.base + 0x80000 + 8 * at, 0) for at in range(440))
    )
    assert found == list(range(7, 447))
    assert cost <= 8


def test_a_listing_slower_than_the_promise_goes_on(guest: Processes) -> None:
    """An IDS that thinks for a second in the middle: the rest of its listing is not read one by one."""
    guest.names()
    tasks = guest.tasks()
    begun = [guest.number(next(tasks)) for _ in range(3)]
    guest.let_pass(STALE)
    rest: list[int] = []
    assert guest.requests(lambda: rest.extend(guest.number(task) for task in tasks)) == 1
    assert [*begun, *rest] == list(range(COUNT))


def test_several_objects_share_one_agent(guest: Processes) -> None:
    agent, truth = Agent(guest.kernel), guest.names()
    for _ in range(5):
        guest.link = Connection(agent)
        guest.vmi = Libvmi.over(guest.connect([replace(guest.list)], "batch"))
        assert guest.names() == truth
