"""What a program can do at most, of instructions written by hand: the numbers are counted by hand too."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.steps import ROUNDS_MAX, STEPS_MAX, VERIFIED_MAX, StepsError, check_steps, steps
from vmishim.wire.injection import MapDefinition

HELPER = 32


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, source << 4 | to, offset, value)


def put(to: int, value: int) -> bytes:
    return instruction(0xB7, to, value=value)


def function(to: int, start: int, at: int) -> bytes:
    """``ld_imm64`` at instruction ``at`` of the address of what starts at ``start``."""
    return instruction(0x18, to, 4, value=start - at - 1) + instruction(0)


def helper(number: int) -> bytes:
    return instruction(0x85, value=number)


def call(start: int, at: int) -> bytes:
    return instruction(0x85, source=1, value=start - at - 1)


EXIT = instruction(0x95)
LOOP, EACH, READ = helper(181), helper(164), helper(113)


def test_a_straight_line_is_its_instructions() -> None:
    assert steps(put(0, 0) + put(1, 1) + EXIT) == 3


def test_a_helper_and_what_it_copies() -> None:
    assert steps(put(2, 400) + READ + EXIT) == 1 + (HELPER + 400 // 8) + 1
    assert steps(instruction(0x79, 2, 1) + READ + EXIT) == 1 + (HELPER + 512 // 8) + 1  # the stack
    large = [MapDefinition.array("output", 1 << 20)]
    unknown = instruction(0x79, 2, 1)  # r2 = *(u64 *)r1
    assert steps(unknown + READ + EXIT, large) == 1 + (HELPER + (1 << 20) // 8) + 1
    masked = unknown + instruction(0x57, 2, value=0xFFF)
    assert steps(masked + READ + EXIT, large) == 2 + (HELPER + 0xFFF // 8) + 1
    checked = unknown + instruction(0x25, 2, offset=1, value=80) + READ + EXIT  # if r2 > 80, on to EXIT
    assert steps(checked, large) == 2 + (HELPER + 10) + 1
    moved = put(6, 64) + helper(5) + instruction(0xBF, 2, 6) + READ + EXIT
    assert steps(moved, large) == 2 + HELPER + (HELPER + 8) + 1


def looping(count: bytes, called: bytes = put(0, 0) + EXIT, *, loop: bytes = LOOP) -> bytes:
    """A program that loops ``count`` times (an instruction that sets r1) over ``called``."""
    return count + function(2, 5, 1) + loop + EXIT + called


def test_a_loop_multiplies() -> None:
    assert steps(looping(put(1, 1000))) == 4 - 1 + HELPER + 1000 * (HELPER + 2)
    not_constant = instruction(0x79, 1, 1)
    assert steps(looping(not_constant)) == 3 + HELPER + ROUNDS_MAX * (HELPER + 2)
    assert steps(looping(put(1, -1))) == 3 + HELPER + ROUNDS_MAX * (HELPER + 2)


def test_elements_are_those_of_the_largest_map() -> None:
    maps = [MapDefinition("a", 1, 4, 8, 70, 0), MapDefinition("b", 1, 4, 8, 300, 0)]
    assert steps(looping(put(1, 3), loop=EACH), maps) == 3 + HELPER + 300 * (HELPER + 2)


def test_loops_in_loops_multiply_through_calls_and_functions() -> None:
    # 0: loop over 5; 5: call 7, exit; 7: loop over 12 ; 12: exit
    program = looping(put(1, 100), call(7, 5) + EXIT + put(1, 50) + function(2, 12, 8) + LOOP + EXIT + put(0, 0) + EXIT)
    inner = 3 + HELPER + 50 * (HELPER + 2)
    assert steps(program) == 3 + HELPER + 100 * (HELPER + 1 + inner + 1)


def test_an_unknown_callback_is_the_longest_of_all() -> None:
    # The address goes through memory: r2 = *(u64 *)r10.
    program = put(1, 10) + function(3, 6, 1) + instruction(0x79, 2, 10) + LOOP + EXIT + put(0, 0) * 7 + EXIT
    assert steps(program) == 4 + HELPER + 10 * (HELPER + 8)


def test_a_plain_loop_counts_what_the_verifier_followed() -> None:
    back = put(0, 0) + instruction(0xA5, 0, offset=-2, value=9) + EXIT  # if r0 < 9, back to 0
    assert steps(back, verified=500) == 500 + 1
    assert steps(back) == VERIFIED_MAX + 1
    program = put(1, 5) + function(2, 6, 1) + LOOP + instruction(0xA5, 0, offset=-5, value=9) + EXIT + EXIT
    assert steps(program, verified=500) == 500 * (HELPER + 5 * (HELPER + 1)) + 1


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (call(0, 0) + EXIT, "instruction 0 calls itself"),
        (looping(put(1, 1), call(0, 5) + EXIT), "instruction 0 calls itself"),
        (looping(put(1, 1), put(1, 1) + function(2, 5, 6) + LOOP + EXIT), "instruction 5 calls itself"),
        (instruction(0xE5, offset=1) + EXIT + EXIT, "may_goto"),
        (instruction(0x0D, 1) + EXIT, "a table"),
        (instruction(0x8D, 1) + EXIT, "can't be counted"),
        (instruction(0x05, offset=7) + EXIT, "jumps to instruction 8, but has 2"),
        (put(0, 0), "jumps to instruction 1, but has 1"),
    ],
    ids=str,
)
def test_what_cant_be_counted_is_refused(program: bytes, told: str) -> None:
    with pytest.raises(StepsError, match=told):
        steps(program)


def test_the_bound() -> None:
    every = HELPER + 2
    fits = (STEPS_MAX - 3 - HELPER) // every
    assert fits > ROUNDS_MAX  # so one loop of any count over a short function fits
    nested = looping(put(1, 1 << 23), put(1, 1 << 23) + function(2, 10, 6) + LOOP + EXIT + put(0, 0) + EXIT)
    check_steps(looping(put(1, 1 << 23)))
    with pytest.raises(StepsError, match=r"could run for 2,\d{3},.* instruction 3 is a bpf_loop of up to 8,388,608"):
        check_steps(nested)


@given(st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=60), st.integers(0, 60))
def test_any_bytes_are_counted_or_refused(words: list[bytes], exits: int) -> None:
    with contextlib.suppress(StepsError):
        assert steps(b"".join([*words, *[EXIT] * exits])) > 0
