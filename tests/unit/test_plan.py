"""Gather plans: values out of bounds are refused and named; all others survive JSON and records unchanged."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.wire.plan import (
    HEADS_MAX,
    OPS_MAX,
    RECORD_MAX,
    REGISTERS,
    TAKE_MAX,
    WALK_NODES_MAX,
    Kind,
    Load,
    Op,
    Plan,
    PlanError,
    Step,
    Take,
    Text,
)

OFFSETS = st.integers(-(1 << 31), (1 << 31) - 1)
RINGS = (Step.RING, Step.RING_NODE)


@st.composite
def operations(draw: st.DrawFn) -> tuple[Op, ...]:
    """Valid operations: each reads a register that an earlier one loaded, and all fit in a record."""
    ops: list[Op] = []
    known, room = [0], RECORD_MAX - 24
    for _ in range(draw(st.integers(0, OPS_MAX))):
        src, offset = draw(st.sampled_from(known)), draw(OFFSETS)
        kind = draw(st.sampled_from((Load, Take, Text)))
        if room < 8:
            break
        if kind is Load:
            dst = draw(st.integers(1, REGISTERS - 1))
            ops.append(Load(dst, src, offset, draw(st.integers(0, 4095))))
            known.append(dst)
            room -= 8
        else:
            size = draw(st.integers(1, min(TAKE_MAX, room)))
            ops.append(Take(src, offset, size) if kind is Take else Text(src, offset, size))
            room -= size
    return tuple(ops)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that is within bounds."""
    step = draw(st.sampled_from(Step))
    stride = draw(st.integers(0, 1 << 20))
    near = st.integers(-(1 << 20), 1 << 20)
    return Plan(
        draw(st.integers(0, 2**64 - 1)),
        step,
        draw(operations()),
        heads=draw(st.integers(1, 2**32 if stride else HEADS_MAX)),
        stride=stride,
        link=draw(near),
        next=draw(st.sampled_from((0, 8))) if step in RINGS else 0,
        bias=0 if step in RINGS else draw(near),
        nulls=draw(st.integers(0, 2**62)),
        max_nodes=draw(st.integers(1, WALK_NODES_MAX)),
    )


@given(plans())
def test_a_plan_survives_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.kinds == plan.kinds
    assert (again.offsets, again.record.format) == (plan.offsets, plan.record.format)


