"""A kernel that is a byte buffer: what the agent asks of `guest_agent.kernel.Kernel`, without root and without eBPF.

The walk below says in Python what ``bpf/memory.bpf.c`` says in C. ``tests/local/test_walks.py`` runs the same plans
over the same memory on both and compares the answers, so what a test finds here it would find on a kernel.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from guest_agent.kernel import Gathered, Kernel
from lab.planter import Planter
from vmishim.memory.reader import ADDRESSES
from vmishim.wire.plan import STEPS_MAX, Kind, Load, Plan, Step, Text

ADDRESS, SIZE = 0xFFFF_C900_0000_0000, 1 << 20
"""Where a buffer is placed by default, in the kernel's vmalloc area, and its bytes."""
CHUNK = 1 << 20
"""Bytes of records that one run hands out: ``OUT_SIZE`` of ``bpf/plan.h``."""
PAGE = 4096
_ALL_FAULTS = ADDRESSES - 1
_FRAME = 0x000F_FFFF_FFFF_F000


class Buffer(Planter):
    """Kernel memory at ``address``, ``size`` bytes of it, zero at first. Nothing around it is mapped.

    :ivar written: called after each write, with the offset and the bytes
    """

    def __init__(self, address: int = ADDRESS, size: int = SIZE) -> None:
        self.address, self.size = address, size
        self.memory = bytearray(size)
        self.written: Callable[[int, bytes], None] = lambda at, data: None

    def write(self, at: int, data: bytes) -> None:
        """Put ``data`` at ``address + at``."""
        self.memory[at : at + len(data)] = data
        self.written(at, data)

    def read(self, address: int, count: int) -> bytes | None:
        """Exactly ``count`` bytes, or None where one of them is not mapped: ``bpf_probe_read_kernel``."""
        at = address % ADDRESSES - self.address
        return bytes(self.memory[at : at + count]) if at >= 0 and at + count <= self.size else None

    def text(self, address: int, count: int) -> bytes | None:
        """Bytes up to and with the first NUL; the last of ``count`` becomes one: ``bpf_probe_read_kernel_str``."""
        at = address % ADDRESSES - self.address
        if not 0 <= at < self.size:
            return None
        found = bytes(self.memory[at : at + count])
        if 0 in found:
            return found[: found.index(0) + 1]
        return found[:-1] + b"\0" if len(found) == count else None


