"""Load injected programs in a separate process, the only one that keeps privileges while the agent serves.

An injected program may only read, and only for seconds: it can call no kernel helper that does more, and what its
loops can do at most is counted (`guest_agent.steps`). It comes in one of two formats, recognized by the first bytes: an
ELF object, which libbpf loads with CO-RE, or a bytecode bundle (`bytecode`).

The process is forked before the agent holds its key or any program. It keeps ``CAP_BPF`` and ``CAP_PERFMON``, has its
own seccomp filter, takes a program's bytes from a socket and sends back the descriptors of what it loaded. It cannot
run, attach or look up programs, nor reach the network; the agent's bpf(2) can only run the programs it receives.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from dataclasses import dataclass
from struct import Struct

from guest_agent import sandbox
from guest_agent.bytecode import Bytecode
from guest_agent.programs import Contents, LoadError, Programs, libbpf, program_info
from guest_agent.sandbox import Call
from guest_agent.steps import StepsError, check_steps
from vmishim.errors import LibvmiError
from vmishim.wire.injection import INSTRUCTION, MAGIC, OUTPUT_HEAD, Bundle, BundleError

log = logging.getLogger(__name__)

SIZE_MAX = 1 << 20
"""Bytes of one object."""
MAPS_MAX = 16 << 20
"""Bytes that the maps of one program may take; a program with a full-size output needs little more than one MiB."""
PROGRAM, SECTION = "run", "syscall"
"""Name and section of an object's only program, see docs/injection.md."""

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
"""Accepted values of enum bpf_map_type; 0 marks those that hold a value per CPU."""
_CALL = 0x85


class InjectionError(LibvmiError):
    """A request about injected programs cannot be met. ``code`` is one word for `vmishim.wire.messages.Failure`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Loaded:
    """The descriptors of a program in the kernel. Closing them unloads it."""

    format: str
    """``CO-RE`` or ``bytecode``."""
    maps: int
    """Bytes that its maps take."""
    input_size: int
    output_size: int
    """Bytes of the values of its input and output maps."""
    descriptors: tuple[int, int, int]
    """Of the program, its input map and its output map."""

    def close(self) -> None:
        """Unload it."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def load(data: bytes, cpus: int) -> Loaded:
    """Load a program, with the privileges of this process.

    :param cpus: number of possible CPUs, to size per-CPU maps
    :raises InjectionError: it is refused, before the kernel sees it or before its first run
    :raises LoadError: libbpf or the verifier refused it; the text names the line, ``log`` is the whole log
    """
    contents = Contents([], [])
    taken = 0

    def accept(found: Contents) -> None:
        nonlocal contents, taken
        contents, taken = found, check_contents(found, cpus)

    held: Programs | Bytecode
    if data.startswith(b"\x7fELF"):
        held, format = Programs(data, accept), "CO-RE"
        instructions = held.instructions(PROGRAM)
    elif data.startswith(MAGIC):
        try:
            bundle = Bundle.parse(data)
        except BundleError as error:
            raise InjectionError("injection", str(error)) from None
        instructions = bundle.instructions
        accept(Contents([(PROGRAM, SECTION)], bundle.maps))
        check_helpers(instructions)
        held, format = Bytecode(bundle), "bytecode"
    else:
        raise InjectionError("injection", "this is neither an eBPF object (ELF) nor a bytecode bundle")
    try:
        # Checking after the load is safe: the program has not run yet.
        check_helpers(instructions)
        try:
            check_steps(instructions, contents.maps, cpus, program_info(held.program(PROGRAM)).verified)
        except StepsError as error:
            raise InjectionError("too-long", str(error)) from None
        sizes = {definition.name: definition.value_size for definition in contents.maps}
        program, given, output = held.program(PROGRAM), held.map_descriptor("input"), held.map_descriptor("output")
        return Loaded(format, taken, sizes["input"], sizes["output"], (os.dup(program), os.dup(given), os.dup(output)))
    finally:
        held.close()


def check_contents(contents: Contents, cpus: int) -> int:
    """Return the bytes that the object's maps take. :raises InjectionError: the object is not acceptable"""
    for name, section in contents.programs:
        if (name, section) != (PROGRAM, SECTION):
            raise InjectionError(
                "injection",
                f'the object holds a program {name!r} in section {section!r}; the one accepted is SEC("{SECTION}") '
                f"int {PROGRAM}(void *)",
            )
    if len(contents.programs) != 1:
        raise InjectionError("injection", f'the object holds no program: it must have SEC("{SECTION}") int {PROGRAM}')
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
        taken += definition.bytes(1 if _ARRAYS_AND_HASHES[definition.kind] else cpus)
    if taken > MAPS_MAX:
        raise InjectionError("oversize", f"the program's maps take {taken} bytes, at most {MAPS_MAX} are given")
    return taken


