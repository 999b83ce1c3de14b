"""Load a program given as bare instructions, compiled by bcc against one kernel's headers: for kernels without BTF.

libbpf loads only ELF objects, so this creates the maps, patches their descriptors into the instructions and calls
bpf(2) itself. Layouts: ``union bpf_attr`` in include/uapi/linux/bpf.h. ``vmishim.inject.bcc`` makes the
bundle that carries the instructions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from guest_agent.programs import LoadError
from vmishim.wire.injection import INSTRUCTION, Bundle, MapDefinition

LOG_SIZE = 16 << 20
"""Size of the verifier's log: ``BPF_MAX_LOG_SIZE`` of older kernels (5.1 to 6.3: kernel/bpf/verifier.c)."""

_SYSCALL = 321  # x86-64, arch/x86/entry/syscalls/syscall_64.tbl
_MAP_CREATE, _PROG_LOAD = 0, 5  # enum bpf_cmd
_TYPE_SYSCALL = 31  # enum bpf_prog_type
_SLEEPABLE = 1 << 4  # BPF_F_SLEEPABLE: without it the kernel refuses the type (9e4e01dfd325 and verifier.c)
_MAP = struct.Struct("<7I16s")
_LOAD = struct.Struct("<IIQQIIQII16s")
_PSEUDO_MAP_FD = 1


class Bytecode:
    """A loaded bundle: its maps and its only program.

    :raises LoadError: it was compiled for another kernel, or the kernel refused it (``log`` is the verifier's log)
    """

    def __init__(self, bundle: Bundle) -> None:
        running = os.uname().release
        if bundle.release != running:
            raise LoadError(
                f"the program was compiled against the headers of Linux {bundle.release}, but this is {running}, where "
                "structures may differ: compile it against this kernel's headers"
            )
        self._descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        try:
            instructions = bytearray(bundle.instructions)
            descriptors = [self._create(definition) for definition in bundle.maps]
            for at, number in bundle.patches:
                base = at * INSTRUCTION
                instructions[base + 1] = instructions[base + 1] & 15 | _PSEUDO_MAP_FD << 4
                struct.pack_into("<i", instructions, base + 4, descriptors[number])
                struct.pack_into("<i", instructions, base + 12, 0)
            self._program = self._load(bytes(instructions), bundle.license.encode())
        except BaseException:
            self.close()
            raise

    def program(self, name: str) -> int:
        """The descriptor of the bundle's only program, valid until `close`; the name does not matter."""
        return self._program

    def map_descriptor(self, name: str) -> int:
        """A map's descriptor, valid until `close`. :raises KeyError: no such map"""
        return self._maps[name]

    def close(self) -> None:
        """Unload the program."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _create(self, definition: MapDefinition) -> int:
        attributes = _MAP.pack(
            definition.kind,
            definition.key_size,
            definition.value_size,
            definition.entries,
            definition.flags,
            0,
            0,
            definition.name.encode()[:15],
        )
        try:
            descriptor = _bpf(_MAP_CREATE, ctypes.create_string_buffer(attributes, len(attributes)))
        except OSError as error:
            raise LoadError(
                f"map {definition.name!r} could not be created: {error.strerror}{_privilege(error)}"
            ) from None
        self._descriptors.append(descriptor)
        self._maps[definition.name] = descriptor
        return descriptor

    def _load(self, instructions: bytes, license_text: bytes) -> int:
        program = ctypes.create_string_buffer(instructions, len(instructions))
        words = ctypes.create_string_buffer(license_text)
        count = len(instructions) // INSTRUCTION

        def load(level: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
            attributes = _LOAD.pack(
                _TYPE_SYSCALL,
                count,
                ctypes.addressof(program),
                ctypes.addressof(words),
                level,
                len(log) if log else 0,
                ctypes.addressof(log) if log else 0,
                0,
                _SLEEPABLE,
                b"run",
            )
            return _bpf(_PROG_LOAD, ctypes.create_string_buffer(attributes, len(attributes)))

        try:
            descriptor = load(0, None)
        except OSError as error:
            first = error
            log = ctypes.create_string_buffer(LOG_SIZE)
            try:
                descriptor = load(1, log)  # a transient error such as EAGAIN may not recur
            except OSError:
                text = log.value.decode(errors="replace")
                why = errno.errorcode.get(first.errno or 0, str(first.errno))
                raise LoadError(
                    f"the kernel refused the program ({why}){'' if text else _privilege(first)}", text
                ) from None
        self._descriptors.append(descriptor)
        return descriptor


def _privilege(error: OSError) -> str:
    return ": loading needs root, or CAP_BPF and CAP_PERFMON" if error.errno == errno.EPERM else ""


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    """Call bpf(2). :raises OSError: it failed"""
    result = int(
        _libc.syscall(ctypes.c_long(_SYSCALL), ctypes.c_int(command), attributes, ctypes.c_uint(len(attributes)))
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
