"""BTF, the kernel's own description of its types: the offset and size of each structure member.

Bytes in, offsets out; a ``KeyError`` where the blob has no answer or contradicts itself. The bytes come from
``/sys/kernel/btf/vmlinux``, or from guest memory at ``__start_BTF``. Only the standard library is used, because the
agent in the guest carries this module too. The type section is scanned once for the start and name of each type (0.15 s
for the 160,000 types of a 6.18 kernel); everything else is decoded on demand.

Source: ``Documentation/bpf/btf.rst`` and ``include/uapi/linux/btf.h`` of the kernel.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator

from vmishim.kernel.profile import Member

MAGIC = 0xEB9F
POINTER_SIZE = 8
_HEADER = struct.Struct("<HBBIIIII")

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF, _VOLATILE, _CONST, _RESTRICT = range(1, 12)
_FUNC, _FUNC_PROTO, _VAR, _DATASEC, _FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = range(12, 20)
_QUALIFIERS = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})
_SIZED = frozenset({_INT, _STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64})

# Words after a type's first three: a fixed part, and a part for each of its vlen entries.
_FIXED_WORDS = {_INT: 1, _ARRAY: 3, _VAR: 1, _DECL_TAG: 1}
_ENTRY_WORDS = {_STRUCT: 3, _UNION: 3, _ENUM: 2, _FUNC_PROTO: 2, _DATASEC: 3, _ENUM64: 3}

# The bytes may come from a hostile guest. The first four are the kernel's own limits: BTF_MAX_TYPE,
# BTF_MAX_NAME_OFFSET, KSYM_NAME_LEN (__btf_name_valid), and more than what the others allow together.
TYPES_MAX, STRINGS_MAX, NAME_MAX, SIZE_MAX = 0xFFFFF, 0xFFFFFF, 512, 128 << 20
"""Types of a blob, bytes of its strings, bytes of a name, bytes of the blob."""
_DEEPEST = 64
"""Types nested deeper than this count as a loop."""
_MEMBERS_MAX, _LAYOUTS_MAX = 1 << 17, 1 << 18
"""Most members of one structure, those of anonymous members included, and most places searched for one pointer; most
members of all structures asked for, which is three times what all of a kernel's have."""
_SHARED = 2
"""Bytes of all names for each byte of the strings: names may share their ends, but few do."""
_INDEX_MAX = 1 << 32
"""BTF's own limit on the elements of an array."""