def check_helpers(instructions: bytes) -> None:
    """Check what a program calls. :raises InjectionError: a kernel function, or a helper that is not in `HELPERS`"""
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
                    f"the program calls helper {number}, which is not one of those that only read "
                    "(docs/injection.md lists them)",
                )


# ---- the process -----------------------------------------------------------------------------------------------------

PRIVILEGES = (38, 39)
"""CAP_PERFMON, CAP_BPF"""
_HEAD = Struct("<Q")  # before each message: its size in bytes
_MAP_CREATE, _MAP_UPDATE_ELEM, _PROG_LOAD, _OBJ_GET_INFO_BY_FD, _BTF_LOAD = 0, 2, 5, 15, 18  # enum bpf_cmd
_MAP_FREEZE, _PROG_BIND_MAP = 22, 35


def calls() -> list[Call]:
    """The system calls that loading needs. libbpf opens the kernel's BTF for each load, so this allows opening any file
    for reading: no gain to an attacker who can already load programs that read kernel memory."""
    names = (
        "read recvfrom recvmsg sendmsg close lseek fstat stat newfstatat access faccessat faccessat2 uname "
        # libbpf >= 1.4 reserves the maps' descriptors with a memfd before it creates the maps.
        "memfd_create dup3"
    )
    commands = (
        *(_MAP_CREATE, _MAP_UPDATE_ELEM, _MAP_FREEZE, _BTF_LOAD),
        *(_PROG_LOAD, _PROG_BIND_MAP, _OBJ_GET_INFO_BY_FD),
    )
    return [
        *map(Call, names.split()),
        *(Call("bpf", 0, sandbox.INT, command) for command in commands),
        Call("openat", 2, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, os.O_RDONLY),
        *sandbox.process(),
    ]


class Loader:
    """The agent's side of the loading process. Call it to load a program.

    The constructor forks: call it before the first thread starts, and before this process holds anything that the child
    must not have. The child ends when this process does.

    :param cpus: as for `load`
    """

    def __init__(self, cpus: int) -> None:
        libbpf()  # before `confine`: loading a library needs executable memory
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            # The child must never return into the agent's code, so it exits here in every case.
            try:
                self._socket.close()
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent; the child ends with it
                sandbox.drop_capabilities(PRIVILEGES)
                sandbox.confine(calls(), PRIVILEGES)
                _serve(theirs, cpus)
                os._exit(0)
            except BaseException:
                log.exception("the process that loads programs failed and ends; restart the agent")
                os._exit(1)
        theirs.close()

    def __call__(self, data: bytes) -> Loaded:
        """Load a program.

        :raises InjectionError: it is refused before the kernel sees it, or the loading process has ended
        :raises LoadError: as `load`
        """
        try:
            self._socket.sendall(_HEAD.pack(len(data)) + data)
            text, descriptors = _receive(self._socket)
        except (EOFError, OSError):
            raise InjectionError(
                "injection",
                "the agent's process that loads programs has ended, see the agent's log; restart the agent",
            ) from None
        reply = json.loads(text)
        match reply["kind"]:
            case "loaded":
                format, maps, input_size, output_size = reply["values"]
                program, given, output = descriptors
                return Loaded(format, maps, input_size, output_size, (program, given, output))
            case "refused":
                raise InjectionError(*reply["values"])
            case _:
                raise LoadError(*reply["values"])

    def close(self) -> None:
        """End the process."""
        self._socket.close()


def _serve(agent: socket.socket, cpus: int) -> None:
    while True:
        try:
            data, _ = _receive(agent)
        except EOFError:
            return
        try:
            loaded = load(data, cpus)
        except InjectionError as error:
            _reply(agent, "refused", [error.code, str(error)])
        except LoadError as error:
            _reply(agent, "rejected", [str(error), error.log])
        else:
            values = [loaded.format, loaded.maps, loaded.input_size, loaded.output_size]
            _reply(agent, "loaded", values, loaded.descriptors)
            loaded.close()


def _reply(agent: socket.socket, kind: str, values: list[object], descriptors: tuple[int, ...] = ()) -> None:
    data = json.dumps({"kind": kind, "values": values}).encode()
    socket.send_fds(agent, [_HEAD.pack(len(data))], descriptors)
    while data:
        data = data[agent.sendmsg([data]) :]


def _receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message and its descriptors. :raises EOFError: the peer has closed the connection"""
    head, descriptors, _, _ = socket.recv_fds(peer, _HEAD.size, 3, socket.MSG_WAITALL)
    if len(head) < _HEAD.size:
        raise EOFError
    (size,) = _HEAD.unpack(head)
    data = bytearray()
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data), descriptors