@dataclass
class Walk:
    """A walk under way: the fields of ``struct walk`` (``bpf/plan.h``) that outlive a step."""

    plan: Plan
    heads: tuple[int, ...]
    index: int = 0
    """Number of the head under way."""
    head: int = 0
    """Its address."""
    link: int = 0
    """The link to visit next; 0: take a new head."""
    first: int = 0
    """The first link of the chain under way."""
    before: int = 0
    """The link visited last."""
    nodes: int = 0
    faulted: int = 0
    fault_at: int = 0
    cycles: int = 0
    cycle_at: int = 0
    torn: int = 0
    hare: int = 0
    power: int = 1
    tortoise: int = 0
    head_link: tuple[int, int] = (0, 0)
    """What the ring's head held."""
    records: list[bytes] = field(default_factory=list)
    """Of the chunk under way."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"plan": self.plan.to_json(), "records": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, plan=Plan.from_json(state["plan"]))

    @property
    def ring(self) -> bool:
        return self.plan.step in (Step.RING, Step.RING_NODE)

    def run(self, memory: Buffer, room: int) -> str:
        """Go on until the walk is ``"done"``, was ``"truncated"``, or has no room for one ``"more"`` record."""
        self.records = []
        for _ in range(STEPS_MAX):
            if (len(self.records) + 1) * self.plan.record.size > room:
                return "more"
            if self.link:
                if self.nodes >= self.plan.max_nodes:
                    return "truncated"
                self.visit(memory)
            elif self.index < self.plan.heads:
                self.take_head(memory)
            else:
                return "done"
        return "more"

    # ---- heads -----------------------------------------------------------------------------------------------------

    def take_head(self, memory: Buffer) -> None:
        """Begin the chain of the next head, if it has nodes."""
        plan = self.plan
        self.head = (plan.start + self.index * plan.stride) % ADDRESSES if plan.stride else self.heads[self.index]
        if plan.step in (Step.SELF, Step.RING_NODE):
            self.begin(self.head)
            if not self.head:
                self.index += 1
            return
        pair = self.pair(memory, self.head, plan.step == Step.RING)
        if plan.step == Step.RING:
            self.head_link = pair or (0, 0)
        if pair is None:
            self.fault(self.head)
            self.no_node(self.head, Kind.FAULT)
            self.index += 1
            return
        value = pair[plan.next // 8]
        if value == {Step.RING: self.head, Step.NULLS: self.nulls}.get(plan.step, 0):  # empty, as it should be
            self.index += 1
            return
        self.begin((value + plan.bias) % ADDRESSES)
        if not value or not self.link or (plan.step == Step.NULLS and value & 1):  # empty in another way
            if plan.step == Step.RING or (value and not self.link):
                self.fault(0)
            self.no_node(value, Kind.HEAD)
            self.end()

    @property
    def nulls(self) -> int:
        """What ends the chain under way, of an ``hlist_nulls`` table."""
        return (self.plan.nulls + self.index) << 1 | 1

    def begin(self, link: int) -> None:
        self.link = self.first = link
        self.before = self.head
        self.hare, self.power, self.tortoise = 0, 1, 0

    def end(self) -> None:
        self.link = 0
        self.index += 1

    # ---- nodes -----------------------------------------------------------------------------------------------------

    def visit(self, memory: Buffer) -> None:
        """Collect the node whose link is next, and step on."""
        plan, link = self.plan, self.link
        node = (link - plan.link) % ADDRESSES
        if plan.step in (Step.SELF, Step.ONCE):
            self.collect(memory, node)
            self.end()
            return
        pair = self.pair(memory, link, self.ring)
        if pair is None:
            self.fault(link)
            self.end()
            return
        if self.ring and link == self.head:
            self.head_link = pair
        elif self.ring and pair[1 - plan.next // 8] != self.before:
            self.torn += 1
        self.collect(memory, node)
        self.before = link
        if link == self.tortoise:
            self.cycle(link)
            return
        self.hare += 1
        if self.hare == self.power:  # Brent's algorithm
            self.tortoise, self.power, self.hare = link, self.power * 2, 0
        self.step_on(pair[plan.next // 8])

    def step_on(self, value: int) -> None:
        """``value`` is the pointer that leads on from the node under way."""
        plan = self.plan
        if self.ring and value == self.head:
            self.end()
        elif plan.step == Step.NULLS and value & 1:
            self.torn += value != self.nulls
            self.end()
        elif not value:
            if self.ring:
                self.fault(0)
            self.end()
        else:
            link = (value + plan.bias) % ADDRESSES
            if link == self.first:
                # A chain may turn out to be a ring that its head is part of.
                if self.head in (self.link, self.first):
                    self.end()
                else:
                    self.cycle(link)
            elif not link:
                self.fault(0)
                self.end()
            else:
                self.link = link

    @staticmethod
    def pair(memory: Buffer, address: int, both: bool) -> tuple[int, int] | None:
        """The two pointers of a ``list_head``, or the one of another list (twice)."""
        found = memory.read(address, 16 if both else 8)
        if found is None:
            return None
        return cast(tuple[int, int], struct.unpack("<2Q", found if both else found * 2))

    def fault(self, address: int) -> None:
        self.fault_at = self.fault_at if self.faulted else address
        self.faulted += 1

    def cycle(self, link: int) -> None:
        self.cycle_at = self.cycle_at if self.cycles else link
        self.cycles += 1
        self.end()

    # ---- records ---------------------------------------------------------------------------------------------------

    def collect(self, memory: Buffer, node: int) -> None:
        """Write the record of a node."""
        registers, slots, faults = {0: node}, [], 0
        for number, op in enumerate(self.plan.ops):
            base = registers[op.src]
            size = 8 if isinstance(op, Load) else op.size
            read = memory.text if isinstance(op, Text) else memory.read
            found = read(base + op.offset, size) if base else None
            if found is None:
                faults |= 1 << number
            slots.append((found or b"").ljust(size, b"\0"))
            if isinstance(op, Load):
                registers[op.dst] = int.from_bytes(slots[-1], "little") & ~op.tags
        self.write(node, faults, Kind.NODE, b"".join(slots))
        self.nodes += 1

    def no_node(self, value: int, kind: Kind) -> None:
        """Write the record of a head that holds no node."""
        self.write(value, _ALL_FAULTS, kind, bytes(self.plan.record.size - 24))

    def write(self, node: int, faults: int, kind: Kind, slots: bytes) -> None:
        self.records.append(struct.pack("<QQII", node, faults, self.index % (1 << 32), kind) + slots)


class BufferKernel:
    """What the agent asks of a kernel, answered from a buffer.

    :param memory: all there is of kernel memory
    :param symbols: names and addresses
    :param members: ``"struct member"`` or ``"struct"`` -> [offset, size]
    :ivar pointees: what words of structures point to: ``"struct offset"`` or ``"#type offset"`` -> [type, size]
    :param chunk: bytes of records that one run hands out
    """

    def __init__(
        self,
        memory: Buffer,
        symbols: Mapping[str, int] | None = None,
        members: Mapping[str, list[int]] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.memory = memory
        self.symbols, self.members = dict(symbols or {}), dict(members or {})
        self.chunk = chunk
        self.pointees: dict[str, list[int]] = {}
        self.levels, self.page_offset, self.encrypted = 4, 0, 0

    def as_kernel(self) -> Kernel:
        """The same, for `guest_agent.agent.Agent`."""
        return cast(Kernel, self)

    def symbol(self, name: str) -> int | None:
        return self.symbols.get(name)

    def symbol_at(self, address: int) -> str | None:
        return next((name for name, at in self.symbols.items() if at == address), None)

    def member(self, name: str) -> list[int] | None:
        return self.members.get(name)

    def pointee(self, question: str) -> list[int] | None:
        return self.pointees.get(question)

    def changed(self) -> list[str]:
        return []

    def facts(self) -> dict[str, Any]:
        return {
            "release": "0.0.0-buffer",
            "hostname": "buffer",
            "boot_id": "00000000-0000-0000-0000-000000000000",
            "page_offset": self.page_offset,
            "kaslr_offset": 0,
            "memory_size": self.memory.size,
            "vcpus": 1,
            "levels": self.levels,
        }

    def read(self, address: int, count: int, dtb: int = 0) -> bytes:
        """See `Kernel.read`: page by page, up to the first that is not there."""
        parts: list[bytes] = []
        end = address + min(count, CHUNK)
        while address < end:
            size = min(PAGE - address % PAGE, end - address)
            at = address
            if dtb:
                physical, page_size, _ = self.lookup(dtb, address)
                if not page_size:
                    break
                at = self.page_offset + physical
            part = self.memory.read(at, size)
            if part is None:
                break
            parts.append(part)
            address += size
        return b"".join(parts)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """See `Kernel.lookup`: Intel SDM vol. 3, 4.5."""
        entries = [0] * self.levels
        physical = dtb & _FRAME & ~self.encrypted
        for number, level in enumerate(reversed(range(self.levels))):
            shift = 12 + 9 * level
            found = self.memory.read(self.page_offset + physical + (address >> shift & 511) * 8, 8)
            if found is None:
                break
            entry = entries[number] = int.from_bytes(found, "little")
            if not entry & 1:
                break
            physical = entry & _FRAME & ~self.encrypted
            if level == 0 or (level <= 2 and entry & 1 << 7):
                size = 1 << shift
                return physical & ~(size - 1) | address & size - 1, size, entries
        return physical, 0, entries

    def walk(self, plan: Plan, heads: bytes = b"", state: bytes | None = None) -> Gathered:
        """See `Kernel.walk`."""
        walk: Walk = pickle.loads(state) if state else Walk(plan, struct.unpack(f"<{len(heads) // 8}Q", heads))
        how = walk.run(self.memory, self.chunk)
        return Gathered(
            records=b"".join(walk.records),
            more=pickle.dumps(walk) if how == "more" else None,
            truncated=how == "truncated",
            faulted=walk.faulted,
            fault_at=walk.fault_at,
            cycles=walk.cycles,
            cycle_at=walk.cycle_at,
            torn=walk.torn,
            head=walk.head_link,
        )

    def close(self) -> None:
        """There is nothing to unload."""