class Btf:
    """One BTF blob, indexed.

    :param data: the blob, from its header on; bytes after its end are ignored
    :raises ValueError: not BTF, or it contradicts itself
    """

    def __init__(self, data: bytes) -> None:
        types, self._strings = _sections(data)
        self._words = words = array("I")
        words.frombytes(types)
        if sys.byteorder == "big":
            words.byteswap()
        self._starts = starts = array("I", [0])  # type 0 is void and takes no space
        self._tags: dict[str, int] = {}
        self._typedefs: dict[str, int] = {}
        self._layouts: dict[int, dict[str, tuple[Member, int]]] = {}
        self._laid_out = 0
        self._sizes: dict[int, int] = {}
        fixed = [_FIXED_WORDS.get(kind, 0) for kind in range(32)]
        entry = [_ENTRY_WORDS.get(kind, 0) for kind in range(32)]
        at, end, number, left = 0, len(words), 0, _SHARED * len(self._strings)
        try:
            while at < end:
                number += 1
                if number > TYPES_MAX:
                    raise ValueError(f"BTF has more types than the kernel's limit of {TYPES_MAX}")
                starts.append(at)
                info = words[at + 1]
                kind = info >> 24 & 31
                if not 0 < kind <= _ENUM64:
                    # A kind newer than this module: its length is unknown, so nothing after it can be found.
                    raise ValueError(f"BTF type {number} is of unknown kind {kind}; update vmishim")
                if words[at] and kind in (_STRUCT, _UNION, _TYPEDEF):
                    named = self._typedefs if kind == _TYPEDEF else self._tags
                    name = self._string(words[at])
                    left -= len(name)
                    if left < 0:
                        raise ValueError(
                            f"the names of BTF's types are longer than all of its strings, {_SHARED} times"
                        )
                    named.setdefault(name, number)
                at += 3 + fixed[kind] + entry[kind] * (info & 0xFFFF)
        except IndexError:
            at = end + 1
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        if at != end:
            raise ValueError(f"BTF type section is cut off within type {number}")

    def __contains__(self, name: object) -> bool:
        """Whether a structure, union or typedef of this name exists."""
        return name in self._tags or name in self._typedefs

    def structs(self) -> Iterator[str]:
        """Names of all structures and unions, in the order of the blob."""
        return iter(self._tags)

    def size(self, name: str) -> int:
        """``sizeof`` of a structure, union or typedef, in bytes.

        :raises KeyError: no type has this name
        """
        return self._size(self._find(name))

    def member(self, name: str, member: str) -> Member:
        """Where a member is in a structure, union or typedef called ``name``.

        :param member: may be dotted through embedded structures (``"f_path.dentry"``) and indexed in arrays
            (``"mem[1].base"``); members of anonymous structures and unions are found as C finds them
        :returns: bytes from the start of ``name``, and bytes of the member; a bit field gives its storage unit
        :raises KeyError: no such type or member; what a pointer points to is not a member
        """
        number, offset, size = self._find(name), 0, 0
        for part in member.split("."):
            field, *indexes = part.replace("]", "").split("[")
            try:
                found, number = self._members(number)[field]
                size = found.size
                for index in indexes:
                    number, size = self._element(number)
                    number_of = int(index, 0)
                    if not 0 <= number_of < _INDEX_MAX:
                        raise KeyError(member)
                    offset += number_of * size
            except (KeyError, ValueError):
                raise KeyError(f"struct {name} has no member {member!r} in this kernel") from None
            offset += found.offset
        return Member(offset, size)

    def layout(self, name: str) -> dict[str, Member]:
        """All members of a structure, union or typedef by name, those of anonymous ones too, in order of declaration.

        :raises KeyError: no type has this name
        """
        return {field: member for field, (member, _) in self._members(self._find(name)).items()}

    def pointee(self, of_type: str | int, offset: int) -> tuple[int, int] | None:
        """What the pointer at ``offset`` of a type points to. An offset past the type's end counts in an array of it.

        :param of_type: a structure's name, or a type's number, as this returns it
        :returns: (number, bytes) of the type pointed to: 8 bytes for a pointer to pointers, 1 for a string, 0 for
            ``void``; None when there is no pointer at ``offset``
        :raises KeyError: no such type
        """
        number = self._find(of_type) if isinstance(of_type, str) else of_type
        if not 0 <= number < len(self._starts):
            raise KeyError(of_type)
        size = self._size(number)
        return self._pointee(number, offset % size, 0, {}) if size else None

    def _pointee(self, number: int, offset: int, depth: int, met: dict[tuple[int, int], int]) -> tuple[int, int] | None:
        """As ``pointee``. ``met``: the types and offsets that were searched, and how many members that took."""
        if (number, offset) in met:
            return None
        met[number, offset] = 0
        kind, at, target = self._type(number)
        if kind == _PTR:
            return (target, self._size(target)) if offset == 0 else None
        if depth < _DEEPEST and kind == _ARRAY:
            element, size = self._element(number)
            return self._pointee(element, offset % size, depth + 1, met) if size else None
        if depth < _DEEPEST and kind in (_STRUCT, _UNION):
            words = self._words
            info = words[at + 1]
            met[number, offset] = info & 0xFFFF
            if len(met) > _DEEPEST**2 or sum(met.values()) > _MEMBERS_MAX:
                raise KeyError(f"BTF type {number} is nested too often to be searched for a pointer")
            for entry in range(at + 3, at + 3 + 3 * (info & 0xFFFF), 3):
                place = self._place(words[entry + 1], words[entry + 2], bool(info >> 31))
                if place.offset <= offset < place.offset + place.size:
                    found = self._pointee(words[entry + 1], offset - place.offset, depth + 1, met)
                    if found is not None:
                        return found
        return None

    def _find(self, name: str) -> int:
        # C has one name space for tags and another for typedefs. "struct task_struct" is accepted too.
        bare = name.removeprefix("struct ").removeprefix("union ")
        number = self._tags.get(bare) or self._typedefs.get(bare)
        if number is None:
            raise KeyError(f"this kernel's BTF has no struct {bare!r}")
        return number

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset, offset + NAME_MAX + 1)
        if end < 0:
            raise KeyError(f"BTF string {offset} has no end within the kernel's limit of {NAME_MAX} bytes")
        return self._strings[offset:end].decode("ascii", "replace")

    def _type(self, number: int) -> tuple[int, int, int]:
        """(kind, where its words start, its size or what it refers to) with typedefs and qualifiers resolved."""
        words = self._words
        for _ in range(_DEEPEST):
            if number == 0:
                return 0, 0, 0
            if number >= len(self._starts):
                raise KeyError(f"BTF refers to type {number}, but has only {len(self._starts) - 1}")
            at = self._starts[number]
            kind = words[at + 1] >> 24 & 31
            if kind not in _QUALIFIERS:
                return kind, at, words[at + 2]
            number = words[at + 2]
        raise KeyError(f"BTF type {number} refers to itself")

    def _size(self, number: int, depth: int = 0) -> int:
        kind, at, size = self._type(number)
        if kind in _SIZED:
            return size
        if kind == _PTR:
            return POINTER_SIZE
        if kind == _ARRAY and depth < _DEEPEST:
            if number not in self._sizes:
                self._sizes[number] = self._words[at + 5] * self._size(self._words[at + 3], depth + 1)
            return self._sizes[number]
        return 0

    def _element(self, number: int) -> tuple[int, int]:
        """(type, size) of an array's elements. :raises KeyError: not an array."""
        kind, at, _ = self._type(number)
        if kind != _ARRAY:
            raise KeyError(number)
        element = self._words[at + 3]
        return element, self._size(element)

    def _members(self, number: int, depth: int = 0) -> dict[str, tuple[Member, int]]:
        """Members of a structure with their types; empty for any other type."""
        if number in self._layouts:
            return self._layouts[number]
        kind, at, _ = self._type(number)
        # Each structure is expanded once, and one that contains itself finds itself empty: in a hostile blob the
        # combinations of nesting could be too many to enumerate.
        members = self._layouts[number] = {}
        self._laid_out += 1
        looked = 0
        if kind in (_STRUCT, _UNION) and depth < _DEEPEST:
            words = self._words
            info = words[at + 1]
            for entry in range(at + 3, at + 3 + 3 * (info & 0xFFFF), 3):
                name, of_type, where = words[entry], words[entry + 1], words[entry + 2]
                member = self._place(of_type, where, bool(info >> 31))
                inside = {} if name else self._members(of_type, depth + 1)
                looked += len(inside)
                self._laid_out += len(inside) + 1
                if looked > _MEMBERS_MAX or self._laid_out > _LAYOUTS_MAX:
                    del self._layouts[number]
                    raise KeyError(f"BTF type {number} has too many members")
                if name:
                    members.setdefault(self._string(name), (member, of_type))
                for inner, (place, inner_type) in inside.items():
                    members.setdefault(inner, (Member(member.offset + place.offset, place.size), inner_type))
        return members

    def _place(self, of_type: int, where: int, has_widths: bool) -> Member:
        size = self._size(of_type)
        # Since kernel 4.20 the structure says that it has bit fields, and the width is in the top byte; before, and for
        # a member as wide as its type, the offset stands alone.
        bits = where & 0xFFFFFF if has_widths else where
        width = where >> 24 if has_widths else 0
        if width or bits % 8:
            unit = size * 8 or 8
            return Member(bits // unit * unit // 8, size)
        return Member(bits // 8, size)


def _sections(data: bytes) -> tuple[bytes, bytes]:
    """Type and string section. :raises ValueError: not BTF, or cut off"""
    if len(data) < _HEADER.size:
        raise ValueError(f"BTF needs a header of {_HEADER.size} bytes, this is {len(data)} bytes long")
    magic, version, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
    if magic != MAGIC or version != 1:
        raise ValueError(f"not BTF: magic {magic:#06x} version {version}, expected {MAGIC:#06x} version 1")
    if str_len > STRINGS_MAX or type_len > SIZE_MAX:
        raise ValueError(f"BTF has {str_len} bytes of strings, more than the kernel's limit of {STRINGS_MAX}")
    types = data[header + type_off : header + type_off + type_len]
    strings = data[header + str_off : header + str_off + str_len]
    if len(types) != type_len or type_len % 4 or len(strings) != str_len or not strings.endswith(b"\0"):
        raise ValueError(f"BTF is cut off: {len(data)} bytes, its header promises {header + str_off + str_len}")
    return types, strings


def length(header: bytes) -> int:
    """Bytes of the whole blob that starts with ``header`` (24 bytes or more).

    :raises ValueError: this is not BTF, or it is too large to be a kernel's
    """
    if len(header) < _HEADER.size:
        raise ValueError(f"BTF needs a header of {_HEADER.size} bytes, this is {len(header)} bytes long")
    magic, _, _, start, type_off, type_len, str_off, str_len = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise ValueError(f"not BTF: magic {magic:#06x}, expected {MAGIC:#06x}")
    size = int(start + max(type_off + type_len, str_off + str_len))
    if size > SIZE_MAX:
        raise ValueError(f"BTF of {size} bytes is larger than any kernel's, {SIZE_MAX} at most")
    return size
