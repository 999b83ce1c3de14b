"""How long an injected program can run at most: a bound computed from its instructions, before its first run.

The verifier proves that a program ends, not when: ``bpf_loop`` runs up to 2^23 rounds, inside another one 2^46, and
nothing can interrupt it. The kernel then reports a soft lockup, and not even SIGKILL ends the agent. So the loader
counts: an instruction is a step, a helper as many as its time is worth, a loop its rounds times what it calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from typing import NamedTuple

from vmishim.errors import LibvmiError
from vmishim.wire.injection import INSTRUCTION, LD_IMM64, MapDefinition

STEPS_MAX = 1 << 32
"""Steps of one run, a nanosecond each or less: seconds, of which the kernel's watchdog allows 20."""
VERIFIED_MAX = 1_000_000
"""Instructions that the verifier follows at most (BPF_COMPLEXITY_LIMIT_INSNS), and so the longest run without helpers
that call back: it follows the rounds of a plain loop one by one."""
ROUNDS_MAX = 1 << 23
"""Rounds of one ``bpf_loop`` (BPF_MAX_LOOPS, include/linux/bpf_verifier.h)."""

_HELPER, _BYTES = 32, 8
"""Steps of a helper, and bytes that it copies in a step."""
_STACK = 512
"""Bytes of a program's stack (MAX_BPF_STACK)."""
_FOR_EACH, _LOOP = 164, 181
_UPDATE = 2
_COPIES = {4, 16, 45, 112, 113, 114, 115, 182}
"""Helpers that handle as many bytes as register 2 says."""
_PSEUDO_CALL, _PSEUDO_FUNC = 1, 4
_CALL, _EXIT, _MAY_GOTO = 0x85, 0x95, 0xE5
_JUMPS, _JUMPS_32 = 5, 6
_BOUNDING = {0x25: (0, None), 0x35: (-1, None), 0xB5: (None, 0), 0xA5: (None, -1)}
"""Of ``if reg > >= <= < imm``: what to add to imm for reg's bound if it does not jump, and if it does."""


class StepsError(LibvmiError):
    """A program can run too long, or for a time that can't be computed. The text says why, and what to do."""


class _Instruction(NamedTuple):
    code: int
    registers: int
    offset: int
    value: int

    @property
    def to(self) -> int:
        return self.registers & 15

    @property
    def source(self) -> int:
        return self.registers >> 4


_LAYOUT = Struct("<BBhi")  # struct bpf_insn


@dataclass(frozen=True)
class _Function:
    """The address of a function, in a register."""

    start: int


_Known = int | _Function | None
"""What is known of a register: that it is not above a number, or a function's address, or nothing."""


def steps(instructions: bytes, maps: Sequence[MapDefinition] = (), cpus: int = 1, verified: int = VERIFIED_MAX) -> int:
    """The steps that a run of a program takes at most; the kernel's verifier must have accepted it.

    :param instructions: the program and what it calls, as the kernel gets them
    :param maps: its maps: what is copied, or called for each element of
    :param cpus: number of possible CPUs
    :param verified: instructions that the verifier followed (``bpf_prog_info.verified_insns``)
    :raises StepsError: it calls itself, or jumps in a way that can't be followed
    """
    return _Program(instructions, maps, cpus, verified).steps(0)


def check_steps(
    instructions: bytes, maps: Sequence[MapDefinition] = (), cpus: int = 1, verified: int = VERIFIED_MAX
) -> None:
    """Check that a run takes at most `STEPS_MAX`; parameters as for `steps`. :raises StepsError: it may take more"""
    program = _Program(instructions, maps, cpus, verified)
    total = program.steps(0)
    if total > STEPS_MAX:
        raise StepsError(
            f"the program could run for {total:,} steps, at most {STEPS_MAX:,} are accepted, because nothing can "
            f"interrupt it: {program.why()}; give loops smaller constant counts, don't nest them, and read constant "
            "sizes (docs/injection.md says how steps are counted)"
        )


