"""What ``bpf/plan.h`` and Python both have, compared: the header is read here, nothing is compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guest_agent import kernel
from guest_agent import sealed as agent
from vmishim.wire import plan, sealed
from vmishim.wire.keys import KEY_SIZE
from vmishim.wire.messages import BULK_MAX

HEADER = (Path(__file__).parents[2] / "bpf" / "plan.h").read_text()
IN_THE_CLEAR, SEALED = r"#ifndef SEALED\n(.*)\n#else\n.*\n#endif", r"#ifndef SEALED\n.*\n#else\n(.*)\n#endif"
LIMITS = {
    "OPS_MAX": plan.OPS_MAX,
    "REGISTERS": plan.REGISTERS,
    "TAKE_MAX": plan.TAKE_MAX,
    "RECORD_MAX": plan.RECORD_MAX,
    "HEADS_MAX": plan.HEADS_MAX,
    "STEPS_MAX": plan.STEPS_MAX,
    "KEYS_MAX": agent.KEYS_MAX,
    "WALKS_MAX": agent.WALKS_MAX,
    "BLOCK": sealed.BLOCK,
    "KEY_SIZE": KEY_SIZE,
}


def defines(text: str) -> dict[str, int]:
    """Every number that is defined: ``16``, or ``(1 << 16)``."""
    found = re.findall(r"^#define (\w+) (?:(\d+)|\((\d+) << (\d+)\))[ \t]*/\*", text, re.MULTILINE)
    return {name: int(plain or base) << int(shift or 0) for name, plain, base, shift in found}


def enum(name: str) -> list[str]:
    """The names of an enumeration, in the order of their values, which begin at 0."""
    body = re.findall(rf"^enum {name} {{\n(.*?)^}};", HEADER, re.MULTILINE | re.DOTALL)[0]
    names = re.findall(r"^\t(\w+),", body, re.MULTILINE)
    assert len(names) == body.count("\n")
    return names


@pytest.mark.parametrize(("programs", "chunk"), [(IN_THE_CLEAR, BULK_MAX), (SEALED, sealed.CHUNK_MAX)])
def test_every_limit_is_the_same_on_both_sides(programs: str, chunk: int) -> None:
    assert defines(re.sub(programs, r"\1", HEADER)) == LIMITS | {"OUT_SIZE": chunk}


def test_no_definition_escapes_the_comparison() -> None:
    assert set(re.findall(r"^#define (\w+)", HEADER, re.MULTILINE)) == {*LIMITS, "OUT_SIZE", "VMISHIM_PLAN_H"}


def test_enumerations_have_the_same_order_on_both_sides() -> None:
    assert enum("step") == [f"STEP_{step.name}" for step in plan.Step]
    assert enum("op_kind") == [f"OP_{kind.__name__.upper()}" for kind in (plan.Load, plan.Take, plan.Text)]
    assert enum("record_kind") == [f"RECORD_{kind.name}" for kind in plan.Kind]
    assert enum("ask_kind") == [f"ASK_{kind.name}" for kind in sealed.Ask]
    for numbers in (plan.Step, plan.Kind, sealed.Ask):
        assert [number.value for number in numbers] == list(range(len(numbers)))


def test_states_of_a_walk_are_the_same_on_both_sides() -> None:
    states = enum("walk_state")
    assert [states[state] for state in (sealed._MORE, sealed._DONE, sealed._TRUNCATED)] == states
    assert (states[kernel._MORE], states[kernel._TRUNCATED]) == ("WALK_MORE", "WALK_TRUNCATED")
    assert states[agent._MORE] == "WALK_MORE"