@given(plans())
def test_slots_follow_the_header_without_gaps(plan: Plan) -> None:
    sizes = [8 if isinstance(op, Load) else op.size for op in plan.ops]
    assert plan.offsets == tuple(24 + sum(sizes[:at]) for at in range(len(sizes)))
    assert plan.record.size == 24 + sum(sizes) <= RECORD_MAX


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_json_that_is_not_a_plan_is_refused(value: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(value)


@given(plans(), st.data())
def test_a_plan_with_any_part_replaced_is_refused_or_within_bounds(plan: Plan, data: st.DataObject) -> None:
    values = plan.to_json()
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(JSON | st.integers(-(2**70), 2**70))
    try:
        Plan.from_json(values)
    except PlanError:
        return
    # An accepted value is a plan, which must encode to the same value.
    assert Plan.from_json(values).to_json() == values


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"start": -1}, "start is -0x1, outside 0x0..0xffffffffffffffff"),
        ({"start": 2**64}, "start"),
        ({"heads": 0}, "heads is 0x0, outside 0x1"),
        ({"heads": 2**32 + 1}, "0x100000000"),
        ({"heads": HEADS_MAX + 1, "stride": 0}, "0x10000"),
        ({"stride": -8}, "stride"),
        ({"stride": (1 << 20) + 1}, "0x100000"),
        ({"link": (1 << 20) + 1}, "link"),
        ({"link": -(1 << 20) - 1}, "link"),
        ({"bias": 1 << 21, "step": Step.CHAIN}, "bias"),
        ({"bias": 8}, "bias must be 0 for RING, whose pointers point to links; it is 0x8"),
        ({"next": 4}, "next must be 0 or 8, not 4"),
        ({"next": 8, "step": Step.CHAIN}, "next must be 0 for CHAIN"),
        ({"nulls": 2**62 + 1}, "nulls"),
        ({"max_nodes": 0}, "max_nodes"),
        ({"max_nodes": WALK_NODES_MAX + 1}, "0x1000000"),
        ({"ops": (Take(0, 0, 8),) * (OPS_MAX + 1)}, "49 operations; the limit is 48"),
        ({"ops": (Take(0, 0, 0),)}, "size of operation 0 (Take) is 0x0"),
        ({"ops": (Text(0, 0, TAKE_MAX + 1),)}, "size of operation 0 (Text) is 0x1001, outside 0x1..0x1000"),
        ({"ops": (Take(0, 1 << 31, 8),)}, "offset of operation 0"),
        ({"ops": (Take(0, -(1 << 31) - 1, 8),)}, "offset of operation 0"),
        ({"ops": (Load(1, 0, 0), Take(2, 0, 8))}, "operation 1 (Take) reads register 2"),
        ({"ops": (Load(1, 1, 0),)}, "reads register 1"),
        ({"ops": (Take(-1, 0, 8),)}, "reads register -1"),
        ({"ops": (Load(0, 0, 0),)}, "dst of operation 0"),
        ({"ops": (Load(REGISTERS, 0, 0),)}, "dst of operation 0 (Load) is 0x10, outside 0x1..0xf"),
        ({"ops": (Load(1, 0, 0, 4096),)}, "tags of operation 0"),
        ({"ops": (Take(0, 0, TAKE_MAX),) * 4}, "a record of 16408 bytes; the limit is 16384"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_limit(changed: dict[str, Any], says: str) -> None:
    values: dict[str, Any] = {"start": 0, "step": Step.RING, "ops": ()} | changed
    with pytest.raises(PlanError) as caught:
        Plan(**values)
    assert says in str(caught.value)


def test_plans_that_differ_in_the_kind_of_an_operation_are_not_equal() -> None:
    """As tuples `Take` and `Text` are equal; what is cached for one plan must not be used for the other."""
    take, text = (Plan(0, Step.SELF, (kind(0, 0, 16),)) for kind in (Take, Text))
    assert take != text
    assert len({take, text}) == 2
    assert take == Plan(0, Step.SELF, (Take(0, 0, 16),))


def test_records_are_split_into_slots() -> None:
    plan = Plan(0, Step.SELF, (Load(1, 0, 0), Take(1, 0, 8), Take(1, 0, 3), Text(1, 0, 8)))
    header = struct.Struct("<QQII")
    data = header.pack(2**64 - 1, 0b1000, 7, Kind.NODE) + struct.pack("<QQ", 1, 2) + b"abc" + b"text\0\0\0\0"
    data += header.pack(9, 2**64 - 1, 8, Kind.FAULT) + bytes(27)
    for view in (data, memoryview(data)):
        assert list(plan.records(view)) == [
            (2**64 - 1, 8, 7, Kind.NODE, 1, 2, b"abc", b"text\0\0\0\0"),
            (9, 2**64 - 1, 8, Kind.FAULT, 0, 0, bytes(3), bytes(8)),
        ]
    assert list(plan.records(b"")) == []


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_columns_are_records_slot_by_slot(count: int) -> None:
    plan = Plan(0, Step.SELF, (Load(1, 0, 0), Text(1, 0, 5)))
    data = b"".join(
        plan.record.pack(number, 0, number // 7, Kind.NODE, ~number & 7, b"text") for number in range(count)
    )
    rows = list(plan.records(data))
    assert len(rows) == count
    assert plan.columns(data) == [[row[slot] for row in rows] for slot in range(6)]


@given(plans(), st.binary(max_size=200))
def test_a_partial_record_is_refused(plan: Plan, data: bytes) -> None:
    if len(data) % plan.record.size:
        with pytest.raises(PlanError, match=str(plan.record.size)):
            plan.records(data)
        with pytest.raises(PlanError):
            plan.columns(data)
    else:
        assert len(list(plan.records(data))) == len(data) // plan.record.size
