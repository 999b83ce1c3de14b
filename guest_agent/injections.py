"""Programs that IDSs injected: what is accepted, kept by session, bounded, run and unloaded.

An injected program reads: of the kernel's helpers only those that do no more are let through. Two kinds come in, told
apart by their first bytes: an ELF object that libbpf loads by CO-RE, and bytecode (`guest_agent.bytecode`).
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from guest_agent.bytecode import Bytecode
from guest_agent.programs import Contents, LoadError, Programs
from vmishim.errors import LibvmiError
from vmishim.wire.injection import INPUT_HEAD, INSTRUCTION, MAGIC, OUTPUT_HEAD, Bundle, BundleError

log = logging.getLogger(__name__)

PER_SESSION = 8
"""Programs one session may hold."""
IN_ALL = 32
"""Programs held for all sessions; the one longest unused makes room."""
SIZE_MAX = 1 << 20
"""Bytes of one object."""
MAPS_MAX = 16 << 20
"""Bytes the maps of one program may take; a program that hands out a full output needs little more than one MiB."""
MAPS_IN_ALL = 64 << 20
"""Bytes the maps of all programs may take."""
LOG_MAX = 512 << 10
"""Bytes of a verifier's log that are sent: its end, where it says what was wrong."""
NAME_MAX = 64
"""Characters of a program's name."""
PROGRAM, SECTION = "run", "syscall"
"""The one program of an object, see docs/injection.md."""

HELPERS = {
    1: "map_lookup_elem",
    2: "map_update_elem",
    3: "map_delete_elem",
    4: "probe_read",
    5: "ktime_get_ns",
    7: "get_prandom_u32",
    8: "get_smp_processor_id",
    14: "get_current_pid_tgid",
    15: "get_current_uid_gid",
    16: "get_current_comm",
    35: "get_current_task",
    45: "probe_read_str",
    112: "probe_read_user",
    113: "probe_read_kernel",
    114: "probe_read_user_str",
    115: "probe_read_kernel_str",
    118: "jiffies64",
    125: "ktime_get_boot_ns",
    153: "per_cpu_ptr",
    154: "this_cpu_ptr",
    158: "get_current_task_btf",
    164: "for_each_map_elem",
    181: "loop",
    182: "strncmp",
    195: "map_lookup_percpu_elem",
}
"""Helpers a program may call, by number (include/uapi/linux/bpf.h). A syscall program could otherwise load further
programs (bpf_sys_bpf) or write to user memory."""

_ARRAYS_AND_HASHES = {1: 1, 2: 1, 5: 0, 6: 0, 9: 1, 10: 0}
"""enum bpf_map_type: what is accepted; 0 for those that hold a value for each CPU."""
_CALL = 0x85


