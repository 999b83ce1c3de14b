"""Lists that drgn's helpers begin with, brought by plan: one walk in the guest brings all nodes of a list, whose pages
would be fetched one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from vmishim.guests.target import Agent
from vmishim.kernel.profile import Profile
from vmishim.kernel.types import Types
from vmishim.memory.pagecache import PageCache
from vmishim.memory.reader import ADDRESSES, Extent
from vmishim.wire.plan import RECORD_MAX, TAKE_MAX, Kind, Load, Op, Plan, Step, Take, Text

NODES_MAX = 4096
"""Nodes of one list that are brought together, 32 MiB at most; the rest is fetched by pages."""


TEXT_MAX = 64
"""Bytes of a string that are brought; the rest is fetched with its page."""


@dataclass(frozen=True)
class List:
    """A list that comes as a whole.

    :ivar symbol: the kernel symbol of its head
    :ivar struct: type of a node
    :ivar link: the member that links it
    :ivar heads: (symbol, type) of what is read first by a helper that is about to follow it
    :ivar until: the member before which the brought part of a node ends; empty for all of the node
    :ivar behind: (member, type): pointers of a node, and what they point to
    :ivar texts: pointers of a node to strings
    :ivar in_node: the symbol is a node itself
    """

    symbol: str
    struct: str
    link: str
    heads: tuple[tuple[str, str], ...]
    until: str = ""
    behind: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()
    in_node: bool = False


LISTS = (
    # The processor's state at a task's end is most of it, and helpers do not read it.
    List(
        "init_task",
        "task_struct",
        "tasks",
        (("init_task", "task_struct"), ("init_pid_ns", "pid_namespace")),
        "thread",
        (("thread_pid", "pid"),),
        in_node=True,
    ),
    List("modules", "module", "list", (("modules", "list_head"),)),
    List("slab_caches", "kmem_cache", "list", (("slab_caches", "list_head"),), texts=("name",)),
)


def register_plans(cache: PageCache, agent: Agent, profile: Profile, types: Types) -> None:
    """Have the lists of this kernel brought when a helper begins with one."""
    for each in LISTS:
        with suppress(KeyError):
            plan = plan_of(each, profile.symbol(each.symbol), types)
            bring = partial(fetch, agent, plan)
            for symbol, struct in each.heads:
                cache.plan(profile.symbol(symbol), types.size(struct), bring)


def plan_of(of: List, address: int, types: Types) -> Plan:
    """The plan that brings a list.

    :param address: of its symbol
    :raises KeyError: this kernel has no such structure or member
    """
    size = types.member(of.struct, of.until).offset if of.until else types.size(of.struct)
    ops: list[Op] = list(_takes(0, size))
    for register, (member, struct) in enumerate(of.behind, 1):
        ops += [Load(register, 0, types.member(of.struct, member).offset), *_takes(register, types.size(struct))]
    for register, member in enumerate(of.texts, 1 + len(of.behind)):
        ops += [Load(register, 0, types.member(of.struct, member).offset), Text(register, 0, TEXT_MAX)]
    link = types.member(of.struct, of.link).offset
    step, start = (Step.RING_NODE, address + link) if of.in_node else (Step.RING, address)
    return Plan(start, step, tuple(ops), link=link, max_nodes=NODES_MAX)


def fetch(agent: Agent, plan: Plan) -> Iterator[Extent]:
    """The memory that a plan brings. :raises LinkError: the guest could not be asked"""
    for chunk in agent.walk(plan):
        if any(chunk.head):
            yield Extent(plan.start, b"".join(word.to_bytes(8, "little") for word in chunk.head))
        for node, faults, _, kind, *slots in plan.records(chunk.bulk):
            if kind == Kind.NODE:
                yield from _extents(plan.ops, node, faults, slots)


def _extents(ops: Sequence[Op], node: int, faults: int, slots: Sequence[int | bytes]) -> Iterator[Extent]:
    """What was collected of a node, without the pointers, which are part of what was taken whole."""
    registers = {0: node}
    for number, (op, slot) in enumerate(zip(ops, slots, strict=True)):
        if faults >> number & 1 or op.src not in registers:
            continue
        if isinstance(op, Load):
            assert isinstance(slot, int)
            registers[op.dst] = slot & ~op.tags
            continue
        data = slot.to_bytes(8, "little") if isinstance(slot, int) else slot
        yield Extent((registers[op.src] + op.offset) % ADDRESSES, _text(data) if isinstance(op, Text) else data)


def _takes(register: int, size: int) -> Iterator[Take]:
    for at in range(0, min(size, RECORD_MAX // 2), TAKE_MAX):
        yield Take(register, at, min(size - at, TAKE_MAX))


def _text(slot: bytes) -> bytes:
    """What of a string's slot is memory: up to its NUL. Of a string that is cut off the slot's last byte is not."""
    end = slot.find(b"\0")
    return slot[: end + 1] if 0 <= end < len(slot) - 1 else slot[:-1]