class _Program:
    def __init__(self, data: bytes, maps: Sequence[MapDefinition], cpus: int, verified: int) -> None:
        self.code = [_Instruction(*fields) for fields in _LAYOUT.iter_unpack(data[: len(data) & -INSTRUCTION])]
        self._verified = min(verified or VERIFIED_MAX, VERIFIED_MAX)
        self._entries = max((one.entries for one in maps), default=0)
        self._value = max((one.value_size * cpus for one in maps), default=0)
        self._key = max((one.key_size for one in maps), default=0)
        self._steps: dict[int, int] = {}
        self._under_way: list[int] = []
        self._loops: list[tuple[int, str]] = []

    @cached_property
    def functions(self) -> list[int]:
        """Every function whose address is taken."""
        return [
            at + 1 + one.value
            for at, one in enumerate(self.code)
            if one.code == LD_IMM64 and one.source == _PSEUDO_FUNC
        ]

    def why(self) -> str:
        """What takes the most steps."""
        return max(self._loops, default=(0, "its plain loops and reads"))[1]

    def steps(self, start: int) -> int:
        """Steps of the function that starts at this instruction."""
        if start in self._steps:
            return self._steps[start]
        if start in self._under_way:
            raise StepsError(f"the program's function at instruction {start} calls itself; write it as one loop")
        self._under_way.append(start)
        follows = self._follows(start)
        known = self._registers(start, follows)
        total = 0
        for group in _cycles(start, follows):
            costs = [self._cost(at, known[at]) for at in group]
            repeated = len(group) > 1 or group[0] in follows[group[0]]
            if repeated:
                longest = max(costs)
                self._note(longest * self._verified, group[costs.index(longest)], "is in a plain loop of the program")
            # The verifier has followed all rounds, each instruction for itself.
            total += max(costs) * self._verified if repeated else costs[0]
        self._under_way.pop()
        self._steps[start] = total
        return total

    def _note(self, cost: int, at: int, text: str) -> None:
        self._loops.append((cost, f"instruction {at} {text}"))

    def _cost(self, at: int, known: Sequence[_Known]) -> int:
        one = self.code[at]
        if one.code != _CALL:
            return 1
        if one.source == _PSEUDO_CALL:
            return 1 + self.steps(at + 1 + one.value)
        cost = _HELPER + self._key // _BYTES
        if one.value in (_LOOP, _FOR_EACH):
            name, most = ("bpf_loop", ROUNDS_MAX) if one.value == _LOOP else ("bpf_for_each_map_elem", self._entries)
            rounds, called = known[1], known[2]
            if one.value == _FOR_EACH or not isinstance(rounds, int) or rounds > most:
                rounds = most
            functions = [called.start] if isinstance(called, _Function) else self.functions
            each = _HELPER + max(map(self.steps, functions), default=0)
            cost += rounds * each
            self._note(cost, at, f"is a {name} of up to {rounds:,} rounds of up to {each:,} steps")
        elif one.value in _COPIES:
            most = max(self._value, _STACK)  # where the bytes go to
            cost += (min(known[2], most) if isinstance(known[2], int) else most) // _BYTES
        elif one.value == _UPDATE:
            cost += self._value // _BYTES
        return cost

    # ---- where it goes -----------------------------------------------------------------------------------------------

    def _follows(self, start: int) -> dict[int, tuple[int, ...]]:
        """For each instruction of the function that starts here, those that may be next."""
        found: dict[int, tuple[int, ...]] = {}
        todo = [start]
        while todo:
            at = todo.pop()
            if at in found:
                continue
            if not 0 <= at < len(self.code):
                raise StepsError(f"the program jumps to instruction {at}, but has {len(self.code)}")
            found[at] = self._next(at)
            todo += found[at]
        return found

    def _next(self, at: int) -> tuple[int, ...]:
        one = self.code[at]
        if one.code == LD_IMM64:
            return (at + 2,)
        if one.code == _EXIT:
            return ()
        if one.code == _CALL or one.code & 7 not in (_JUMPS, _JUMPS_32):
            return (at + 1,)
        if one.code == 0x05:
            return (at + 1 + one.offset,)
        if one.code == 0x06:
            return (at + 1 + one.value,)
        if one.code & 0xF0 in (0, 0x80, 0x90, 0xE0, 0xF0):
            raise StepsError(
                f"instruction {at} of the program jumps or calls in a way ({one.code:#04x}) whose repetitions can't be "
                "counted (may_goto, or a jump through a table); use a loop of a constant count"
            )
        return at + 1, at + 1 + one.offset

    # ---- what registers hold -----------------------------------------------------------------------------------------

    def _registers(self, start: int, follows: dict[int, tuple[int, ...]]) -> dict[int, list[_Known]]:
        """What is known of each register before each instruction."""
        known: dict[int, list[_Known]] = {start: [None] * 16}
        changes: dict[int, int] = {}
        todo = [start]
        while todo:
            at = todo.pop()
            for number, to in enumerate(follows[at]):
                after = self._after(at, known[at], jumped=number == 1)
                before = known.get(to)
                if before is None:
                    known[to] = after
                    todo.append(to)
                    continue
                joined = [_either(one, other) for one, other in zip(before, after, strict=True)]
                if joined != before:
                    changes[to] = changes.get(to, 0) + 1
                    if changes[to] > 16:  # enough for what compilers make; and so it ends soon
                        joined = [None if one != other else one for one, other in zip(before, joined, strict=True)]
                    known[to] = joined
                    todo.append(to)
        return known

    def _after(self, at: int, before: list[_Known], *, jumped: bool) -> list[_Known]:
        one, after = self.code[at], before.copy()
        kind = one.code & 7
        if one.code == LD_IMM64:
            after[one.to] = None
            if one.source == _PSEUDO_FUNC:
                after[one.to] = _Function(at + 1 + one.value)
            elif not one.source and at + 1 < len(self.code):
                after[one.to] = (self.code[at + 1].value & 0xFFFFFFFF) << 32 | one.value & 0xFFFFFFFF
        elif kind in (0, 1):  # loads
            after[one.to] = after[0] = None
        elif kind == 3:  # of stores, only atomic ones change registers
            if one.code & 0xE0 == 0xC0:
                after[one.to] = after[one.source] = after[0] = None
        elif one.code == _CALL:
            after[:6] = [None] * 6
        elif kind in (4, 7):
            after[one.to] = _computed(one, before)
        elif one.code in _BOUNDING and one.value >= 0:
            plus = _BOUNDING[one.code][jumped]
            held = before[one.to]
            if plus is not None and not isinstance(held, _Function):
                bound = max(one.value + plus, 0)
                after[one.to] = bound if held is None else min(held, bound)
        return after


