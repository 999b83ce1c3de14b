"""All types of a kernel, decoded from BTF one at a time as they are asked for: what a debugger or a memory forensics
program needs beyond the offsets of `vmishim.kernel.btf`.

Bytes in, values out. The bytes may come from a hostile guest: every number and name is checked where it is used, and a
``KeyError`` says what does not fit. The agent does not carry this module.

Source: ``Documentation/bpf/btf.rst`` and ``include/uapi/linux/btf.h`` of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from vmishim.kernel.btf import Btf

DEEPEST = 64
"""Names and qualifiers of one type, one behind another; more count as a loop."""


class Kind(IntEnum):
    """Kinds of types; the values are BTF's."""

    VOID = 0
    INT = 1
    POINTER = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FORWARD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNCTION = 12
    PROTOTYPE = 13
    VARIABLE = 14
    SECTION = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_SIZED = frozenset({Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.SECTION, Kind.FLOAT, Kind.ENUM64})
_SEARCHED = frozenset(
    {Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.FORWARD, Kind.TYPEDEF, Kind.FLOAT, Kind.ENUM64}
)
_BY_NAME_ONLY = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})


class Type(NamedTuple):
    """One type, not followed any further."""

    number: int
    """Its number in the blob; 0 is ``void``."""
    kind: Kind
    name: str
    """Empty if it has none."""
    size: int
    """Bytes, where the kind has a size of its own (integers, structures, unions, enumerations, floats), else 0."""
    target: int
    """Number of the type that it refers to (pointers, names, qualifiers, functions: their prototype; prototypes: what
    is returned), else 0."""
    flag: bool
    """Enumerations: values are signed. Forward declarations: of a union. Structures: some member is a bit field."""
    entries: int
    """Members, values or parameters."""


class Field(NamedTuple):
    """A member of a structure or union."""

    name: str
    """Empty for an anonymous structure or union, whose members are found as its parent's."""
    type: int
    """Number of its type."""
    bit: int
    """Where it starts, in bits from the start of the structure."""
    width: int
    """Bits of a bit field; 0 for any other member."""


class Integer(NamedTuple):
    """How an integer is stored."""

    size: int
    """Bytes."""
    signed: bool
    is_char: bool
    is_bool: bool
    bits: int
    """Bits that are used."""


class Array(NamedTuple):
    """An array."""

    element: int
    """Number of the elements' type."""
    length: int
    """Elements; 0 for a flexible array."""


class Parameter(NamedTuple):
    """A parameter of a function."""

    name: str
    type: int
    """Number of its type. 0 with an empty name at the end: more parameters of any type follow."""


class Variable(NamedTuple):
    """A variable that BTF describes: the kernel's per-CPU ones."""

    name: str
    type: int
    """Number of its type."""
    offset: int
    """Bytes from the start of its section."""
    size: int
    section: str


