"""Keep the programs that IDSs inject, by session and bounded; run and unload them. `guest_agent.loader` loads them."""

from __future__ import annotations

import itertools
import logging
import mmap
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guest_agent.loader import SIZE_MAX, InjectionError, Loaded
from guest_agent.programs import LoadError, run_program
from vmishim.wire.injection import INPUT_HEAD, OUTPUT_HEAD

log = logging.getLogger(__name__)

PER_SESSION = 8
"""Programs that one session may hold."""
IN_ALL = 32
"""Programs held for all sessions together; a new one displaces the least recently used."""
MAPS_IN_ALL = 64 << 20
"""Bytes that the maps of all programs together may take."""
LOG_MAX = 512 << 10
"""Bytes of a verifier's log that are sent: the end of it, which says what was wrong."""
NAME_MAX = 64
"""Characters of a program's name."""


@dataclass
class _Program:
    session: bytes
    name: str
    size: int
    loaded: Loaded
    given: mmap.mmap
    output: mmap.mmap
    runs: int = 0


class Injections:
    """The injected programs of one agent.

    :param load: loads a program, see `guest_agent.loader.Loader`; without it none is accepted
        (``agent.pyz serve --allow-injection`` provides it)
    """

    def __init__(self, load: Callable[[bytes], Loaded] | None = None) -> None:
        self._load = load
        self._programs: OrderedDict[int, _Program] = OrderedDict()
        self._numbers = itertools.count(1)

    def add(self, session: bytes, name: str, data: bytes) -> int:
        """Load a program for a session and return its number.

        :raises InjectionError: it is refused before the kernel sees it
        :raises LoadError: libbpf or the verifier refused it; the text names the line, ``log`` is the whole log
        """
        if self._load is None:
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
                "injection",
                f"this session holds {own} programs, as many as are allowed: close one that you no longer need",
            )
        loaded = self._load(data)
        _, given, output = loaded.descriptors
        try:
            shared = _map(given, loaded.input_size), _map(output, loaded.output_size)
        except BaseException:
            loaded.close()
            raise
        self._make_room(loaded.maps)
        number = next(self._numbers)
        self._programs[number] = _Program(session, name, len(data), loaded, *shared)
        log.info(
            "program %d %r loaded (%s, %d bytes, maps %d bytes)", number, name, loaded.format, len(data), loaded.maps
        )
        return number

    def run(self, session: bytes, number: int, data: bytes) -> bytes:
        """Run a program on the input ``data`` and return its output, which starts with `OUTPUT_HEAD`.

        :raises InjectionError: there is no such program, the input is too long, or the program failed
        """
        program = self._own(session, number)
        self._programs.move_to_end(number)
        given, output, most = program.given, program.output, program.loaded.input_size - INPUT_HEAD.size
        if len(data) > most:
            raise InjectionError("oversize", f"{len(data)} bytes of input, one run takes at most {most}")
        INPUT_HEAD.pack_into(given, 0, len(data))
        given[INPUT_HEAD.size : INPUT_HEAD.size + len(data)] = data
        output[: OUTPUT_HEAD.size] = bytes(OUTPUT_HEAD.size)
        try:
            status = run_program(program.loaded.descriptors[0])
        except OSError as error:
            raise InjectionError("program-gave-up", f"{program.name} did not run: {error.strerror}") from None
        program.runs += 1
        if status:
            raise InjectionError("program-gave-up", f"{program.name} returned {status}, a failure: 0 is success")
        used = int(OUTPUT_HEAD.unpack_from(output)[0])
        if used > len(output) - OUTPUT_HEAD.size:
            raise InjectionError(
                "injection", f"{program.name} claims to have written {used} bytes of output, more than its map holds"
            )
        return bytes(output[: OUTPUT_HEAD.size + used])

    def listing(self, session: bytes) -> list[list[Any]]:
        """All programs: number, name, format, bytes, bytes of maps, runs so far, whether ``session`` owns it."""
        return [
            [number, held.name, held.loaded.format, held.size, held.loaded.maps, held.runs, held.session == session]
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
        program.given.close()
        program.output.close()
        program.loaded.close()
        log.info("program %d %r unloaded after %d runs", number, program.name, program.runs)

    def _make_room(self, maps: int) -> None:
        def full() -> bool:
            taken = sum(held.loaded.maps for held in self._programs.values())
            return len(self._programs) >= IN_ALL or maps + taken > MAPS_IN_ALL

        while self._programs and full():
            self._unload(next(iter(self._programs)))


def _map(descriptor: int, value_size: int) -> mmap.mmap:
    return mmap.mmap(descriptor, -(-value_size // mmap.PAGESIZE) * mmap.PAGESIZE)


def explain(error: LoadError) -> str:
    """Say in one line why a program was not loaded, from the log if it says more than the error."""
    words = [line.strip() for line in error.log.splitlines()]
    relocation = next((line for line in words if "failed to resolve CO-RE relocation" in line), None)
    if relocation:
        named = re.search(r"\] (.+?) \(", relocation)
        return f"this kernel has no {named[1] if named else relocation} in its BTF"
    if re.search(r"kernel BTF is missing|find valid kernel BTF", error.log):
        return (
            "this kernel has no BTF, which a CO-RE object needs: compile the program against the "
            "kernel's headers instead (headers=..., see docs/injection.md)"
        )
    telling = verdict(error.log)
    return f"the verifier refused the program{telling}" if telling else str(error)


def verdict(text: str) -> str:
    """The verifier's last message in a log and the source line it is about; empty if the log has none."""
    begin = text.rfind("BEGIN PROG LOAD LOG --")
    lines = [line.strip() for line in (text[begin:].splitlines()[1:] if begin >= 0 else text.splitlines())]
    ends = [at for at, line in enumerate(lines) if line.startswith(("processed ", "-- END PROG LOAD LOG"))]
    lines = lines[: ends[0]] if ends else lines
    said = [line for line in lines if line and not _INSTRUCTION.match(line) and not line.startswith(";")]
    if not said or (begin < 0 and not ends):
        return ""
    source = next((line[1:].strip() for line in reversed(lines) if line.startswith(";") and len(line) > 3), "")
    # Newer kernels append where the line is: "; walk.at = 0; @ file.c:37".
    line, _, place = source.partition(" @ ")
    return f"{f' at {place}' if place else ''}{f' `{line}`' if line else ''}: {said[-1]}"


_INSTRUCTION = re.compile(
    r"\d+: \(|(from )?\d+ (to|:) |R\d+(_w)?=|\d+: R\d|\d+: <|frame\d|mark_precise|arg#|libbpf:|func#|last_idx|regs="
    r"|parent |caller|callee|returning from|to caller at|propagating |(cur|old) state|verification time|stack depth"
)


def cut(text: str) -> bytes:
    """Encode a log for sending; of a long one, only the end."""
    data = text.encode()
    if len(data) <= LOG_MAX:
        return data
    return f"[{len(data) - LOG_MAX} bytes of the log before this were cut]\n".encode() + data[-LOG_MAX:]
