"""Load a program into a guest's agent, run it, and get what it read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from vmishim.errors import LinkError
from vmishim.guests.target import Agent, Target
from vmishim.inject.clang import compile_core
from vmishim.inject.errors import InjectError
from vmishim.memory.reader import KERNEL_FLOOR, Extent
from vmishim.wire.injection import EXTENT_HEAD, MAGIC, OUTPUT_HEAD
from vmishim.wire.messages import (
    Answer,
    Eject,
    Failure,
    Inject,
    Injected,
    Memory,
    Message,
    Rejected,
    Run,
    decode,
    encode,
)

LOAD_TIMEOUT = 120.0
"""Seconds that the agent may take to load a program: the verifier checks up to a million instructions, which took 50 s
in an emulated guest."""
_ELF = b"\x7fELF"


class Extents(list[Extent]):
    """The output of one run, in the program's order. An extent without data could not be read.

    :ivar faults: how many reads of the program failed, whether for extents or not; ``fault_at`` is the first address
    :ivar truncated: why the output is incomplete (it was full, or a loop reached its bound), or None
    """

    def __init__(self, extents: Iterable[Extent], faults: int, fault_at: int, truncated: str | None) -> None:
        super().__init__(extents)
        self.faults = faults
        self.fault_at = fault_at
        self.truncated = truncated

    def __repr__(self) -> str:
        more = f", truncated: {self.truncated}" if self.truncated else ""
        return f"<{len(self)} extents, {self.faults} faults{more}>"


class Listed(NamedTuple):
    """A program in the agent.

    :ivar format: ``CO-RE`` or ``bytecode``
    :ivar size: bytes of the object
    :ivar maps: bytes its maps take in the guest
    :ivar own: whether this session injected it
    """

    number: int
    name: str
    format: str
    size: int
    maps: int
    runs: int
    own: bool


class InjectedProgram:
    """A program in the agent, which you can run any number of times. A context manager that unloads it at the end.

    The agent unloads it by itself when the session ends, or when other programs need its room; the next `run` then
    loads it again.
    """

    def __init__(self, target: Target, name: str, data: bytes) -> None:
        self.name = name
        self._agent = _agent(target)
        if self._agent.sealed:
            raise InjectError(
                f"{target.name}'s kernel encrypts what is read, but only its agent would vouch for a program's output: "
                "injection is refused"
            )
        self._data = data
        self._number: int | None = None
        self._load()

    def run(self, input: bytes = b"") -> Extents:
        """Run it once. What it reads becomes known to the read-ahead too.

        :param input: what ``INPUT`` gives the program, at most 64 KiB
        :raises InjectError: it did not return 0, or is closed
        :raises LinkError: the agent could not be asked
        """
        if self._number is None:
            raise InjectError(f"the program {self.name} is closed")
        try:
            reply = _ask(self._agent, Run(self._number, input), Memory)
        except _GoneError:
            self._load()
            reply = _ask(self._agent, Run(self._number, input), Memory)
        extents = parse_output(reply.bulk)
        self._agent.learned([extent for extent in extents if extent.data and extent.address >= KERNEL_FLOOR])
        return extents

    def close(self) -> None:
        """Unload it. A second call does nothing."""
        number, self._number = self._number, None
        if number is not None:
            with contextlib.suppress(_GoneError):  # unloaded by the agent already
                _ask(self._agent, Eject(number), Answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._number is None else f"number {self._number}"
        return f"<InjectedProgram {self.name!r}, {state}>"

    def _load(self) -> None:
        values = _ask(self._agent, Inject(self.name, self._data), Answer, LOAD_TIMEOUT).values
        if len(values) != 1 or type(values[0]) is not int:
            raise LinkError("the agent loaded the program, but sent no number for it")
        self._number = values[0]


def inject(
    target: Target,
    program: str | bytes | Path,
    *,
    name: str = "",
    headers: Path | None = None,
    vmlinux: Path | None = None,
) -> InjectedProgram:
    """Load a program into a guest's agent.

    :param program: C source as a string, a file of it, or an object: an ELF file's or bundle's bytes, or that file
    :param name: what `injected` will call it; default: the file's name
    :param headers: kernel headers to compile against by bcc, for a guest without BTF: see `vmishim.inject.bcc`
    :param vmlinux: for a source that includes ``vmlinux.h``: that file, or BTF to make it from; see `compile_core`
    :raises CompileError: it does not compile
    :raises InjectError: the guest has no agent, or it refuses programs, or this one; ``log`` says more
    :raises LinkError: the agent could not be asked
    """
    data = program if isinstance(program, bytes) else b""
    if isinstance(program, Path):
        name = name or program.name.split(".")[0]
        try:
            data = program.read_bytes()
        except OSError as error:
            raise InjectError(f"cannot read the program {program}: {error.strerror}") from None
    if not data.startswith((_ELF, MAGIC)):
        if isinstance(program, bytes):
            raise InjectError("these bytes are not an eBPF object; pass C source as a string, or the Path of a file")
        if headers is not None:
            from vmishim.inject.bcc import compile_by_headers

            data = compile_by_headers(program, headers)
        else:
            data = compile_core(program, vmlinux=vmlinux)
    return InjectedProgram(target, name or "program", data)


def injected(target: Target) -> list[Listed]:
    """The programs in a guest's agent, those of other sessions too. :raises LinkError: the agent could not be asked"""
    try:
        return [Listed(*values) for values in _ask(_agent(target), Injected(), Answer).values]
    except TypeError:
        raise LinkError("the agent sent a malformed list of programs") from None


def parse_output(data: bytes) -> Extents:
    """The extents in the output of a run. :raises LinkError: it is malformed"""
    if len(data) < OUTPUT_HEAD.size:
        raise LinkError("the agent sent a program's output without its header")
    used, faults, fault_at, truncated = OUTPUT_HEAD.unpack_from(data)
    extents = []
    at, end = OUTPUT_HEAD.size, OUTPUT_HEAD.size + used
    while at < end and end == len(data):
        if at + EXTENT_HEAD.size > end:
            break
        address, length, wanted = EXTENT_HEAD.unpack_from(data, at)
        at += EXTENT_HEAD.size
        if length > wanted or at + length > end:
            break
        extents.append(Extent(address, data[at : at + length]))
        at += -(-length // 8) * 8
    if at != end or end != len(data):
        raise LinkError("a program's output is not made of extents: a program must write it by inject.h")
    return Extents(extents, faults, fault_at, _TRUNCATED.get(truncated, f"the program says {truncated}"))


_TRUNCATED = {0: None, 1: "the output is full", 2: "a loop reached its bound"}


class _GoneError(InjectError):
    """The agent no longer has the program."""


M = TypeVar("M", bound=Message)


def _agent(target: Target) -> Agent:
    if target.agent is None:
        raise InjectError(f"{target.name} has no agent, and only an agent can run a program")
    return target.agent


def _ask(agent: Agent, request: Message, kind: type[M], timeout: float | None = None) -> M:
    allowed = None if timeout is None else max(timeout, agent.link.timeout)
    reply = decode(agent.link.exchange(encode(request), allowed))
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Rejected):
        raise InjectError(reply.text, reply.bulk.decode(errors="replace"))
    if isinstance(reply, Failure):
        raise (_GoneError if reply.code == "no-program" else InjectError)(reply.text)
    raise LinkError(f"the agent sent {type(reply).__name__} in reply to a request for {kind.__name__}")