class Types(Btf):
    """A BTF blob, all of it.

    :param data: the blob, from its header on; bytes after its end are ignored
    :raises ValueError: not BTF, or it contradicts itself
    """

    def __len__(self) -> int:
        """Number of types, ``void`` included: numbers are below this."""
        return len(self._starts)

    def type(self, number: int) -> Type:
        """One type. :raises KeyError: no type has this number, or its name cannot be read"""
        if number == 0:
            return Type(0, Kind.VOID, "void", 0, 0, False, 0)
        at, kind = self._at(number)
        words = self._words
        info, last = words[at + 1], words[at + 2]
        sized = kind in _SIZED
        return Type(
            number,
            kind,
            self._string(words[at]) if words[at] else "",
            last if sized else 0,
            0 if sized or kind in (Kind.ARRAY, Kind.FORWARD) else last,
            bool(info >> 31),
            info & 0xFFFF,
        )

    def resolved(self, number: int) -> Type:
        """The type behind names and qualifiers. :raises KeyError: it refers to itself, or to no type"""
        found = self.type(number)
        for _ in range(DEEPEST):
            if found.kind not in _BY_NAME_ONLY:
                return found
            found = self.type(found.target)
        raise KeyError(f"BTF type {number} refers to itself")

    def size_of(self, number: int) -> int:
        """``sizeof`` a type in bytes; 0 for ``void``, functions and incomplete types. :raises KeyError: no such type"""
        self.type(number)
        return self._size(number)

    def integer(self, number: int) -> Integer:
        """How an integer is stored. :raises KeyError: it is not an integer"""
        at = self._of_kind(number, Kind.INT)
        said = self._words[at + 3]
        encoding, bits = said >> 24 & 15, said & 0xFF
        return Integer(self._words[at + 2], bool(encoding & 1), bool(encoding & 2), bool(encoding & 4), bits)

    def array(self, number: int) -> Array:
        """An array's elements. :raises KeyError: it is not an array"""
        at = self._of_kind(number, Kind.ARRAY)
        return Array(self._words[at + 3], self._words[at + 5])

    def fields(self, number: int) -> list[Field]:
        """Members in order of declaration. :raises KeyError: it is not a structure or union, or has a bad name"""
        at = self._of_kind(number, Kind.STRUCT, Kind.UNION)
        words = self._words
        widths = words[at + 1] >> 31
        found = []
        for entry in range(at + 3, at + 3 + 3 * (words[at + 1] & 0xFFFF), 3):
            name, where = words[entry], words[entry + 2]
            bit, width = (where & 0xFFFFFF, where >> 24) if widths else (where, 0)
            found.append(Field(self._string(name) if name else "", words[entry + 1], bit, width))
        return found

    def values(self, number: int) -> dict[str, int]:
        """Names and values of an enumeration. :raises KeyError: it is not an enumeration"""
        at = self._of_kind(number, Kind.ENUM, Kind.ENUM64)
        words = self._words
        info = words[at + 1]
        signed, wide = info >> 31, (info >> 24 & 31) == Kind.ENUM64
        step, limit = (3, 1 << 64) if wide else (2, 1 << 32)
        found = {}
        for entry in range(at + 3, at + 3 + step * (info & 0xFFFF), step):
            value = words[entry + 1] | (words[entry + 2] << 32 if wide else 0)
            found[self._string(words[entry])] = value - limit if signed and value >= limit >> 1 else value
        return found

    def parameters(self, number: int) -> list[Parameter]:
        """Parameters of a function's prototype. :raises KeyError: it is not a prototype"""
        at = self._of_kind(number, Kind.PROTOTYPE)
        words = self._words
        entries = range(at + 3, at + 3 + 2 * (words[at + 1] & 0xFFFF), 2)
        return [Parameter(self._string(words[at]) if words[at] else "", words[at + 1]) for at in entries]

    def of_kinds(self, *kinds: Kind) -> Iterator[int]:
        """Numbers of all types of these kinds, in the order of the blob."""
        wanted, words = frozenset(kinds), self._words
        return (number for number, at in enumerate(self._starts) if number and (words[at + 1] >> 24 & 31) in wanted)

    @cached_property
    def named(self) -> dict[tuple[Kind, str], int]:
        """The first type of each kind and name: integers, floats, structures, unions, enumerations, forward
        declarations and typedefs. :raises KeyError: a name cannot be read"""
        found: dict[tuple[Kind, str], int] = {}
        words = self._words
        for number, at in enumerate(self._starts):
            if not number or not words[at]:
                continue
            kind = words[at + 1] >> 24 & 31
            if kind in _SEARCHED:
                found.setdefault((Kind(kind), self._string(words[at])), number)
        return found

    @cached_property
    def enumerators(self) -> dict[str, tuple[int, int]]:
        """(number of the enumeration, value) by the name of a value; the first, if a name occurs twice."""
        found: dict[str, tuple[int, int]] = {}
        for number in self.of_kinds(Kind.ENUM, Kind.ENUM64):
            for name, value in self.values(number).items():
                found.setdefault(name, (number, value))
        return found

    @cached_property
    def variables(self) -> dict[str, Variable]:
        """The variables that BTF describes, by name: on kernels so far, the per-CPU ones."""
        found: dict[str, Variable] = {}
        words = self._words
        for number in self.of_kinds(Kind.SECTION):
            section = self.type(number)
            at = self._starts[number]
            for entry in range(at + 3, at + 3 + 3 * section.entries, 3):
                variable = self.type(words[entry])
                if variable.kind == Kind.VARIABLE:
                    place = Variable(variable.name, variable.target, words[entry + 1], words[entry + 2], section.name)
                    found.setdefault(variable.name, place)
        return found

    @cached_property
    def anonymous(self) -> dict[tuple[str, ...], int]:
        """Structures and unions without a name, by the names of their members."""
        found: dict[tuple[str, ...], int] = {}
        for number in self.of_kinds(Kind.STRUCT, Kind.UNION):
            if not self._words[self._starts[number]]:
                found.setdefault(tuple(field.name for field in self.fields(number)), number)
        return found

    def _at(self, number: int) -> tuple[int, Kind]:
        if not 0 < number < len(self._starts):
            raise KeyError(f"BTF refers to type {number}, but has only {len(self._starts) - 1}")
        at = self._starts[number]
        return at, Kind(self._words[at + 1] >> 24 & 31)

    def _of_kind(self, number: int, *kinds: Kind) -> int:
        at, kind = self._at(number)
        if kind not in kinds:
            raise KeyError(f"BTF type {number} is of kind {kind.name}, not {' or '.join(each.name for each in kinds)}")
        return at
