"""Symbols for volatility3, made of a kernel's BTF and kallsyms: its "intermediate symbol format", version 6.2.

This decodes all of BTF independently of ``vmishim.kernel.btf``, so that volatility3 is a second opinion on that too.

Source: ``Documentation/bpf/btf.rst`` of the kernel, ``volatility3/schemas/schema-6.2.0.json``.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import cache
from struct import unpack_from
from typing import Any

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
FLOAT, ENUM64 = 16, 19
FUNC_PROTO, VAR, DATASEC, DECL_TAG = 13, 14, 15, 17
FIXED = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
ENTRY = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}
SIGNED, CHAR, BOOL = 1, 2, 4
"""Bits of an integer's encoding."""
VOID = {"kind": "base", "name": "void"}

TYPES = {
    "init_task": "task_struct",
    "init_files": "files_struct",
    "modules": "list_head",
    "net_namespace_list": "list_head",
    "socket_file_ops": "file_operations",
    "sockfs_dentry_operations": "dentry_operations",
}
"""Symbols whose type volatility3 asks for: kallsyms tells none."""

IMAGE = 0xFFFF_FFFF_8000_0000
"""Lower symbols are no addresses: places in each CPU's own memory."""
TAINTS = 19
"""Reasons for which a kernel can be tainted (``TAINT_FLAGS_COUNT``), since 5.18."""

Description = dict[str, Any]


