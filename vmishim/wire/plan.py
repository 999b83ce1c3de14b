"""Gather plans: what to walk in the guest kernel, and what to collect, as a value.

A plan says where a walk begins, how it steps from node to node (`Step`), and which memory of each node, and of what the
node points to, is collected (`Load`, `Take`, `Text`). An eBPF interpreter (``bpf/memory.bpf.c``) runs any plan and
writes records (`Plan.records`).
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
"""Maximum operations in a plan."""
REGISTERS = 16
"""Registers for pointers; the node itself is register 0."""
TAKE_MAX = 4096
"""Maximum bytes that one `Take` or `Text` copies."""
RECORD_MAX = 16384
"""Maximum bytes of one node's record."""
HEADS_MAX = 1 << 16
"""Maximum heads listed one by one."""
STEPS_MAX = 1 << 23
"""Maximum steps in one run of a walk, each to a head or a node (the limit of ``bpf_loop``)."""
WALK_NODES_MAX = 1 << 24
"""Maximum nodes in one walk."""
_BLOCK = 64
"""Records unpacked at a time."""


class Step(IntEnum):
    """How a walk gets from a head to its nodes. The numbers are ``enum step`` of ``bpf/plan.h``."""

    SELF = 0
    """The head's address is the node."""
    ONCE = 1
    """The head holds a pointer to the one node."""
    CHAIN = 2
    """``hlist_head``: ends in NULL."""
    NULLS = 3
    """``hlist_nulls_head``: ends in an odd value with the chain's number."""
    RING = 4
    """A separate ``list_head``."""
    RING_NODE = 5
    """A ``list_head`` inside a node, such as ``init_task.tasks``; that node is collected too."""


class Kind(IntEnum):
    """What a record is about: ``enum record_kind`` of ``bpf/plan.h``."""

    NODE = 0
    HEAD = 1
    """No node: an empty head whose end marker has another number than the head; ``node`` is what it holds."""
    FAULT = 2
    """No node: a head that cannot be read."""


class Load(NamedTuple):
    """Follow a pointer: ``register[dst] = *(u64 *)(register[src] + offset) & ~tags``. The value read is collected with
    its tags."""

    dst: int
    src: int
    offset: int
    tags: int = 0
    """Bits of the value that do not belong to the pointer, as in a maple tree."""


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
    """An invalid plan; the text names the part and the limit. Raised before anything runs."""


@dataclass(frozen=True)
class Plan:
    """What to walk and what to collect.

    :ivar start: address of the only head, or of the first of a table; 0 when the heads are listed beside the plan
    :ivar heads: how many heads
    :ivar stride: bytes from one head to the next; 0 when they are listed beside the plan
    :ivar step: how to get from a head to its nodes
    :ivar link: offset of the ``list_head`` (``hlist_node``, ...) in a node, bytes
    :ivar next: 0 to follow ``next``, 8 to follow ``prev``
    :ivar bias: bytes from the address that a pointer holds to the link of its node; 0 for ``list_head`` and its like
    :ivar nulls: for ``Step.NULLS``, the number that ends chain 0
    :ivar max_nodes: stop after this many nodes, and report it
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
    """The operations' types. Without them plans with a `Take` and a `Text` of the same numbers would compare equal."""

    def __post_init__(self) -> None:
        _bounded("start", self.start, 0, 2**64 - 1)
        _bounded("heads", self.heads, 1, 2**32 if self.stride else HEADS_MAX)
        _bounded("stride", self.stride, 0, 1 << 20)
        _bounded("link", self.link, -(1 << 20), 1 << 20)
        _bounded("bias", self.bias, -(1 << 20), 1 << 20)
        _bounded("nulls", self.nulls, 0, 2**62)
        _bounded("max_nodes", self.max_nodes, 1, WALK_NODES_MAX)
        if self.next not in (0, 8):
            raise PlanError(f"next must be 0 or 8, not {self.next}")
        ring = self.step in (Step.RING, Step.RING_NODE)
        if self.next and not ring:
            raise PlanError(f"next must be 0 for {self.step.name}: only rings have links that point back")
        if self.bias and ring:
            raise PlanError(f"bias must be 0 for {self.step.name}, whose pointers point to links; it is {self.bias:#x}")
        if len(self.ops) > OPS_MAX:
            raise PlanError(f"{len(self.ops)} operations; the limit is {OPS_MAX}")
        formats, offsets, at = ["<QQII"], [], 24
        known = {0}
        for number, op in enumerate(self.ops):
            where = f"operation {number} ({type(op).__name__})"
            _bounded(f"offset of {where}", op.offset, -(1 << 31), (1 << 31) - 1)
            if op.src not in known:
                raise PlanError(f"{where} reads register {op.src}, which no operation before it loads")
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
            raise PlanError(f"a record of {at} bytes; the limit is {RECORD_MAX}")
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
        """`to_json` as text, made once, since a listing sends the same plan many times."""
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
        """The plan that `to_json` wrote. :raises PlanError: the value is not a valid plan, or out of bounds"""
        try:
            start, step, ops, *rest = value
            if len(rest) != 7 or not all(type(number) is int for number in (start, step, *rest)):
                raise PlanError("a plan must have ten parts, all whole numbers but the operations")
            if type(ops) is not list:
                raise PlanError("the operations of a plan must be a list")
            decoded = []
            for kind, *numbers in ops:
                if not all(type(number) is int for number in (kind, *numbers)) or kind < 0:
                    raise PlanError("an operation must be a list of whole numbers")
                decoded.append(_KINDS[kind](*numbers))
            return cls(start, Step(step), tuple(decoded), *rest)
        except PlanError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise PlanError(f"not a valid plan: {error}") from None

    def records(self, data: bytes | memoryview) -> Iterator[tuple[Any, ...]]:
        """The records of a chunk: (node, faults, head number, kind, slot, slot, ...), kind a `Kind`. Eight bytes are an
        int, whether loaded or taken; everything else is bytes.

        :raises PlanError: ``data`` is not a whole number of records
        """
        if len(data) % self.record.size:
            raise PlanError(f"{len(data)} bytes are not a whole number of {self.record.size}-byte records")
        return self.record.iter_unpack(data)

    def columns(self, data: bytes) -> list[list[Any]]:
        """The same, slot by slot: all nodes, all faults, and so on. This makes no tuple for each record, which would
        take a third more time for thousands of records.

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
