"""The eBPF programs, loaded once and run on request: the only module that talks to libbpf.

libbpf is called through ctypes (``libbpf.so.1``, Debian's libbpf1 >= 1.1): it has no maintained Python binding, and we
need only the functions declared in `libbpf`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmishim.errors import LibvmiError
from vmishim.kernel.btf import Btf
from vmishim.wire.injection import INSTRUCTION, MapDefinition

PAGE = mmap.PAGESIZE


class LoadError(LibvmiError):
    """A program could not be loaded. The text says why and what to do; ``log`` is the verifier's log."""

    def __init__(self, text: str, log: str = "") -> None:
        super().__init__(text)
        self.log = log


class _TestRun(Structure):
    """libbpf's ``struct bpf_test_run_opts``."""

    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    ]


_NOTHING_GIVEN = _TestRun(sz=ctypes.sizeof(_TestRun))


@dataclass(frozen=True)
class Contents:
    """What is in an object: (name, section) of each program, and the maps."""

    programs: list[tuple[str, str]]
    maps: list[MapDefinition]


def run_program(program: int, context: bytes = b"", packet: bytes = b"") -> int:
    """Run the program behind a descriptor and return its return value.

    :param context: what a ``SEC("syscall")`` program is given
    :param packet: what a ``SEC("tc")`` program is given
    :raises OSError: the kernel did not run it
    """
    options = _NOTHING_GIVEN
    if context or packet:
        options = _TestRun(sz=ctypes.sizeof(_TestRun))
        options.ctx_in, options.ctx_size_in = _pointer(context), len(context)
        options.data_in, options.data_size_in = _pointer(packet), len(packet)
    result = libbpf().bpf_prog_test_run_opts(program, byref(options))
    if result:
        raise OSError(-result, f"BPF_PROG_TEST_RUN: {os.strerror(-result)}")
    return int(options.retval)


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel says of a loaded program (``struct bpf_prog_info``)."""

    number: int
    """Its id, which no other program has had since boot."""
    tag: bytes
    """The start of a digest of its instructions, map descriptors left out (``bpf_prog_calc_tag``)."""
    verified: int
    """Instructions that the verifier followed; 0 before Linux 5.16."""


_PROGRAM_INFO = struct.Struct("<4xI8s200xI12x")


def program_info(descriptor: int) -> ProgramInfo:
    """What the kernel says of a loaded program. :raises OSError: it refused to say"""
    return ProgramInfo(*_PROGRAM_INFO.unpack(_object_info(descriptor, _PROGRAM_INFO.size)))


def _info_or_none(descriptor: int) -> ProgramInfo | None:
    try:
        return program_info(descriptor)
    except OSError:
        return None


def _object_info(descriptor: int, size: int) -> bytes:
    data, length = ctypes.create_string_buffer(size), c_uint32(size)
    if libbpf().bpf_obj_get_info_by_fd(descriptor, data, byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, f"BPF_OBJ_GET_INFO_BY_FD: {os.strerror(number)}")
    return data.raw


_PRINT: Any = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)


@cache
def libbpf() -> ctypes.CDLL:
    """The library, with its functions declared. :raises LoadError: it is not installed"""
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LoadError(f"libbpf is not installed ({error}): apt install libbpf1") from None
    for name, result, arguments in (
        ("bpf_object__open_mem", c_void_p, [c_char_p, c_size_t, c_void_p]),
        ("bpf_object__load", c_int, [c_void_p]),
        ("bpf_object__close", None, [c_void_p]),
        ("bpf_object__btf", c_void_p, [c_void_p]),
        ("btf__raw_data", c_void_p, [c_void_p, POINTER(c_uint32)]),
        ("bpf_object__find_program_by_name", c_void_p, [c_void_p, c_char_p]),
        ("bpf_program__fd", c_int, [c_void_p]),
        ("bpf_object__find_map_by_name", c_void_p, [c_void_p, c_char_p]),
        ("bpf_map__fd", c_int, [c_void_p]),
        ("bpf_map__value_size", c_uint32, [c_void_p]),
        ("bpf_map__max_entries", c_uint32, [c_void_p]),
        ("bpf_prog_test_run_opts", c_int, [c_int, POINTER(_TestRun)]),
        ("bpf_obj_get_info_by_fd", c_int, [c_int, c_void_p, POINTER(c_uint32)]),
        ("bpf_map_update_elem", c_int, [c_int, c_char_p, c_char_p, c_uint64]),
        ("bpf_map_freeze", c_int, [c_int]),
        ("libbpf_set_print", c_void_p, [_PRINT]),
        ("bpf_object__next_program", c_void_p, [c_void_p, c_void_p]),
        ("bpf_object__next_map", c_void_p, [c_void_p, c_void_p]),
        ("bpf_program__name", c_char_p, [c_void_p]),
        ("bpf_program__section_name", c_char_p, [c_void_p]),
        ("bpf_program__insns", c_void_p, [c_void_p]),
        ("bpf_program__insn_cnt", c_size_t, [c_void_p]),
        ("bpf_map__name", c_char_p, [c_void_p]),
        ("bpf_map__type", c_uint32, [c_void_p]),
        ("bpf_map__key_size", c_uint32, [c_void_p]),
        ("bpf_map__map_flags", c_uint32, [c_void_p]),
        ("bpf_map__pin_path", c_char_p, [c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Programs:
    """One loaded object: its programs, and its maps as shared memory.

    :param data: an ELF object, compiled by clang
    :param accept: checks the object's contents before they are loaded; its exceptions propagate
    :raises LoadError: the kernel refused it; the text says what is missing, where that can be determined
    """

    def __init__(self, data: bytes, accept: Callable[[Contents], None] | None = None) -> None:
        self._lib = libbpf()
        log: list[str] = []

        # The verifier's log comes through libbpf's print callback only, as a format and a va_list for vsnprintf.
        libc = ctypes.CDLL(None)

        def keep(level: int, form: bytes, arguments: int) -> int:
            if level <= 1:
                # One call finds out the length and consumes the va_list (System V ABI, 3.5.7: 24 bytes), so copy it.
                again = ctypes.create_string_buffer(ctypes.string_at(arguments, 24), 24)
                size = int(libc.vsnprintf(None, c_size_t(0), form, c_void_p(arguments))) + 1
                text = ctypes.create_string_buffer(max(size, 1))
                libc.vsnprintf(text, c_size_t(len(text)), form, again)
                log.append(text.value.decode(errors="replace"))
            return 0

        printer = _PRINT(keep)
        self._lib.libbpf_set_print(printer)
        try:
            self._object = self._lib.bpf_object__open_mem(data, len(data), None)
            if not self._object:
                raise LoadError("this is not an eBPF object", "".join(log))
            if accept is not None:
                try:
                    accept(self._contents())
                except BaseException:
                    self._lib.bpf_object__close(self._object)
                    raise
            result = self._lib.bpf_object__load(self._object)
            if result:
                self._lib.bpf_object__close(self._object)
                raise LoadError(_why(-result), "".join(log))
        finally:
            self._lib.libbpf_set_print(_SILENT)
        size = c_uint32()
        btf = self._lib.bpf_object__btf(self._object)
        if not btf:
            self._lib.bpf_object__close(self._object)
            raise LoadError("the object has no BTF: compile it with clang -g")
        raw = self._lib.btf__raw_data(btf, byref(size))
        self.btf = Btf(ctypes.string_at(raw, size.value))
        self._maps: dict[str, mmap.mmap] = {}
        self._programs: dict[str, int] = {}
        self._kept: list[int] = []
        self._infos: dict[str, ProgramInfo] = {}

    def map(self, name: str) -> mmap.mmap:
        """The memory of an array map made with ``BPF_F_MMAPABLE``, shared with the programs.

        :raises KeyError: there is no such map
        """
        if name not in self._maps:
            found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
            if not found:
                raise KeyError(name)
            size = -(-self._lib.bpf_map__value_size(found) // 8) * 8 * self._lib.bpf_map__max_entries(found)
            self._maps[name] = mmap.mmap(self._lib.bpf_map__fd(found), -(-size // PAGE) * PAGE)
        return self._maps[name]

    def fix(self, name: str, value: bytes) -> None:
        """Set the only element of an array map, for good: nobody in user space can change it any more, not even root.

        :raises KeyError: there is no such map
        :raises LoadError: the kernel refused
        """
        descriptor = self.map_descriptor(name)
        result = self._lib.bpf_map_update_elem(descriptor, bytes(4), value, 0) or self._lib.bpf_map_freeze(descriptor)
        if result:
            raise LoadError(f"the kernel did not freeze the map {name!r} ({errno.errorcode.get(-result, result)})")

    def run(self, name: str, *, context: bytes = b"", packet: bytes = b"") -> int:
        """Run a program and return its return value.

        :param context: what a ``SEC("syscall")`` program is given
        :param packet: what a ``SEC("tc")`` program is given
        :raises KeyError: no such program
        :raises OSError: the kernel did not run it
        """
        fd = self._programs.get(name)
        if fd is None:
            fd = self._programs[name] = self.program(name)
        return run_program(fd, context, packet)

    def keep_only(self, *names: str) -> None:
        """Close all but these programs and the maps that `map` returned: this process can't reach the rest again.

        :raises KeyError: no such program
        """
        self._kept = [os.dup(self.program(name)) for name in names]
        self._programs = dict(zip(names, self._kept, strict=True))
        self._infos = {name: program_info(descriptor) for name, descriptor in self._programs.items()}
        self._lib.bpf_object__close(self._object)
        self._object = None

    def measure(self, *names: str) -> None:
        """Note what the kernel says of these programs, for `changed`. :raises KeyError: no such program"""
        self._programs |= {name: self.program(name) for name in names}
        self._infos |= {name: program_info(self._programs[name]) for name in names}

    def changed(self) -> list[str]:
        """Names of the measured programs whose descriptors are not those of what was loaded any more."""
        return [name for name, info in self._infos.items() if _info_or_none(self._programs[name]) != info]

    def program(self, name: str) -> int:
        """A program's descriptor, valid until `close`. :raises KeyError: no such program"""
        return int(self._lib.bpf_program__fd(self._program(name)))

    def map_descriptor(self, name: str) -> int:
        """A map's descriptor, valid until `close`. :raises KeyError: no such map"""
        found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise KeyError(name)
        return int(self._lib.bpf_map__fd(found))

    def instructions(self, name: str) -> bytes:
        """A program's instructions as loaded, including those of the functions it calls.

        :raises KeyError: no such program
        """
        program = self._program(name)
        return ctypes.string_at(
            self._lib.bpf_program__insns(program), self._lib.bpf_program__insn_cnt(program) * INSTRUCTION
        )

    def _program(self, name: str) -> Any:
        program = self._object and self._lib.bpf_object__find_program_by_name(self._object, name.encode())
        if not program:
            raise KeyError(name)
        return program

    def _contents(self) -> Contents:
        lib, whole = self._lib, self._object
        programs, maps = [], []
        at = None
        while at := lib.bpf_object__next_program(whole, at):
            programs.append(
                (
                    lib.bpf_program__name(at).decode(errors="replace"),
                    lib.bpf_program__section_name(at).decode(errors="replace"),
                )
            )
        while at := lib.bpf_object__next_map(whole, at):
            maps.append(
                MapDefinition(
                    lib.bpf_map__name(at).decode(errors="replace"),
                    lib.bpf_map__type(at),
                    lib.bpf_map__key_size(at),
                    lib.bpf_map__value_size(at),
                    lib.bpf_map__max_entries(at),
                    lib.bpf_map__map_flags(at),
                    lib.bpf_map__pin_path(at) is not None,
                )
            )
        return Contents(programs, maps)

    def close(self) -> None:
        """Unload the programs."""
        for shared in self._maps.values():
            shared.close()
        self._maps.clear()
        while self._kept:
            os.close(self._kept.pop())
        if self._object:
            self._lib.bpf_object__close(self._object)
            self._object = None


def _pointer(data: bytes) -> c_void_p:
    return ctypes.cast(c_char_p(data or None), c_void_p)


_SILENT = _PRINT(lambda level, form, arguments: 0)


def _why(error: int) -> str:
    """What a load failure most likely means, and what to do."""
    text = f"the kernel refused the eBPF programs ({errno.errorcode.get(error, error)})"
    if error in (errno.EPERM, errno.EACCES):
        return f"{text}: loading needs root, or CAP_BPF and CAP_PERFMON"
    try:
        with open("/sys/kernel/security/lockdown") as file:
            if "[confidentiality]" in file.read():
                return f"{text}: lockdown=confidentiality forbids it; start the agent before lockdown is raised"
    except OSError:
        pass
    release = os.uname().release
    if tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < (5, 17):
        return f"{text}: Linux {release} has no bpf_loop; use Linux 5.17 or newer"
    return text