class InjectionError(LibvmiError):
    """A request about injected programs cannot be met. ``code`` is one word for `vmishim.wire.messages.Failure`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Loaded(Protocol):
    """A program in the kernel, by either road."""

    def map(self, name: str) -> Any:
        """Memory shared with the program."""
        ...

    def close(self) -> None:
        """Unload it."""
        ...


@dataclass
class _Program:
    session: bytes
    name: str
    road: str
    size: int
    maps: int
    input_max: int
    loaded: Loaded
    start: Callable[[], int]
    runs: int = 0


class Injections:
    """The injected programs of one agent.

    :param cpus: possible CPUs, for what a map of one value a CPU takes
    :param allowed: whether programs are accepted at all (``agent.pyz serve --allow-injection``)
    """

    def __init__(self, allowed: bool, cpus: int = 1) -> None:
        self._allowed = allowed
        self._cpus = cpus
        self._programs: OrderedDict[int, _Program] = OrderedDict()
        self._numbers = itertools.count(1)

    def add(self, session: bytes, name: str, data: bytes) -> int:
        """Load a program for a session and return its number.

        :raises InjectionError: it is refused before the kernel sees it
        :raises LoadError: libbpf or the verifier refused it; the text tells the line, ``log`` all of it
        """
        if not self._allowed:
            raise InjectionError(
                "injection", "this agent takes no programs: start it with `agent.pyz serve --allow-injection`"
            )
        if not 0 < len(name) <= NAME_MAX or not name.isprintable():
            raise InjectionError("injection", f"a program's name is 1 to {NAME_MAX} printable characters")
        if len(data) > SIZE_MAX:
            raise InjectionError("oversize", f"the program is {len(data)} bytes, at most {SIZE_MAX} are taken")
        own = sum(program.session == session for program in self._programs.values())
        if own >= PER_SESSION:
            raise InjectionError(
                "injection", f"this session holds {own} programs, the most it may: close one that is done"
            )
        taken = most = 0

        def accept(contents: Contents) -> None:
            nonlocal taken, most
            taken = self._check(contents)
            most = next(found.value_size for found in contents.maps if found.name == "input") - INPUT_HEAD.size

        loaded: Loaded
        if data.startswith(b"\x7fELF"):
            loaded = programs = Programs(data, accept)
            road = "CO-RE"

            def start() -> int:
                return programs.run(PROGRAM)

            instructions = programs.instructions(PROGRAM)
        elif data.startswith(MAGIC):
            try:
                bundle = Bundle.parse(data)
            except BundleError as error:
                raise InjectionError("injection", str(error)) from None
            instructions = bundle.instructions
            accept(Contents([(PROGRAM, SECTION)], bundle.maps))
            check_helpers(instructions)
            loaded = bytecode = Bytecode(bundle)
            road, start = "bytecode", bytecode.run
        else:
            raise InjectionError("injection", "this is neither an eBPF object (ELF) nor a bundle of bytecode")
        try:
            # Before its first run a loaded program has done nothing.
            check_helpers(instructions)
            loaded.map("input"), loaded.map("output")
        except BaseException:
            loaded.close()
            raise
        self._make_room(taken)
        number = next(self._numbers)
        self._programs[number] = _Program(session, name, road, len(data), taken, most, loaded, start)
        log.info("program %d %r loaded (%s, %d bytes, maps %d bytes)", number, name, road, len(data), taken)
        return number

    def run(self, session: bytes, number: int, data: bytes) -> bytes:
        """Run a program: ``data`` is its input, what it put out is returned with its header.

        :raises InjectionError: there is no such program, the input is too long, or the program gave up
        """
        program = self._own(session, number)
        self._programs.move_to_end(number)
        given, output = program.loaded.map("input"), program.loaded.map("output")
        if len(data) > program.input_max:
            raise InjectionError("oversize", f"{len(data)} bytes of input, one run takes at most {program.input_max}")
        INPUT_HEAD.pack_into(given, 0, len(data))
        given[INPUT_HEAD.size : INPUT_HEAD.size + len(data)] = data
        output[: OUTPUT_HEAD.size] = bytes(OUTPUT_HEAD.size)
        try:
            status = program.start()
        except OSError as error:
            raise InjectionError("program-gave-up", f"{program.name} did not run: {error.strerror}") from None
        program.runs += 1
        if status:
            raise InjectionError(
                "program-gave-up", f"{program.name} returned {status}, which is its own word for a failure"
            )
        used = int(OUTPUT_HEAD.unpack_from(output)[0])
        if used > len(output) - OUTPUT_HEAD.size:
            raise InjectionError("injection", f"{program.name} says it put out {used} bytes, more than its map holds")
        return bytes(output[: OUTPUT_HEAD.size + used])

    def listing(self, session: bytes) -> list[list[Any]]:
        """All programs: number, name, road, bytes, bytes of maps, runs so far, whether the asking session owns it."""
        return [
            [number, held.name, held.road, held.size, held.maps, held.runs, held.session == session]
            for number, held in self._programs.items()
        ]

    def eject(self, session: bytes, number: int) -> None:
        """Unload a program. :raises InjectionError: there is no such program in this session"""
        self._own(session, number)
        self._unload(number)

    def end(self, session: bytes) -> None:
        """Unload a session's programs."""
        for number in [number for number, program in self._programs.items() if program.session == session]:
            self._unload(number)

    def close(self) -> None:
        """Unload all programs."""
        for number in list(self._programs):
            self._unload(number)

    def _own(self, session: bytes, number: int) -> _Program:
        program = self._programs.get(number)
        if program is None or program.session != session:
            raise InjectionError("no-program", f"there is no program {number} in this session; inject it again")
        return program

    def _unload(self, number: int) -> None:
        program = self._programs.pop(number)
        program.loaded.close()
        log.info("program %d %r unloaded after %d runs", number, program.name, program.runs)

    def _make_room(self, maps: int) -> None:
        while self._programs and (
            len(self._programs) >= IN_ALL or maps + sum(held.maps for held in self._programs.values()) > MAPS_IN_ALL
        ):
            self._unload(next(iter(self._programs)))

    def _check(self, contents: Contents) -> int:
        """What the maps of an acceptable object take, bytes. :raises InjectionError: it is not acceptable"""
        for name, section in contents.programs:
            if (name, section) != (PROGRAM, SECTION):
                raise InjectionError(
                    "injection",
                    f'the object holds a program {name!r} in section {section!r}; the one accepted is SEC("{SECTION}") '
                    f"int {PROGRAM}(void *)",
                )
        if len(contents.programs) != 1:
            raise InjectionError(
                "injection", f'the object holds no program: it must have SEC("{SECTION}") int {PROGRAM}'
            )
        maps = {definition.name: definition for definition in contents.maps}
        for name in ("input", "output"):
            found = maps.get(name)
            if found is None or not found.mappable or found.entries != 1 or found.value_size <= OUTPUT_HEAD.size:
                raise InjectionError("injection", f"the object has no map {name!r} as bpf/inject.h declares it")
        taken = 0
        for definition in contents.maps:
            if definition.kind not in _ARRAYS_AND_HASHES or definition.pinned:
                raise InjectionError(
                    "injection",
                    f"map {definition.name!r} is {'pinned' if definition.pinned else f'of type {definition.kind}'}; "
                    "arrays and hashes of the program's own are accepted",
                )
            taken += definition.bytes(1 if _ARRAYS_AND_HASHES[definition.kind] else self._cpus)
        if taken > MAPS_MAX:
            raise InjectionError("oversize", f"the program's maps take {taken} bytes, at most {MAPS_MAX} are given")
        return taken


