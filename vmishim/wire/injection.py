"""The parts of injected programs that both sides must know: maps, bytecode, the headers of input and output.

The C side of the layouts is ``bpf/inject.h``; ``tests/unit/test_inject.py`` checks that they agree.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from struct import Struct

from vmishim.errors import LibvmiError

INPUT_HEAD = Struct("<Q")
"""``struct inject_input`` before ``bytes``: the number of bytes."""
OUTPUT_HEAD = Struct("<4Q")
"""``struct inject_output`` before ``bytes``: used, faults, fault_at, truncated."""
EXTENT_HEAD = Struct("<QII")
"""``struct inject_extent``: address, length, wanted."""

MAGIC = b"vmishim bytecode 1\n"
"""A bundle is this line, one line of JSON, and the instructions."""
INSTRUCTION = 8
"""Bytes of an eBPF instruction; ``ld_imm64`` is two."""
LD_IMM64 = 0x18

_ARRAY, _MMAPABLE = 2, 1 << 10  # BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE


class BundleError(LibvmiError):
    """The bytes are not a valid bytecode bundle."""


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
        """An array map with one value, mappable into memory."""
        return cls(name, _ARRAY, 4, value_size, 1, _MMAPABLE)

    @property
    def mappable(self) -> bool:
        """Whether this is an array map with BPF_F_MMAPABLE."""
        return self.kind == _ARRAY and bool(self.flags & _MMAPABLE)

    def bytes(self, cpus: int = 1) -> int:
        """The kernel memory the map needs, counting about 64 bytes for the node of a hash map's element.

        :param cpus: values per element
        """
        return (self.key_size + self.value_size * cpus + (0 if self.mappable else 64)) * self.entries


@dataclass(frozen=True)
class Bundle:
    """A program as bare instructions, for the kernel against whose headers it was compiled.

    :ivar release: ``uname -r`` of that kernel
    :ivar license: the string that the kernel's ``bpf()`` expects
    :ivar patches: pairs (instruction, map): the ``ld_imm64`` that gets the map's descriptor
    """

    release: str
    license: str
    maps: list[MapDefinition]
    patches: list[tuple[int, int]]
    instructions: bytes

    def pack(self) -> bytes:
        """The bundle as bytes."""
        head = {
            "release": self.release,
            "license": self.license,
            "maps": [astuple(definition) for definition in self.maps],
            "patches": self.patches,
        }
        return b"".join((MAGIC, json.dumps(head, separators=(",", ":")).encode(), b"\n", self.instructions))

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """Parse a bundle. :raises BundleError: the bytes are not a valid bundle"""
        try:
            line, _, instructions = data.removeprefix(MAGIC).partition(b"\n")
            if not data.startswith(MAGIC) or not instructions or len(instructions) % INSTRUCTION:
                raise ValueError("the header or the instructions are missing or cut short")
            head = json.loads(line)
            maps = [MapDefinition(*entry) for entry in head["maps"]]
            for definition in maps:
                name, *sizes, pinned = astuple(definition)
                if type(name) is not str or not name.isascii():
                    raise ValueError(f"the map name {name!r} is not ASCII text")
                if not all(type(size) is int and 0 <= size < 1 << 32 for size in sizes):
                    raise ValueError(f"map {name!r} has a size outside 0..2^32-1")
                if pinned is not False:
                    raise ValueError(f"map {name!r} is pinned; pinned maps are not allowed")
            patches = [(at, number) for at, number in head["patches"]]
            for at, number in patches:
                if type(at) is not int or type(number) is not int or not 0 <= number < len(maps):
                    raise ValueError(f"a patch names map {number}, but the bundle has {len(maps)} maps")
                if not 0 <= at < len(instructions) // INSTRUCTION - 1 or instructions[at * INSTRUCTION] != LD_IMM64:
                    raise ValueError(f"a patch names instruction {at}, which is not an ld_imm64")
            if not str(head["license"]).isascii():
                raise ValueError("the license is not ASCII text")
            return cls(str(head["release"]), str(head["license"]), maps, patches, instructions)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(f"not a valid bytecode bundle: {error}") from None
