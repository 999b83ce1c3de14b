"""What this side packs and unpacks is laid out as in the built eBPF programs."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given

from tests.unit.test_inject import section
from tests.unit.test_plan import plans
from vmishim.ebpf_objects import object_bytes
from vmishim.kernel.btf import Btf
from vmishim.wire import sealed
from vmishim.wire.plan import OPS_MAX, Load, Plan, Take
from vmishim.wire.sealed import Ask, question


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf(section(object_bytes("sealed"), b".BTF"))


def test_layouts_are_those_of_the_programs(btf: Btf) -> None:
    assert [place.offset for place in btf.layout("question").values()] == [0, 16, 20, 24, 32, 40, 48, 56]
    assert btf.size("question") == len(question(bytes(16), Ask.READ)) == 64
    words = struct.unpack("<QQIIQQQQQ", question(b"A" * 8 + b"B" * 8, Ask.MORE, 1, 2, 3, chunk=4, began=5, heads=6))
    assert words[2:] == (Ask.MORE, 4, 1, 2, 3, 5, 6)
    assert list(btf.layout("question")) == ["challenge", "kind", "chunk", "space", "address", "count", "began", "heads"]
    assert btf.size("report") == sealed.REPORT.size
    assert list(btf.layout("report")) == [
        *("faulted", "fault_at", "cycles", "cycle_at", "torn", "head", "state"),
        *("physical", "page_size", "entry", "levels"),
    ]
    assert btf.member("sealed", "report").offset == sealed.HEAD.size
    assert btf.member("sealed", "bytes").size == sealed.CHUNK_MAX
    assert [*btf.layout("sealed")] == ["counter", "length", "tag", "iv", "report", "bytes"]
    assert [*btf.layout("kernel_keys")] == ["number", "cipher", "iv", "mac", "subkey"]
    assert btf.size("kernel_keys") == 8 + len(b"".join(sealed.kernel_keys(bytes(32))))


@given(plans())
def test_a_plan_is_laid_out_as_the_programs_read_it(plan: Plan) -> None:
    btf = Btf(section(object_bytes("memory"), b".BTF"))
    laid, places, op_places = plan.to_c(), btf.layout("plan"), btf.layout("op")
    assert len(laid) == btf.size("plan")
    assert btf.member("walk", "plan").offset == 0

    def number(at: int, size: int, signed: bool) -> int:
        return int.from_bytes(laid[at : at + size], "little", signed=signed)

    names = ("start", "heads", "stride", "nulls", "max_nodes", "link", "next", "step", "bias")
    for name in names:
        assert number(*places[name], name in ("link", "bias")) == getattr(plan, name)
    assert number(*places["ops"], False) == len(plan.ops)
    assert number(*places["record"], False) == plan.record.size
    assert places["op"].size == OPS_MAX * btf.size("op")
    for at, (op, kind, slot) in enumerate(zip(plan.ops, plan.kinds, plan.offsets, strict=True)):
        base = places["op"].offset + at * btf.size("op")
        found = {name: number(base + p.offset, p.size, name == "offset") for name, p in op_places.items()}
        expected = {"kind": [Load, Take].index(kind) if kind in (Load, Take) else 2, "src": op.src, "offset": op.offset}
        expected |= {"slot": slot, "dst": op.dst if isinstance(op, Load) else 0, "zero": 0}
        assert found == expected | {"size": op.tags if isinstance(op, Load) else op.size}
