"""Gather plans: what to walk in the guest kernel, and what to bring along, as a value.

A plan says where a walk begins, how it steps from node to node (`Step`), and which memory of each node, and of what the
node points to, comes along (`Load`, `Take`, `Text`). One eBPF interpreter (``bpf/memory.bpf.c``) carries out any plan;
what it writes are records (`Plan.records`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

OPS_MAX = 48
"""Operations a plan may hold."""
REGISTERS = 16
"""Pointers a plan may follow from one node, the node itself being register 0."""
TAKE_MAX = 4096
"""Bytes one `Take` or `Text` may copy."""
RECORD_MAX = 16384
"""Bytes a plan may collect of one node."""
HEADS_MAX = 1 << 16
"""Heads that may be listed one by one."""
STEPS_MAX = 1 << 23
"""Steps of one run of a walk, each to a head or a node (``bpf_loop``'s own limit)."""
WALK_NODES_MAX = 1 << 24
"""Nodes one walk may visit."""
_BLOCK = 64
"""Records that are unpacked in one go."""


class Step(IntEnum):
    """How a walk gets from a head to its nodes. The numbers are ``enum step`` of ``bpf/plan.h``."""

    SELF = 0
    """The head's address is the node."""
    ONCE = 1
    """The head holds a pointer to the one node."""
    CHAIN = 2
    """``hlist_head``: ends in NULL."""
    NULLS = 3
    """``hlist_nulls_head``: ends in an odd value that names its chain."""
    RING = 4
    """``list_head`` that stands alone."""
    RING_NODE = 5
    """``list_head`` that sits in a node of its own, as ``init_task.tasks`` does; that node is collected too."""


class Kind(IntEnum):
    """What a record is about: ``enum record_kind`` of ``bpf/plan.h``."""

    NODE = 0
    HEAD = 1
    """No node: a head that is empty in another way than its number says; ``node`` is what it holds."""
    FAULT = 2
    """No node: a head that cannot be read."""


class Load(NamedTuple):
    """Follow a pointer: ``register[dst] = *(u64 *)(register[src] + offset) & ~tags``. What was read is collected, tags
    and all."""

    dst: int
    src: int
    offset: int
    tags: int = 0
    """Bits of the value that are no part of the pointer, as in a maple tree's."""


class Take(NamedTuple):
    """Copy ``size`` bytes at ``register[src] + offset``."""

    src: int
    offset: int
    size: int


class Text(NamedTuple):
    """Copy at most ``size`` bytes at ``register[src] + offset``, up to and including the first NUL."""

    src: int
    offset: int
    size: int


Op = Load | Take | Text


_C_PLAN, _C_OP = struct.Struct("<5QiIIIIi"), struct.Struct("<BBBxiII")


class PlanError(ValueError):
    """A plan that cannot be run; the text names the part and the limit. Raised before anything runs."""


@dataclass(frozen=True)
class Plan:
    """What to walk and what to collect.

    :ivar start: address of the only head, or of the first of a table; 0 when the heads are listed beside the plan
    :ivar heads: how many heads
    :ivar stride: bytes from one head to the next; 0 when they are listed beside the plan
    :ivar step: how to get from a head to its nodes
    :ivar link: offset of the ``list_head`` (``hlist_node``, ...) in a node, bytes
    :ivar next: 0 to follow ``next``, 8 to follow ``prev``
    :ivar bias: bytes from where a pointer points to the link of the node it means; 0 for ``list_head`` and its kin
    :ivar nulls: for ``Step.NULLS``, the number that ends chain 0
    :ivar max_nodes: stop there and say so
    :ivar ops: what to collect of each node, in order; register 0 is the node
    :raises PlanError: a value is out of its bounds
    """

    start: int
    step: Step
    ops: tuple[Op, ...]
    heads: int = 1
    stride: int = 8
    link: int = 0
    next: int = 0
    bias: int = 0
    nulls: int = 0
    max_nodes: int = WALK_NODES_MAX
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Where each operation's slot is in a record, bytes."""
    record: struct.Struct = field(init=False, repr=False, compare=False)
    """A record: node, faults, head number, kind, then the slot of each operation."""
    kinds: tuple[type[Op], ...] = field(init=False, repr=False)
    """Of the operations: tuples alone would make a `Take` equal to a `Text` of the same numbers, and so their plans."""

    def __post_init__(self) -> None:
        _bounded("start", self.start, 0, 2**64 - 1)
        _bounded("heads", self.heads, 1, 2**32 if self.stride else HEADS_MAX)
        _bounded("stride", self.stride, 0, 1 << 20)
        _bounded("link", self.link, -(1 << 20), 1 << 20)
        _bounded("bias", self.bias, -(1 << 20), 1 << 20)
        _bounded("nulls", self.nulls, 0, 2**62)
        _bounded("max_nodes", self.max_nodes, 1, WALK_NODES_MAX)
        if self.next not in (0, 8):
            raise PlanError(f"next is 0 or 8, not {self.next}")
        ring = self.step in (Step.RING, Step.RING_NODE)
        if self.next and not ring:
            raise PlanError(f"a walk by {self.step.name} follows next only: links point back in rings alone")
        if self.bias and ring:
            raise PlanError(f"bias is {self.bias:#x}, but the pointers of a {self.step.name} point to links: 0")
        if len(self.ops) > OPS_MAX:
            raise PlanError(f"{len(self.ops)} operations, at most {OPS_MAX}")
        formats, offsets, at = ["<QQII"], [], 24
        known = {0}
        for number, op in enumerate(self.ops):
            where = f"operation {number} ({type(op).__name__})"
            _bounded(f"offset of {where}", op.offset, -(1 << 31), (1 << 31) - 1)
            if op.src not in known:
                raise PlanError(f"{where} reads register {op.src}, which nothing before it loads")
            offsets.append(at)
            if isinstance(op, Load):
                _bounded(f"dst of {where}", op.dst, 1, REGISTERS - 1)
                _bounded(f"tags of {where}", op.tags, 0, 4095)
                known.add(op.dst)
                formats.append("Q")
                at += 8
            else:
                _bounded(f"size of {where}", op.size, 1, TAKE_MAX)
                formats.append("Q" if op.size == 8 and isinstance(op, Take) else f"{op.size}s")
                at += op.size
        if at > RECORD_MAX:
            raise PlanError(f"a record of {at} bytes, at most {RECORD_MAX}")
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "record", struct.Struct("".join(formats)))
        object.__setattr__(self, "kinds", tuple(map(type, self.ops)))

    def to_json(self) -> list[Any]:
        """The plan as JSON-able values; `from_json` reads it."""
        ops = [[_KINDS.index(type(op)), *op] for op in self.ops]
        return [
            self.start,
            int(self.step),
            ops,
            self.heads,
            self.stride,
            self.link,
            self.next,
            self.bias,
            self.nulls,
            self.max_nodes,
        ]

    @cached_property
    def text(self) -> str:
        """`to_json` as text, made once: a listing asks by the same plan time and again."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    def to_c(self) -> bytes:
        """The plan as ``struct plan`` of ``bpf/plan.h``."""
        whole = bytearray(_C_PLAN.size + OPS_MAX * _C_OP.size)
        _C_PLAN.pack_into(
            whole,
            0,
            *(self.start, self.heads, self.stride, self.nulls, self.max_nodes),
            *(self.link, self.next, self.step, len(self.ops), self.record.size, self.bias),
        )
        for number, (op, slot) in enumerate(zip(self.ops, self.offsets, strict=True)):
            dst, size = (op.dst, op.tags) if isinstance(op, Load) else (0, op.size)
            at = _C_PLAN.size + number * _C_OP.size
            _C_OP.pack_into(whole, at, _KINDS.index(type(op)), dst, op.src, op.offset, size, slot)
        return bytes(whole)

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The plan that `to_json` wrote. :raises PlanError: it is none, or is out of bounds"""
        try:
            start, step, ops, *rest = value
            if len(rest) != 7 or not all(type(number) is int for number in (start, step, *rest)):
                raise PlanError("a plan has ten parts")
            if type(ops) is not list:
                raise PlanError("the operations of a plan are a list")
            decoded = []
            for kind, *numbers in ops:
                if not all(type(number) is int for number in (kind, *numbers)) or kind < 0:
                    raise PlanError("an operation is made of whole numbers")
                decoded.append(_KINDS[kind](*numbers))
            return cls(start, Step(step), tuple(decoded), *rest)
        except PlanError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise PlanError(f"not a plan: {error}") from None

    def records(self, data: bytes | memoryview) -> Iterator[tuple[Any, ...]]:
        """The records of a chunk: (node, faults, head number, kind, slot, slot, ...), kind a `Kind`. Eight bytes are an
        int, whether loaded or taken; everything else is bytes.

        :raises PlanError: ``data`` is not a whole number of records
        """
        if len(data) % self.record.size:
            raise PlanError(f"{len(data)} bytes are no whole number of {self.record.size}-byte records")
        return self.record.iter_unpack(data)

    def columns(self, data: bytes) -> list[list[Any]]:
        """The same, slot by slot: all nodes, all faults, and so on. Without a tuple for each record, of which thousands
        take a third more time.

        :raises PlanError: as `records`
        """
        view, size = memoryview(data), _BLOCK * self.record.size
        whole = len(view) // size * size
        values = list(chain.from_iterable(self._block.iter_unpack(view[:whole])))
        values += chain.from_iterable(self.records(view[whole:]))
        slots = 4 + len(self.ops)
        return [values[slot::slots] for slot in range(slots)]

    @cached_property
    def _block(self) -> struct.Struct:
        return struct.Struct("<" + self.record.format[1:] * _BLOCK)


_KINDS: tuple[type[Load] | type[Take] | type[Text], ...] = (Load, Take, Text)


def _bounded(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PlanError(f"{what} is {value:#x}, outside {low:#x}..{high:#x}")
