"""A kernel's types and symbols as Volatility reads them: its "intermediate symbol format", version 6.2.

Source: ``volatility3/schemas/schema-6.2.0.json``.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from vmishim.guests.description import IMAGE, Description
from vmishim.kernel import vmcoreinfo
from vmishim.kernel.types import Kind, Types
from vmishim.kernel.variables import TABLE, Array, Declared, Pointer

Json = dict[str, Any]

PRODUCER: Json = {"name": "dwarf2json", "version": "0.8.0", "datetime": "1970-01-01T00:00:00"}
"""Plugins refuse symbols of another producer, or of an older version, because of what these lack. Ours have it."""
FORM = 2
"""Counts changes of what is made of a kernel: files on disk that an older vmishim made are made again."""
_VOID: Json = {"kind": "base", "name": "void"}
_ONLY_IN_VMCOREINFO = "kallsyms_"
"""Symbols of these names are left out of the kernel's own table, but VMCOREINFO has them."""


def make(kernel: Description) -> Json:
    """The symbols of a kernel, as JSON. Addresses are as linked: Volatility adds how far the image was moved.

    :raises LibvmiError: the guest's BTF contradicts itself
    :raises KeyError: the same, within a type
    """
    types = _Described(kernel.types)
    return {
        "metadata": {
            "format": "6.2.0",
            "producer": PRODUCER,
        },
        "base_types": types.base_types(),
        "user_types": types.user_types(),
        "enums": types.enums(),
        "symbols": _symbols(kernel, types),
    }


