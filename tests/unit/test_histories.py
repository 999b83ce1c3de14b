"""Long histories of reads, by chance: each answered byte is one that docs/freshness.md allows.

The machine changes memory, between requests and during them, lets time pass, and reads as scripts do. The oracle knows
every state that memory was in, and since when. It knows nothing of how reading ahead works.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from guest_agent.agent import Agent
from tests.ground.buffer import Buffer, BufferKernel
from tests.ground.connection import Connection
from tests.ground.freshness import PlantedGuest
from vmishim.errors import LibvmiError, LinkError
from vmishim.libvmi import Libvmi
from vmishim.memory.lifetimes import COMPANION_STALE, STALE
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import Field
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.messages import More, Walk
from vmishim.wire.plan import Step

ROOM = 0x8000
CHUNK = 1024
"""Bytes of a reply: so few that a walk takes several."""
NODE, LINK, POINTER, TEXT = 96, 16, 32, 48
"""A task: its bytes, and where it has its link, a pointer to an object, and a name."""
TASKS = [0x1000 + 128 * number for number in range(6)]
OBJECTS = [0x2000 + 64 * number for number in range(6)]
GROUP_HEAD, MEMBER = 0x3800, 64
"""A second list of some tasks: its head, and where a task has the link."""
MODULES_HEAD = 0x3000
MODULES = [0x3100 + 64 * number for number in range(5)]
TABLE, HEADS = 0x4100, 6
SOCKETS = [0x4400 + 64 * number for number in range(8)]
COUNTERS = [0x100 + 512 * number for number in range(4)]
"""Below all else: what is read one behind the other brings memory above it ahead."""
ARRAY, ARRAY_WORDS = 0x6000, 256
CHANGES = [
    "task",
    "task",
    "member",
    "module",
    "socket",
    "pid",
    "word",
    "pointer",
    "object",
    "name",
    "version",
    "counter",
    "array",
]
TROUBLE = ["change", "reads", "time", "restart", "fail"]
EVENTS = ["nothing", "nothing", "half a second", "a second", "a second", "pause", "pause", "flush", "fork", "restart"]
SINGLE = [
    "tasks",
    "modules",
    "group",
    "on group",
    "table",
    "bucket",
    "bucket",
    "task",
    "word",
    "pointer",
    "name",
    "module",
    "counter",
]
SINGLE += ["counter", "array", "end", "on", "on"]
POISON = 0xDEAD000000000100


Change = tuple[str, int, int]
Script = tuple[str, int, set[str], bool]
Meanwhile = list[tuple[int, Change, str]]


class Memory(Buffer):
    """A buffer that remembers every state it was in.

    :ivar states: what it held, and until when; the last one lasts
    """

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(size=ROOM)
        self.now = now
        self.states: list[tuple[bytes, float]] = [(bytes(self.memory), float("inf"))]
        self.reads_until_change = 0
        self.change: Callable[[], None] = lambda: None
        """Made in the middle of a walk, after so many reads of it."""

    def write(self, at: int, data: bytes) -> None:
        super().write(at, data)
        self.states[-1] = self.states[-1][0], self.now()
        self.states.append((bytes(self.memory), float("inf")))

    def read(self, address: int, count: int) -> bytes | None:
        if self.reads_until_change:
            self.reads_until_change -= 1
            if not self.reads_until_change:
                self.change()
        return super().read(address, count)

    @property
    def version(self) -> int:
        """Number of the state it is in."""
        return len(self.states) - 1

    def since(self, moment: float) -> int:
        """The first state that was still there after ``moment``."""
        version = self.version
        while version and self.states[version - 1][1] > moment:
            version -= 1
        return version


class Histories(RuleBasedStateMachine):
    changes = st.tuples(st.sampled_from(CHANGES), st.integers(0, 255), st.integers(1, 1 << 20))
    meanwhiles = st.lists(st.tuples(st.integers(0, 8), changes, st.sampled_from(EVENTS)), min_size=1, max_size=3)
    """What happens in a listing: at which step, what changes in memory, and what else."""
    scripts = st.tuples(
        st.sampled_from(["tasks", "tasks", "group", "modules", "sockets"]),
        st.integers(1, 3),
        st.sets(st.sampled_from(["number", "word", "copy", "pointer", "name", "counter"]), min_size=1, max_size=3),
        st.booleans(),
    )
    """Which list, how many looks, what is read of each node, and whether backward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.memory = Memory(lambda: self.now)
        self.epoch = 0
        self.base = self.memory.address
        self.kernel = BufferKernel(self.memory, chunk=CHUNK)
        self.link = Connection(Agent(self.kernel.as_kernel()))
        self.plant()
        base = self.base
        # The list, where its head is, and which bytes of a node were asked for from the start.
        words = (Field((), LINK, 8), Field((), LINK + 8, 8))
        member = (Field((), MEMBER, 8), Field((), MEMBER + 8, 8))
        own = (Field((), 0, 8), Field((), 8, 8), Field((), 16, 16))
        lists = [
            KernelList("tasks", base + TASKS[0] + LINK, Step.RING_NODE, LINK, 0, NODE, (*words, Field((), 0, 4))),
            KernelList("group", base + GROUP_HEAD, Step.RING, MEMBER, 0, NODE, (*member, Field((), NODE - 16, 8))),
            KernelList("modules", base + MODULES_HEAD, Step.RING, 0, 0, 64, own),
            KernelList(
                "sockets",
                0,
                Step.NULLS,
                LINK,
                0,
                64,
                (Field((), LINK, 8), Field((), 0, 4)),
                stride=8,
                table=(base + TABLE - 16, base + TABLE - 8, 0),
            ),
        ]
        guest = PlantedGuest(self.link, lists, "batch", now=lambda: self.now, background=False)
        guest.remote._most = CHUNK
        assert isinstance(guest.reader, ReadAhead)
        self.reader = guest.reader
        self.vmi = Libvmi.over(guest)
        # What the oracle knows about the script.
        self.floor = 0
        """Nothing older is answered: the state at the last flush, fork, or end of a hold."""
        self.looked = {"tasks": 0, "group": 0, "modules": 0, "sockets": 0}
        """The state at the last look at each head."""
        self.reached: dict[str, set[int]] = {name: set() for name in self.looked}
        """Links that were answered since that look."""
        self.cursor = dict.fromkeys(self.looked, 0)
        self.node_walked = -1
        """The state when a listing began with the node that the head of tasks is in; the next look is part of it."""
        self.pointer_looked = -1
        """The state at the last look at the table's pointer, until its first chain is looked at."""
        self.said: dict[int, int] = {}
        """Within a hold, each byte that was answered."""
        self.holding = False
        self.companions: set[int] = set()
        """Counters that may have come with a walk."""
        self.slow: list[tuple[float, float]] = []
        """Reads in the middle of which time passed: when they ended, and how long they took."""
        self.trouble: list[tuple[int, str | Change]] = []
        """What happens in the next read: after how many requests, and what."""
        self.failed = False
        self.script: Script = ("tasks", 1, {"number"}, False)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def put(self, at: int, *values: int) -> None:
        self.memory.words(at, *values)

    def word(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self.memory.memory, at)[0])

    def plant(self) -> None:
        for number, node in enumerate(TASKS):
            self.memory.write(node, struct.pack("<2Q", 1000 + number, 0))
            self.put(node + POINTER, self.base + OBJECTS[number])
            self.memory.write(node + TEXT, b"name\0")
        self.tasks, self.modules = TASKS[:4], MODULES[:3]
        self.chains: dict[int, list[int]] = {2: SOCKETS[:2], 4: SOCKETS[2:3]}
        self.link_ring(TASKS[0] + LINK, [node + LINK for node in self.tasks[1:]])
        self.members = TASKS[1:3]
        self.link_ring(GROUP_HEAD, [node + MEMBER for node in self.members])
        self.link_ring(MODULES_HEAD, self.modules)
        self.put(TABLE - 16, self.base + TABLE, HEADS - 1)
        for number in range(HEADS):
            self.link_chain(number)
        self.memory.states = self.memory.states[-1:]

    def link_ring(self, head: int, links: list[int]) -> None:
        ring = [head, *links]
        for at, link in enumerate(ring):
            new = self.base + ring[(at + 1) % len(ring)], self.base + ring[at - 1]
            if (self.word(link), self.word(link + 8)) != new:
                self.put(link, *new)

    def link_chain(self, number: int) -> None:
        links = [TABLE + 8 * number, *(node + LINK for node in self.chains.get(number, ()))]
        for at, link in enumerate(links):
            end = number << 1 | 1 if at + 1 == len(links) else self.base + links[at + 1]
            if self.word(link) != end:
                self.put(link, end)

    def change(self, what: str, number: int, value: int) -> None:
        """Something happens in the kernel."""
        match what:
            case "all":  # so that whatever is answered from before shows
                self.epoch += 1
                for node in TASKS:
                    self.memory.memory[node : node + 16] = struct.pack(
                        "<2Q", self.epoch << 8 | node >> 7 & 255, self.epoch
                    )
                    self.memory.memory[node + TEXT : node + TEXT + 8] = b"name%03d\0" % (self.epoch % 1000)
                    struct.pack_into("<2Q", self.memory.memory, node + NODE - 16, self.epoch, self.epoch)
                for at in OBJECTS:
                    struct.pack_into("<3Q", self.memory.memory, at, *[self.epoch] * 3)
                for at in MODULES:
                    struct.pack_into("<3Q", self.memory.memory, at + 16, *[self.epoch] * 3)
                for at in (*COUNTERS, *range(ARRAY, ARRAY + 8 * ARRAY_WORDS, 8)):
                    struct.pack_into("<Q", self.memory.memory, at, self.epoch)
                self.memory.write(0, b"")
                self.change("task", number, value)
                self.change("member", number, value)
                self.change("module", number, value)
                self.change("socket", number, value)
            case "task":  # one is started, or ends
                node = TASKS[1:][number % (len(TASKS) - 1)]
                gone = node in self.tasks
                self.tasks = [each for each in self.tasks if each != node] if gone else [*self.tasks, node]
                self.link_ring(TASKS[0] + LINK, [each + LINK for each in self.tasks[1:]])
                if gone and value % 2:
                    self.put(node + LINK, POISON, POISON + 0x22)
            case "member":  # one is added last, or leaves
                node = TASKS[1:][number % (len(TASKS) - 1)]
                self.members = [each for each in self.members if each != node] + [node] * (node not in self.members)
                self.link_ring(GROUP_HEAD, [each + MEMBER for each in self.members])
            case "module":
                node = MODULES[number % len(MODULES)]
                gone = node in self.modules
                self.modules = [each for each in self.modules if each != node] if gone else [node, *self.modules]
                self.link_ring(MODULES_HEAD, self.modules)
            case "socket":
                used = {node for chain in self.chains.values() for node in chain}
                head, free = number % HEADS, [node for node in SOCKETS if node not in used]
                chain = self.chains.get(head, [])
                self.chains[head] = [free[0], *chain] if free and value % 2 else chain[1:]
                self.link_chain(head)
            case "pid":
                self.memory.write(TASKS[number % len(TASKS)], struct.pack("<I", 2000 + value))
            case "pointer":
                self.put(TASKS[number % len(TASKS)] + POINTER, self.base + OBJECTS[value % len(OBJECTS)])
            case "counter":
                self.put(COUNTERS[number % len(COUNTERS)], value)

    # ---- reads, and what may be answered -----------------------------------------------------------------------------

    def ask(self, at: int, count: int, elsewhere: bool = False) -> bytes | None:
        """What a script gets; None for an error, which must have a reason."""
        vmi, address, answers = self.vmi, (self.base + at) % (1 << 64), list[Any]()

        def read() -> None:
            try:
                match count:
                    case 2:
                        answers.append(vmi.read_16_va(address, 0).to_bytes(2, "little"))
                    case 4:
                        answers.append(vmi.read_32_va(address, 0).to_bytes(4, "little"))
                    case 8:
                        answers.append(vmi.read_addr_va(address, 0).to_bytes(8, "little"))
                    case _:
                        answers.append(vmi.read_va(address, 0, count)[0])
            except LibvmiError as error:
                answers.append(error)

        self.run(read, elsewhere, TASKS[0] <= at < TASKS[0] + NODE)
        (answer,) = answers
        if isinstance(answer, LinkError):
            assert self.failed, f"nothing was wrong with the agent: {answer}"
            return None
        mapped = at >= 0 and at + count <= ROOM
        if isinstance(answer, LibvmiError):
            assert not mapped, f"{address:#x} can be read: {answer}"
            return None
        assert mapped, f"{address:#x} can't be read, and {answer!r} was answered"
        assert isinstance(answer, bytes)
        assert len(answer) == count
        return answer

    def run(self, read: Callable[[], None], elsewhere: bool, within_head_node: bool) -> None:
        """Read, with what is to happen meanwhile."""
        trouble, self.trouble, self.failed = self.trouble, [], False
        version = self.memory.version
        first, begun, restarts = len(self.link.requests), self.now, list[int]()

        def before(number: int) -> None:
            while trouble and number - first > trouble[0][0]:
                what = trouble.pop(0)[1]
                if what == "time":
                    self.now += 0.3
                    self.reader.expire()
                elif what == "restart" and self.link.requests[-1] == More.KIND:
                    self.link.agent = Agent(self.kernel.as_kernel())
                    restarts.append(number)
                    self.failed = len(restarts) > 1  # after the first the walk is begun again
                elif what == "fail":
                    self.failed = True
                    raise LinkError("no answer")
                elif isinstance(what, tuple):
                    self.change(*what)

        self.link.before = before
        if elsewhere:
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
        else:
            read()
        self.link.before = lambda number: None
        self.memory.reads_until_change = 0
        if self.now > begun:
            self.slow.append((self.now, self.now - begun))
        if Walk.KIND in self.link.requests[first:]:
            self.companions.update(COUNTERS)
            if within_head_node:
                self.node_walked = version

    def check(self, at: int, data: bytes | None, since: int, begun: float) -> None:
        """Each byte is what memory held at some time since that state, and not too long ago.

        :param begun: when the read began
        """
        if data is None:
            return
        if self.holding:
            again = {at + i: byte for i, byte in enumerate(data) if self.said.setdefault(at + i, byte) != byte}
            assert not again, f"within a hold {again} were answered before as {[self.said[each] for each in again]}"
            oldest = self.floor
        else:
            took = max((took for end, took in self.slow if end > begun - 2 * STALE), default=0.0)
            oldest = max(since, self.floor, self.memory.since(begun - STALE - took))
        states = [state for state, _ in self.memory.states[oldest:]]
        for i, byte in enumerate(data):
            assert any(state[at + i] == byte for state in states), (
                f"offset {at + i:#x} was {byte:#x} in no state since {oldest} (now {self.memory.version})"
            )

    def look(self, name: str, at: int, count: int, elsewhere: bool) -> bytes | None:
        before, begun = self.memory.version, self.now
        if name == "tasks" and self.node_walked >= 0:
            before = self.node_walked
        data = self.ask(at, count, elsewhere)
        self.check(at, data, before, begun)
        self.looked[name], self.reached[name], self.cursor[name] = before, set(), 0
        if name == "tasks":
            self.node_walked = -1
        return data

    def reach(self, name: str, value: int, head: int) -> None:
        """A link was answered."""
        at = value - self.base
        self.cursor[name] = 0 if at == head or value & 1 else at
        if self.cursor[name]:
            self.reached[name].add(at)

    def since(self, name: str, link: int) -> int:
        """A node that was reached is of the last look at its list's head, or younger."""
        return self.looked[name] if link in self.reached[name] else 0

    # ---- what a script does ------------------------------------------------------------------------------------------

    def look_at_tasks(self, how: str, elsewhere: bool) -> None:
        head = TASKS[0] + LINK
        at, count = {"next": (head, 8), "prev": (head + 8, 8), "both": (head, 16), "copy": (TASKS[0], NODE)}[how]
        data = self.look("tasks", at, count, elsewhere)
        if data is not None:
            links = struct.unpack_from("<2Q", data, LINK if how == "copy" else 0) if len(data) > 8 else (data,)
            for link in reversed(links):
                self.reach("tasks", link if isinstance(link, int) else int.from_bytes(link, "little"), head)

    def go_on_along_tasks(self, back: bool, wide: bool) -> None:
        self.go_on("tasks", TASKS[0] + LINK, 8 if back and not wide else 0, 16 if wide else 8)

    def look_at_modules(self, how: str, elsewhere: bool) -> None:
        at, count = {"next": (0, 8), "prev": (8, 8), "both": (0, 16)}[how]
        data = self.look("modules", MODULES_HEAD + at, count, elsewhere)
        if data is not None:
            self.reach("modules", int.from_bytes(data[:8], "little"), MODULES_HEAD)

    def go_on_along_modules(self, wide: bool) -> None:
        self.go_on("modules", MODULES_HEAD, 0, 16 if wide else 8)

    def look_at_the_group(self, how: str, elsewhere: bool) -> None:
        at, count = {"next": (0, 8), "both": (0, 16)}[how]
        data = self.look("group", GROUP_HEAD + at, count, elsewhere)
        if data is not None:
            self.reach("group", int.from_bytes(data[:8], "little"), GROUP_HEAD)

    def go_on_along_the_group(self, wide: bool) -> None:
        self.go_on("group", GROUP_HEAD, 0, 16 if wide else 8)

    def go_on(self, name: str, head: int, offset: int, count: int) -> None:
        link = self.cursor[name]
        if not link:
            return
        begun, since = self.now, self.since(name, link)
        data = self.ask(link + offset, count)
        self.check(link + offset, data, since, begun)
        if data is None:
            self.cursor[name] = 0
        else:
            self.reach(name, int.from_bytes(data[:8], "little"), head)

    def look_at_the_table(self, elsewhere: bool) -> None:
        before = self.memory.version
        self.look("sockets", TABLE - 16, 8, elsewhere)
        self.pointer_looked = before

    def look_into_the_table(self, number: int) -> None:
        at, before, begun = TABLE + 8 * number, self.memory.version, self.now
        since = self.looked["sockets"]
        if number == 0 and self.pointer_looked < 0:
            since = before  # a look by itself
        data = self.ask(at, 8)
        self.check(at, data, since, begun)
        if number == 0:
            if self.pointer_looked < 0:
                self.looked["sockets"], self.reached["sockets"] = before, set()
            self.pointer_looked = -1
        self.cursor["sockets"] = 0
        if data is not None:
            self.reach("sockets", int.from_bytes(data, "little"), 0)

    def go_on_along_a_chain(self) -> None:
        self.go_on("sockets", 0, 0, 8)

    def read_of_a_task(self, number: int, field: tuple[int, int]) -> None:
        """Its number, which always comes along; or a word that is learned, or all of it."""
        node = TASKS[number]
        if number == 0 and field[1] == NODE:
            return  # a look
        offset, count = field
        begun, data = self.now, self.ask(node + offset, count)
        self.check(node + offset, data, self.since("tasks", node + LINK) if field == (0, 4) else 0, begun)

    def read_of_a_member(self, number: int, whole: bool) -> None:
        """A word, which always comes along, or all of it, of which at least the link is of this listing."""
        node, begun, since = TASKS[number], self.now, self.since("group", TASKS[number] + MEMBER)
        at, count = (node, NODE) if whole else (node + NODE - 16, 8)
        data = self.ask(at, count)
        self.check(at, data, 0 if whole else since, begun)
        if data is not None and whole:
            self.check(node + MEMBER, data[MEMBER : MEMBER + 16], since, begun)

    def read_through_a_pointer(self, number: int, offset: int, count: int) -> None:
        begun, pointer = self.now, self.ask(TASKS[number] + POINTER, 8)
        self.check(TASKS[number] + POINTER, pointer, 0, begun)
        if pointer is not None:
            at = int.from_bytes(pointer, "little") - self.base + offset
            begun, data = self.now, self.ask(at, count)
            self.check(at, data, 0, begun)

    def read_a_name(self, number: int) -> None:
        at, begun, answers = TASKS[number] + TEXT, self.now, list[str | LibvmiError]()

        def read() -> None:
            try:
                answers.append(self.vmi.read_str_va(self.base + at, 0))
            except LibvmiError as error:
                answers.append(error)

        self.run(read, False, number == 0)
        (answer,) = answers
        if isinstance(answer, str):
            self.check(at, answer.encode() + b"\0", 0, begun)
        else:
            assert self.failed, f"nothing was wrong with the agent: {answer}"

    def read_of_a_module(self, number: int, field: tuple[int, int]) -> None:
        node, (offset, count) = MODULES[number], field
        begun, data = self.now, self.ask(node + offset, count)
        self.check(node + offset, data, self.since("modules", node) if offset == 16 else 0, begun)

    def read_a_counter(self, number: int) -> None:
        """It is as of now, unless it came with a listing a moment ago."""
        at, before, begun = COUNTERS[number], self.memory.version, self.now
        since = before
        if at in self.companions:
            took = max((took for end, took in self.slow if end > begun - 2 * STALE), default=0.0)
            since = self.memory.since(begun - COMPANION_STALE - took)
        data = self.ask(at, 8)
        self.companions.discard(at)
        self.check(at, data, since, begun)

    def read_an_array(self, first: int, count: int, width: int) -> None:
        for at in range(ARRAY + 8 * first, ARRAY + 8 * first + width * count, width):
            begun, data = self.now, self.ask(at, width)
            self.check(at, data, 0, begun)

    def read_over_the_end(self, count: int) -> None:
        self.ask(ROOM - count + 1, count)

    @rule(number=st.integers(0, 5), reads=st.lists(st.sampled_from(SINGLE), min_size=1, max_size=5), back=st.booleans())
    def some_reads(self, number: int, reads: list[str], back: bool) -> None:
        """One after the other, of the same task and so on."""
        for read in reads:
            match read:
                case "tasks":
                    self.look_at_tasks("copy" if number == 5 else "both" if back else "next", number == 4)
                case "modules":
                    self.look_at_modules("both" if back else "next", number == 4)
                case "table":
                    self.look_at_the_table(number == 4)
                case "bucket":
                    self.look_into_the_table(number)
                case "task":
                    self.read_of_a_task(number, (0, NODE) if back else (0, 4))
                case "word":
                    self.read_of_a_task(number, (NODE - 16, 2 if back else 8))
                case "pointer":
                    self.read_through_a_pointer(number, 8, 16 if back else 4)
                case "name":
                    self.read_a_name(number)
                case "module":
                    self.read_of_a_module(number % 5, (16, 8) if back else (16, 16))
                case "counter":
                    self.read_a_counter(number % len(COUNTERS))
                case "array":
                    self.read_an_array(32 * number, 6, 4 if back else 8)
                case "end":
                    self.read_over_the_end(8 << number)
                case "on":
                    self.go_on_along_tasks(back, number == 5)
                case "group":
                    self.look_at_the_group("both" if back else "next", number == 4)
                case "on group":
                    self.go_on_along_the_group(back)

    @rule(script=scripts, meanwhile=meanwhiles)
    def a_listing(self, script: Script, meanwhile: Meanwhile) -> None:
        self.script = script
        self.lists(script, meanwhile)

    @rule(meanwhile=meanwhiles)
    def the_same_listing_again(self, meanwhile: Meanwhile) -> None:
        self.lists(self.script, meanwhile)

    @rule(meanwhile=meanwhiles)
    def and_again(self, meanwhile: Meanwhile) -> None:
        self.lists(self.script, meanwhile)

    @rule(change=changes, what=st.sampled_from(["member", "member", "all"]), whole=st.booleans())
    def two_lists_that_share_nodes(self, change: Change, what: str, whole: bool) -> None:
        """One is read, whole or its head alone; something changes; the other is read."""
        for _ in range(3 if whole else 0):  # until the copies come with the walk
            self.lists(("tasks", 1, {"copy"}, False), [])
        if not whole:
            self.look_at_tasks("next", False)
        self.change(what, *change[1:])
        self.lists(("group", 1, {"copy" if whole else "number"}, False), [])

    def lists(self, script: Script, meanwhile: Meanwhile) -> None:
        """A whole list: so many looks at its head, then node by node, while memory changes and time passes."""
        name, looks, reads, back = script

        def step(number: int) -> None:
            for when, change, event in meanwhile:
                if when == number:
                    self.change(*change)
                    self.something_else_happens(event)

        for number in range(looks):
            step(number)
            match name:
                case "tasks":
                    self.look_at_tasks("prev" if back else "next", False)
                case "group":
                    self.look_at_the_group("next", False)
                case "modules":
                    self.look_at_modules("next", False)
                case _:
                    self.look_at_the_table(False)
        for number in range(looks, looks + 14):
            step(number)
            if name == "sockets":
                if not self.cursor[name] and number - looks < HEADS:
                    self.look_into_the_table(number - looks)
                self.go_on_along_a_chain()
                continue
            if not self.cursor[name]:
                break
            node = self.cursor[name]
            if name == "tasks" and node - LINK in TASKS:
                index = TASKS.index(node - LINK)
                for read, field in (("number", (0, 4)), ("word", (NODE - 16, 8)), ("copy", (0, NODE))):
                    if read in reads:
                        self.read_of_a_task(index, field)
                if "pointer" in reads:
                    self.read_through_a_pointer(index, 8, 8)
                if "name" in reads:
                    self.read_a_name(index)
            elif name == "group" and node - MEMBER in TASKS:
                self.read_of_a_member(TASKS.index(node - MEMBER), "copy" in reads)
            elif name == "modules" and node in MODULES:
                self.read_of_a_module(MODULES.index(node), (16, 16) if "copy" in reads else (32, 8))
            if name == "tasks":
                self.go_on_along_tasks(back, False)
            elif name == "group":
                self.go_on_along_the_group("copy" in reads)
            else:
                self.go_on_along_modules(False)
        for _ in range(2 if "counter" in reads else 0):
            self.read_a_counter(0)
            self.change("counter", 0, self.memory.version)

    # ---- what else happens ------------------------------------------------------------------------------------------

    @rule(change=changes)
    def memory_changes(self, change: Change) -> None:
        self.change(*change)

    @rule(requests=st.integers(0, 3), what=st.sampled_from(TROUBLE), change=changes)
    def something_will_happen(self, requests: int, what: str, change: Change) -> None:
        """In the next read, before or in the middle of one of its requests."""
        if what == "reads":
            self.memory.reads_until_change = 1 + change[1] % 30
            self.memory.change = lambda: self.change(*change)
        else:
            self.trouble.append((requests, change if what == "change" else what))
            self.trouble.sort(key=lambda each: each[0])

    @rule(what=st.sampled_from(EVENTS))
    def something_else_happens(self, what: str) -> None:
        match what:
            case "pause" if self.holding:
                self.vmi.resume_vm()
                self.begin_again()
                self.holding = False
            case "pause":
                self.vmi.pause_vm()
                self.begin_again()
                self.holding = True
            case "flush" if not self.holding:
                self.vmi.pagecache_flush()
                self.begin_again()
            case "fork":  # as a child finds it
                self.reader.after_fork()
                if not self.holding:
                    self.begin_again()
            case "restart":
                self.link.agent = Agent(self.kernel.as_kernel())
            case "half a second":
                self.pass_time(STALE / 2)
            case "a second":
                self.pass_time(STALE)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.reader.expire()

    def begin_again(self) -> None:
        """Nothing that was known is answered from now on."""
        self.floor = self.memory.version
        self.reached = {name: set() for name in self.reached}
        self.companions.clear()
        self.node_walked = -1
        self.pointer_looked = -1
        self.said = {}


TestHistories = Histories.TestCase
# As many as the profile says, and the same ones each time, except in `make histories`. Without shrinking, which
# takes minutes: a history reads well enough as it is.
TestHistories.settings = settings(
    stateful_step_count=40,
    deadline=None,
    derandomize=settings().max_examples <= 100,
    phases=[Phase.reuse, Phase.generate],
)
