"""eBPFmonitor's strategy as an agent: ours, but what a walk brings is copied by user space, one object after the other.

eBPF collects the addresses of the objects in one run; the agent then copies each object by a run of its own, and sends
all of them in one reply. `bench.variants` runs this file where the agent runs: ``sequential.py AGENT serve ...``.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guest_agent.kernel import Gathered, Kernel
    from vmishim.wire.plan import Plan

_HEAD = struct.Struct("<QQII")


def install() -> None:
    """Let `guest_agent.kernel.Kernel` walk so."""
    from guest_agent.kernel import Kernel
    from vmishim.wire.plan import Kind, Load, PlanError, Text

    collect = Kernel.walk

    def walk(self: Kernel, plan: Plan, heads: bytes = b"", state: bytes | None = None) -> Gathered:
        if any(isinstance(op, Load) for op in plan.ops):
            raise PlanError("this agent copies objects, it follows no pointers from them")
        addresses = replace(plan, ops=())
        gathered = collect(self, addresses, heads, state)
        # One copy of an object brings all that is wanted of it.
        low = min((op.offset for op in plan.ops), default=0)
        high = max((op.offset + op.size for op in plan.ops if not isinstance(op, Load)), default=0)
        records = []
        for node, faults, head, kind in addresses.records(gathered.records):
            record = bytearray(plan.record.size)
            copied = self.read(node + low, high - low) if kind == Kind.NODE else b""
            for number, (op, slot) in enumerate(zip(plan.ops, plan.offsets, strict=True)):
                assert not isinstance(op, Load)
                part = copied[op.offset - low :][: op.size]
                if kind == Kind.NODE and len(part) < op.size:
                    faults |= 1 << number
                elif isinstance(op, Text):
                    part = part.split(b"\0")[0]
                record[slot : slot + len(part)] = part
            _HEAD.pack_into(record, 0, node, faults, head, kind)
            records.append(record)
        return replace(gathered, records=b"".join(records))

    Kernel.walk = walk  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    install()
    from guest_agent.__main__ import main

    sys.exit(main())