def _computed(one: _Instruction, before: Sequence[_Known]) -> _Known:
    match one.code:
        case 0xB7 | 0xB4 if one.value >= 0:
            return one.value
        case 0xBF if not one.offset:
            return before[one.source]
        case 0xBC if not one.offset:
            held = before[one.source]
            return held if isinstance(held, int) and held < 1 << 32 else None
        case 0x57 | 0x54 if one.value >= 0:
            held = before[one.to]
            return min(held, one.value) if isinstance(held, int) else one.value
    return None


def _either(one: _Known, other: _Known) -> _Known:
    if one == other:
        return one
    return max(one, other) if isinstance(one, int) and isinstance(other, int) else None


def _cycles(start: int, follows: dict[int, tuple[int, ...]]) -> Iterator[list[int]]:
    """Groups of instructions that can repeat each other, every other instruction alone: Tarjan's components."""
    order: dict[int, int] = {start: 0}
    lowest: dict[int, int] = {start: 0}
    stack, on_stack = [start], {start}
    path = [(start, iter(follows[start]))]
    while path:
        at, rest = path[-1]
        for to in rest:
            if to not in order:
                order[to] = lowest[to] = len(order)
                stack.append(to)
                on_stack.add(to)
                path.append((to, iter(follows[to])))
                break
            if to in on_stack:
                lowest[at] = min(lowest[at], order[to])
        else:
            path.pop()
            if path:
                lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[at])
            if lowest[at] == order[at]:
                group = [stack.pop()]
                while group[-1] != at:
                    group.append(stack.pop())
                on_stack.difference_update(group)
                yield group
