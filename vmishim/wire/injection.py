"""What injected programs are made of where both sides must know it: maps, bytecode, the heads of input and output.

The C side of the layouts is ``bpf/inject.h``; ``tests/unit/test_inject.py`` holds the two together.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from struct import Struct

from vmishim.errors import LibvmiError

INPUT_HEAD = Struct("<Q")
"""``struct inject_input`` before ``bytes``: how many there are."""
OUTPUT_HEAD = Struct("<4Q")
"""``struct inject_output`` before ``bytes``: used, faults, fault_at, truncated."""
EXTENT_HEAD = Struct("<QII")
"""``struct inject_extent``: address, length, wanted."""

MAGIC = b"vmishim bytecode 1\n"
"""A bundle: this, one line of JSON, the instructions."""
INSTRUCTION = 8
"""Bytes of an eBPF instruction; ``ld_imm64`` is two."""
LD_IMM64 = 0x18

_ARRAY, _MMAPABLE = 2, 1 << 10  # BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE


class BundleError(LibvmiError):
    """These bytes are no bundle of bytecode."""


@dataclass(frozen=True)
class MapDefinition:
    """A map as an object declares it; names and numbers as in ``union bpf_attr`` and ``enum bpf_map_type``."""

    name: str
    kind: int
    key_size: int
    value_size: int
    entries: int
    flags: int
    pinned: bool = False

    @classmethod
    def array(cls, name: str, value_size: int) -> MapDefinition:
        """An array of one value, which can be mapped into memory."""
        return cls(name, _ARRAY, 4, value_size, 1, _MMAPABLE)

    @property
    def mappable(self) -> bool:
        """Whether it is an array made with BPF_F_MMAPABLE."""
        return self.kind == _ARRAY and bool(self.flags & _MMAPABLE)

    def bytes(self, cpus: int = 1) -> int:
        """What it takes of the kernel's memory, with some 64 bytes for the node of a hash's element.

        :param cpus: how many values each element has
        """
        return (self.key_size + self.value_size * cpus + (0 if self.mappable else 64)) * self.entries


@dataclass(frozen=True)
class Bundle:
    """A program as bare instructions, for the kernel whose headers it was compiled against.

    :ivar release: ``uname -r`` of that kernel
    :ivar license: as the kernel wants to hear it
    :ivar patches: (instruction, map): which ``ld_imm64`` is to hold which map's descriptor
    """

    release: str
    license: str
    maps: list[MapDefinition]
    patches: list[tuple[int, int]]
    instructions: bytes

    def pack(self) -> bytes:
        """The bytes of it."""
        head = {
            "release": self.release,
            "license": self.license,
            "maps": [astuple(definition) for definition in self.maps],
            "patches": self.patches,
        }
        return b"".join((MAGIC, json.dumps(head, separators=(",", ":")).encode(), b"\n", self.instructions))

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """The bundle of these bytes. :raises BundleError: they are none"""
        try:
            line, _, instructions = data.removeprefix(MAGIC).partition(b"\n")
            if not data.startswith(MAGIC) or not instructions or len(instructions) % INSTRUCTION:
                raise ValueError("its parts are not where they should be")
            head = json.loads(line)
            maps = [MapDefinition(*entry) for entry in head["maps"]]
            for definition in maps:
                name, *sizes, pinned = astuple(definition)
                if type(name) is not str or not name.isascii():
                    raise ValueError(f"map {name!r} has no name")
                if not all(type(size) is int and 0 <= size < 1 << 32 for size in sizes):
                    raise ValueError(f"map {name!r} has no sizes")
                if pinned is not False:
                    raise ValueError(f"map {name!r} is pinned")
            patches = [(at, number) for at, number in head["patches"]]
            for at, number in patches:
                if type(at) is not int or type(number) is not int or not 0 <= number < len(maps):
                    raise ValueError(f"a patch names map {number}")
                if not 0 <= at < len(instructions) // INSTRUCTION - 1 or instructions[at * INSTRUCTION] != LD_IMM64:
                    raise ValueError(f"instruction {at} loads no address of a map")
            if not str(head["license"]).isascii():
                raise ValueError("its license is no text")
            return cls(str(head["release"]), str(head["license"]), maps, patches, instructions)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(f"this is no bundle of bytecode: {error}") from None