class _Described:
    """Types as descriptions. A type without a name goes by its number, and so does the second of a name."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self._names: dict[int, str] = {}
        seen = set()
        named = {types.type(number).name for number in types.of_kinds(Kind.STRUCT, Kind.UNION)}
        # "typedef struct { ... } kernel_cap_t": plugins know it by that name.
        aliases: dict[int, str] = {}
        for number in types.of_kinds(Kind.TYPEDEF):
            alias = types.type(number)
            if alias.name not in named:
                aliases.setdefault(alias.target, alias.name)
        for number in types.of_kinds(Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64):
            one = types.type(number)
            space = one.kind in (Kind.ENUM, Kind.ENUM64)
            name = one.name or aliases.get(number) or f"unnamed_{number}"
            if (space, name) in seen:
                name = f"{name}_{number}"
            seen.add((space, name))
            self._names[number] = name
        self._defined = {name for enum, name in seen if not enum}
        self.of = cache(self._of)

    def _of(self, number: int, depth: int = 0) -> Json:
        """What stands where a type is wanted."""
        one = self._types.resolved(number)
        match one.kind:
            case Kind.INT | Kind.FLOAT:
                return {"kind": "base", "name": one.name}
            case Kind.POINTER:
                if depth > _DEEPEST:
                    return {"kind": "pointer", "subtype": _VOID}
                return {"kind": "pointer", "subtype": self._pointed(self._of(one.target, depth + 1))}
            case Kind.ARRAY:
                if depth > _DEEPEST:
                    return _VOID
                array = self._types.array(one.number)
                return {"kind": "array", "count": array.length, "subtype": self._of(array.element, depth + 1)}
            case Kind.STRUCT:
                return {"kind": "struct", "name": self._names[one.number]}
            case Kind.UNION:
                return {"kind": "union", "name": self._names[one.number]}
            case Kind.ENUM | Kind.ENUM64:
                return {"kind": "enum", "name": self._names[one.number]}
            case Kind.FORWARD:
                return {"kind": "union" if one.flag else "struct", "name": one.name}
            case Kind.PROTOTYPE | Kind.FUNCTION:
                return {"kind": "function"}
        return _VOID

    def declared(self, of: Declared) -> Json:
        """The same of a variable's type."""
        match of:
            case Pointer():
                return {"kind": "pointer", "subtype": self._pointed(self.declared(of.to))}
            case Array():
                return {"kind": "array", "count": of.count, "subtype": self.declared(of.of)}
            case _:
                return self.of(of)

    def _pointed(self, found: Json) -> Json:
        """A structure that is defined nowhere cannot be followed."""
        return _VOID if found["kind"] in ("struct", "union") and found["name"] not in self._defined else found

    def base_types(self) -> Json:
        found: Json = {
            "void": {"kind": "void", "size": 0, "signed": False, "endian": "little"},
            "pointer": {"kind": "int", "size": 8, "signed": False, "endian": "little"},
        }
        for number in self._types.of_kinds(Kind.INT, Kind.FLOAT):
            one = self._types.type(number)
            if one.kind == Kind.FLOAT:
                found[one.name] = {"kind": "float", "size": one.size, "signed": True, "endian": "little"}
                continue
            how = self._types.integer(number)
            # BTF marks few characters as such: compilers describe them as integers of one byte.
            kind = "bool" if how.is_bool else "char" if how.size == 1 and "char" in one.name else "int"
            found[one.name] = {"kind": kind, "size": how.size, "signed": how.signed, "endian": "little"}
        return found

    def user_types(self) -> Json:
        found: Json = {}
        for number in self._types.of_kinds(Kind.STRUCT, Kind.UNION):
            one = self._types.type(number)
            kind = "struct" if one.kind == Kind.STRUCT else "union"
            found[self._names[number]] = {"kind": kind, "size": one.size, "fields": self._fields(number)}
        return found

    def _fields(self, number: int) -> Json:
        found: Json = {}
        for field in self._types.fields(number):
            described = self.of(field.type)
            one: Json = {"offset": field.bit // 8, "type": described}
            if field.width:
                unit = 8 * (self._types.size_of(field.type) or 8)
                bits = {"kind": "bitfield", "bit_position": field.bit % unit, "bit_length": field.width}
                one = {"offset": field.bit // unit * unit // 8, "type": {**bits, "type": described}}
            if not field.name:
                one["anonymous"] = True
            found.setdefault(field.name or f"unnamed_field_{field.bit}_{field.type}", one)
        return found

    def enums(self) -> Json:
        bases = {1: "unsigned char", 2: "short unsigned int", 4: "unsigned int", 8: "long unsigned int"}
        found: Json = {}
        for number in self._types.of_kinds(Kind.ENUM, Kind.ENUM64):
            one = self._types.type(number)
            base = {4: "int", 8: "long int"}.get(one.size) if one.flag else None
            base = base or bases.get(one.size, "unsigned int")
            found[self._names[number]] = {"size": one.size, "base": base, "constants": self._types.values(number)}
        return found


_DEEPEST = 64
"""Pointers and arrays of one type, one in another; a hostile blob could have them without end."""


def _symbols(kernel: Description, types: _Described) -> Json:
    moved = kernel.moved
    found: Json = {}
    for address, name in kernel.symbols:
        found.setdefault(name, {"address": address - moved if address >= IMAGE else address})
    for said, value in vmcoreinfo.parse(kernel.vmcoreinfo).items():
        name = said.removeprefix("SYMBOL(").removesuffix(")")
        if name.startswith(_ONLY_IN_VMCOREINFO) and (place := _address(value)) is not None:
            found.setdefault(name, {"address": place - moved})
    for name in {*TABLE, *kernel.types.variables} & found.keys():
        declared = kernel.declared(name)
        if declared is not None:
            found[name]["type"] = types.declared(declared)
    number = {"kind": "base", "name": "unsigned int"}
    if "kallsyms_num_syms" in found:
        found["kallsyms_num_syms"].setdefault("type", number)
    banner = kernel.banner + b"\0"
    text = {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}}
    found.setdefault("linux_banner", {"address": 0})
    found["linux_banner"] |= {"type": text, "constant_data": base64.b64encode(banner).decode()}
    return found


def _address(text: str) -> int | None:
    try:
        address = int(text, 16)
    except ValueError:
        return None
    return address if IMAGE <= address < 1 << 64 else None