def check_helpers(instructions: bytes) -> None:
    """:raises InjectionError: the program calls what it may not"""
    for at in range(0, len(instructions), INSTRUCTION):
        if instructions[at] == _CALL:
            source = instructions[at + 1] >> 4
            number = int.from_bytes(instructions[at + 4 : at + 8], "little")
            if source == 2:
                raise InjectionError(
                    "injection", "the program calls a kernel function (kfunc); only helpers are accepted"
                )
            if source == 0 and number not in HELPERS:
                raise InjectionError(
                    "injection",
                    f"the program calls helper {number}, which is not among those that only read "
                    "(docs/injection.md lists them)",
                )


def explain(error: LoadError) -> str:
    """One line on why a program was not loaded, out of the log where that tells more."""
    words = [line.strip() for line in error.log.splitlines()]
    relocation = next((line for line in words if "failed to resolve CO-RE relocation" in line), None)
    if relocation:
        named = re.search(r"\] (.+?) \(", relocation)
        return f"this kernel has no {named[1] if named else relocation}, by its BTF"
    if re.search(r"kernel BTF is missing|find valid kernel BTF", error.log):
        return (
            "this kernel shows no BTF, by which a CO-RE object finds its members: compile the program against the "
            "kernel's headers instead (headers=..., see docs/injection.md)"
        )
    telling = verdict(error.log)
    return f"the verifier refused the program{telling}" if telling else str(error)


def verdict(text: str) -> str:
    """The verifier's last word and the source line it stood at, from its log; nothing when there is none."""
    begin = text.rfind("BEGIN PROG LOAD LOG --")
    lines = [line.strip() for line in (text[begin:].splitlines()[1:] if begin >= 0 else text.splitlines())]
    ends = [at for at, line in enumerate(lines) if line.startswith(("processed ", "-- END PROG LOAD LOG"))]
    lines = lines[: ends[0]] if ends else lines
    said = [line for line in lines if line and not _INSTRUCTION.match(line) and not line.startswith(";")]
    if not said or (begin < 0 and not ends):
        return ""
    source = next((line[1:].strip() for line in reversed(lines) if line.startswith(";") and len(line) > 3), "")
    # Newer kernels say where the line is: "; walk.at = 0; @ file.c:37".
    line, _, place = source.partition(" @ ")
    return f"{f' at {place}' if place else ''}{f' `{line}`' if line else ''}: {said[-1]}"


_INSTRUCTION = re.compile(
    r"\d+: \(|(from )?\d+ (to|:) |R\d+(_w)?=|\d+: R\d|\d+: <|frame\d|mark_precise|arg#|libbpf:|func#|last_idx|regs="
    r"|parent |caller|callee|returning from|to caller at|propagating |(cur|old) state|verification time|stack depth"
)


def cut(text: str) -> bytes:
    """The end of a log, as it is sent."""
    data = text.encode()
    if len(data) <= LOG_MAX:
        return data
    return f"[{len(data) - LOG_MAX} bytes before this are left out]\n".encode() + data[-LOG_MAX:]
