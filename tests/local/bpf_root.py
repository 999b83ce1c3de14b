"""What root does to the maps of an agent from outside: finds them by the agent's programs, reads and rewrites them."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from pathlib import Path

from tests.local.attempts import bpf

# enum bpf_cmd
_LOOK_UP, _UPDATE, _PROGRAM_BY_NUMBER, _MAP_BY_NUMBER, _INFO, _FREEZE = 1, 2, 13, 14, 15, 22


def _attribute(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack(layout, *values), 64)


def _info(descriptor: int, data: ctypes.Array[ctypes.c_char]) -> bytes:
    bpf(_INFO, _attribute("<IIQ", descriptor, len(data), ctypes.addressof(data)))
    return data.raw


class ForeignMap:
    """A map of another process, opened by its number as root can. Closed by `close`."""

    def __init__(self, number: int) -> None:
        self.descriptor = bpf(_MAP_BY_NUMBER, _attribute("<II", number, 0))
        info = _info(self.descriptor, ctypes.create_string_buffer(80))
        _, self.number, self._key_size, self._value_size, _, self.flags, name = struct.unpack_from("<6I16s", info)
        self.name = name.rstrip(b"\0").decode()

    def read(self, key: int = 0) -> bytes:
        """The value of an array's element."""
        index, value = struct.pack("<I", key), ctypes.create_string_buffer(self._value_size)
        self._element(_LOOK_UP, index, value)
        return value.raw

    def write(self, value: bytes, key: int = 0) -> None:
        """Replace an array's element. :raises OSError: EPERM of a frozen map"""
        self._element(_UPDATE, struct.pack("<I", key), ctypes.create_string_buffer(value, len(value)))

    def _element(self, command: int, index: bytes, value: ctypes.Array[ctypes.c_char]) -> None:
        key = ctypes.create_string_buffer(index, len(index))
        bpf(command, _attribute("<IIQQQ", self.descriptor, 0, ctypes.addressof(key), ctypes.addressof(value), 0))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def maps_of(pid: int) -> dict[str, ForeignMap]:
    """The maps that a process's programs use, by name, whether or not the process still holds them."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
    programs = {int(found[1]) for text in texts if (found := re.search(r"^prog_id:\t(\d+)", text, re.M))}
    numbers: set[int] = set()
    for program in programs:
        descriptor = bpf(_PROGRAM_BY_NUMBER, _attribute("<I", program))
        try:
            room = (ctypes.c_uint32 * 64)()
            # struct bpf_prog_info: nr_map_ids at 52, map_ids at 56
            asked = bytearray(64)
            struct.pack_into("<IQ", asked, 52, len(room), ctypes.addressof(room))
            data = ctypes.create_string_buffer(bytes(asked), len(asked))
            (count,) = struct.unpack_from("<I", _info(descriptor, data), 52)
            numbers.update(room[:count])
        finally:
            os.close(descriptor)
    return {found.name: found for found in map(ForeignMap, sorted(numbers))}