class Types:
    """A BTF blob as volatility3's descriptions of types."""

    def __init__(self, data: bytes) -> None:
        header, type_off, type_len, str_off = unpack_from("<4xIIII", data)
        self.data, self.strings = data, header + str_off
        self.starts = [0]
        at, end = header + type_off, header + type_off + type_len
        while at < end:
            self.starts.append(at)
            _, info, _ = unpack_from("<III", data, at)
            kind = info >> 24 & 31
            at += 12 + FIXED.get(kind, 0) + ENTRY.get(kind, 0) * (info & 0xFFFF)

    def head(self, number: int) -> tuple[str, int, bool, int, int, int]:
        """Of a type: its name, kind and flag, how many entries follow, its size or what it refers to, and where the
        entries are."""
        at = self.starts[number]
        name, info, size = unpack_from("<III", self.data, at)
        kind = info >> 24 & 31
        return self.string(name), kind, bool(info >> 31), info & 0xFFFF, size, at + 12

    def string(self, at: int) -> str:
        start = self.strings + at
        return self.data[start : self.data.index(b"\0", start)].decode()

    def name(self, number: int) -> str:
        """A type without a name of its own goes by its number."""
        return self.head(number)[0] or f"unnamed_{number}"

    @cache  # noqa: B019 - the only Types of a test
    def describe(self, number: int) -> Description:
        """What stands where a member's type is wanted."""
        if number == 0:
            return VOID
        name, kind, _, _, target, at = self.head(number)
        if kind in (INT, FLOAT):
            return {"kind": "base", "name": name}
        if kind == PTR:
            return {"kind": "pointer", "subtype": self.describe_named(target)}
        if kind == ARRAY:
            element, _, count = unpack_from("<III", self.data, at)
            return {"kind": "array", "count": count, "subtype": self.describe(element)}
        if kind in (STRUCT, UNION):
            return {"kind": "struct" if kind == STRUCT else "union", "name": self.name(number)}
        if kind in (ENUM, ENUM64):
            return {"kind": "enum", "name": self.name(number)}
        if kind == FWD:
            return {"kind": "struct", "name": name}
        if kind == FUNC_PROTO:
            return {"kind": "function"}
        return self.describe(target)  # a name or a qualifier

    def describe_named(self, number: int) -> Description:
        """What a pointer leads to; a structure that is nowhere defined cannot be followed."""
        found = self.describe(number)
        if found["kind"] == "struct" and found["name"] not in self.structures:
            return VOID
        return found

    @property
    def structures(self) -> set[str]:
        if not hasattr(self, "_structures"):
            self._structures = {self.name(number) for number in self.numbers(STRUCT, UNION)}
        return self._structures

    def numbers(self, *kinds: int) -> Iterator[int]:
        """Types of these kinds, by number."""
        return (number for number in range(1, len(self.starts)) if self.head(number)[1] in kinds)

    def fields(self, number: int) -> Iterator[tuple[str, Description]]:
        """Members of a structure."""
        _, _, has_widths, count, _, at = self.head(number)
        for entry in range(at, at + 12 * count, 12):
            name, of_type, where = unpack_from("<III", self.data, entry)
            bits, width = (where & 0xFFFFFF, where >> 24) if has_widths else (where, 0)
            described = self.describe(of_type)
            field: Description = {"offset": bits // 8, "type": described}
            if width:
                unit = 8 * self.size(of_type)
                bit_field = {"kind": "bitfield", "bit_position": bits % unit, "bit_length": width, "type": described}
                field = {"offset": bits // unit * unit // 8, "type": bit_field}
            if not name:
                field["anonymous"] = True
            yield self.string(name) or f"unnamed_field_{bits}_{of_type}", field

    def size(self, number: int) -> int:
        """Bytes of an integer or an enumeration, whatever it is called."""
        _, kind, _, _, size, _ = self.head(number)
        return size if kind in (INT, ENUM, ENUM64) else self.size(size)

    def constants(self, number: int) -> dict[str, int]:
        """Members of an enumeration."""
        _, kind, signed, count, _, at = self.head(number)
        found = {}
        for entry in range(count):
            if kind == ENUM:
                name, value = unpack_from("<Ii" if signed else "<II", self.data, at + 8 * entry)
            else:
                name, value = unpack_from("<Iq" if signed else "<IQ", self.data, at + 12 * entry)
            found[self.string(name)] = value
        return found

    def integer(self, number: int) -> Description:
        _, kind, _, _, size, at = self.head(number)
        encoding = 0 if kind == FLOAT else self.data[at + 3]
        name = "float" if kind == FLOAT else "bool" if encoding & BOOL else "char" if encoding & CHAR else "int"
        return {"kind": name, "size": size, "signed": bool(encoding & SIGNED), "endian": "little"}


def make(btf: bytes, kallsyms: bytes, moved: int, banner: bytes) -> Description:
    """The symbols as JSON.

    :param btf: ``/sys/kernel/btf/vmlinux``
    :param kallsyms: ``/proc/kallsyms``
    :param moved: how far KASLR moved the kernel's image: volatility3 wants addresses as linked
    :param banner: what is in memory at ``linux_banner``, its NUL included: by it volatility3 knows the kernel
    """
    types = Types(btf)
    named = {types.name(number): number for number in reversed(list(types.numbers(STRUCT, UNION)))}
    integers = {types.name(number): types.integer(number) for number in types.numbers(INT, FLOAT)}
    pointer = {"kind": "int", "size": 8, "signed": False, "endian": "little"}
    void = {"kind": "void", "size": 0, "signed": False, "endian": "little"}
    symbols: dict[str, Description] = {}
    for line in kallsyms.decode().splitlines():
        address, _, name, *module = line.split()
        if not module:
            linked = int(address, 16)
            symbols.setdefault(name, {"address": linked - moved if linked > IMAGE else linked})
    for name, struct in TYPES.items():
        symbols[name]["type"] = {"kind": "struct", "name": struct}
    flag = {"kind": "struct", "name": "taint_flag"}
    symbols["taint_flags"]["type"] = {"kind": "array", "count": TAINTS, "subtype": flag}
    symbols["linux_banner"] |= {
        "type": {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}},
        "constant_data": base64.b64encode(banner).decode(),
    }
    return {
        "metadata": {"format": "6.2.0", "producer": {"name": "vmishim's tests", "version": "1.0.0"}},
        "base_types": {**integers, "pointer": pointer, "void": void},
        "user_types": {
            name: {
                "kind": "struct" if types.head(number)[1] == STRUCT else "union",
                "size": types.head(number)[4],
                "fields": dict(types.fields(number)),
            }
            for name, number in named.items()
        },
        "enums": {
            types.name(number): {
                "size": types.head(number)[4],
                "base": "int" if types.head(number)[4] == 4 else "long long int",
                "constants": types.constants(number),
            }
            for number in types.numbers(ENUM, ENUM64)
        },
        "symbols": symbols,
    }
