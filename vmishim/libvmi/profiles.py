"""The profile of a guest for which a configuration was given: files of symbols and layouts, laid over the guest's own.

Source: ``core.c`` and ``json_profiles/`` of LibVMI.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from functools import cached_property
from typing import Any, Protocol

from vmishim import files
from vmishim.kernel import kallsyms
from vmishim.kernel.profile import Member, Profile
from vmishim.libvmi.config import MEMBERS, Config, ConfigError
from vmishim.libvmi.constants import LibvmiInitError

MAP_MAX, PROFILE_MAX = 128 << 20, 256 << 20
"""Bytes of a symbol map and of a JSON profile: several times as many as any kernel's."""


class _File(Protocol):
    """Symbols and layouts from a file."""

    def symbol(self, name: str) -> int: ...
    def symbol_at(self, address: int) -> str: ...
    def member(self, struct: str, member: str) -> Member: ...
    def size(self, struct: str) -> int: ...


class _Symbols:
    """Symbols of a file, by name and by address."""

    _symbols: dict[str, int]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {address: name for name, address in reversed(self._symbols.items())}

    def symbol(self, name: str) -> int:
        """Address as the file has it. :raises KeyError: not in it."""
        return self._symbols[name]

    def symbol_at(self, address: int) -> str:
        """The first name at exactly ``address``. :raises KeyError: none."""
        return self._names[address]


class SystemMap(_Symbols):
    """A ``System.map`` or a copy of ``/proc/kallsyms``.

    :raises ConfigError: ``OS``: it cannot be read
    """

    def __init__(self, path: str) -> None:
        try:
            data = files.read(path, MAP_MAX)
        except OSError as error:
            raise ConfigError(
                LibvmiInitError.OS, f"symbol map {path} cannot be read: {error.strerror}; vmishim does not need one"
            ) from None
        try:
            self._symbols = kallsyms.of_map(data).addresses
        except ValueError as error:
            raise ConfigError(LibvmiInitError.OS, f"symbol map {path} cannot be used: {error}") from None

    def member(self, struct: str, member: str) -> Member:
        """:raises KeyError: always; a symbol map has no layouts."""
        raise KeyError(member)

    def size(self, struct: str) -> int:
        """:raises KeyError: always; a symbol map has no layouts."""
        raise KeyError(struct)


def _told(value: Any) -> str:
    """A value of a JSON file, in few characters however large it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value[:40] if isinstance(value, str) else value)[:50]


class JsonProfile(_Symbols):
    """A Volatility 3 symbol file (ISF), or a Rekall profile, in plain JSON.

    :param path: the file, or for messages where ``data`` comes from
    :param data: what the JSON says, if it was read already
    :raises ConfigError: ``OS``: it cannot be read, or is neither
    """

    def __init__(self, path: str, data: Any = None) -> None:
        try:
            data = json.loads(files.read(path, PROFILE_MAX)) if data is None else data
        except RecursionError:
            raise ConfigError(LibvmiInitError.OS, f"profile {path} cannot be read: it is nested too deeply") from None
        except (OSError, ValueError) as error:
            raise ConfigError(LibvmiInitError.OS, f"profile {path} cannot be read: {error}") from None
        self._path = path
        if isinstance(data, dict) and "user_types" in data:
            self._rekall, types, symbols = False, "user_types", "symbols"
        elif isinstance(data, dict) and "$STRUCTS" in data:
            self._rekall, types, symbols = True, "$STRUCTS", "$CONSTANTS"
        else:
            raise ConfigError(
                LibvmiInitError.OS,
                f"{path} is not a kernel profile: it has neither 'user_types' (Volatility 3) nor '$STRUCTS' (Rekall)",
            )
        self._data = data
        self._types = self._object(data, types)
        self._symbols: dict[str, int] = {}
        for name, entry in self._object(data, symbols, {}).items():
            holder, key = (entry, "address") if not self._rekall else ({name: entry}, name)
            # Some dumps write addresses as signed 64-bit numbers.
            self._symbols[name] = self._number(holder, key, f"symbol {name}", -(1 << 63), 1 << 64) % (1 << 64)

    def _damaged(self, where: str, what: str) -> ConfigError:
        return ConfigError(LibvmiInitError.OS, f"profile {self._path} is damaged at {where[:80]}: {what[:80]}")

    def _object(self, holder: Any, key: str, default: Any = None, where: str = "") -> dict[str, Any]:
        """The JSON object that is a value of another. :raises ConfigError: ``OS``: it is none"""
        found = self._value(holder, key, where or key, default)
        if not isinstance(found, dict):
            raise self._damaged(where or key, f"{key} is {_told(found)}, not an object")
        return found

    def _number(self, holder: Any, key: str, where: str, low: int = 0, high: int = 1 << 32) -> int:
        """The whole number that is a value of a JSON object. :raises ConfigError: ``OS``: it is none"""
        found = self._value(holder, key, where)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self._damaged(where, f"{key} is {_told(found)}, not a whole number")
        if not low <= found < high:
            raise self._damaged(where, f"{key} is {_told(found)}, which is out of range")
        return found

    def _value(self, holder: Any, key: str, where: str, default: Any = None) -> Any:
        if not isinstance(holder, dict):
            raise self._damaged(where, f"{_told(holder)} is not an object")
        if key not in holder and default is None:
            raise self._damaged(where, f"it has no {key}")
        return holder.get(key, default)

    def size(self, struct: str) -> int:
        """Bytes of the structure.

        :raises KeyError: not in the file
        :raises ConfigError: ``OS``: its entry is damaged
        """
        if self._rekall:
            return self._number({"size": self._rekalls(struct)[0]}, "size", struct)
        return self._number(self._types[struct], "size", struct)

    def member(self, struct: str, member: str) -> Member:
        """As ``Profile.member``.

        :raises KeyError: not in the file
        :raises ConfigError: ``OS``: its entry is damaged
        """
        where = f"{struct}.{member}"
        if self._rekall:
            entry = self._rekalls(struct)[1][member]
            if not isinstance(entry, list) or not entry:
                raise self._damaged(where, f"{_told(entry)} is not a list of offset and type")
            return Member(self._number({"offset": entry[0]}, "offset", where), 0)
        try:
            offset, of_type = 0, {"kind": "struct", "name": struct}
            for part in member.split("."):
                # A pointer or a number has no members.
                if not isinstance(name := of_type.get("name"), str):
                    raise KeyError(member)
                within, of_type = self._field(name, part, set(), ())
                offset += within
            return Member(offset, self._size(of_type, where))
        except RecursionError:
            raise self._damaged(where, "it is nested too deeply") from None

    def bits(self, struct: str, member: str) -> tuple[int, int, int]:
        """A bit field: its offset in bytes, its first bit, and the bit after its last.

        :raises KeyError: not in the file, or not a bit field
        :raises ConfigError: ``OS``: its entry is damaged

        Source: ``vmi_get_bitfield_offset_and_size_from_json``.
        """
        where = f"{struct}.{member}"
        if self._rekall:
            offset = self.member(struct, member).offset
            entry = self._rekalls(struct)[1][member]
            match entry:
                case [_, ["BitField", dict() as bits], *_]:
                    return offset, self._number(bits, "start_bit", where), self._number(bits, "end_bit", where)
            raise KeyError(member)
        field = self._object(self._types[struct], "fields", where=where)[member]
        of_type = self._object(field, "type", where=where)
        if of_type.get("kind") != "bitfield":
            raise KeyError(member)
        first = self._number(of_type, "bit_position", where)
        return self._number(field, "offset", where), first, first + self._number(of_type, "bit_length", where)

    def type_name(self, struct: str, member: str) -> str:
        """Name of a member's type.

        :raises KeyError: not in the file, or a type without a name
        :raises ConfigError: ``OS``: its entry is damaged

        Source: ``vmi_get_struct_field_type_name_from_json``, which knows Volatility's files only.
        """
        if self._rekall:
            raise KeyError(member)
        name = self._field(struct, member, set(), ())[1].get("name")
        if not isinstance(name, str):
            raise KeyError(member)
        return name

    def _rekalls(self, struct: str) -> tuple[Any, dict[str, Any]]:
        entry = self._types[struct]
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[1], dict):
            raise self._damaged(struct, f"{_told(entry)} is not a list of size and members")
        return entry[0], entry[1]

    def _field(self, struct: str, member: str, met: set[str], around: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
        where = f"{struct}.{member}"
        if struct in around:
            raise self._damaged(where, "the structure contains itself")
        if struct in met:  # it was searched and does not have it, wherever else it is embedded
            raise KeyError(member)
        met.add(struct)
        fields = self._object(self._types[struct], "fields", where=where)
        if member in fields:
            field = fields[member]
            return self._number(field, "offset", where), self._object(field, "type", where=where)
        # LibVMI looks into every structure that is embedded, whether it has a name or not: sock has skc_family.
        for name, field in fields.items():
            of_type = field.get("type") if isinstance(field, dict) else None
            inner = of_type.get("name") if isinstance(of_type, dict) else None
            if not isinstance(inner, str) or inner not in self._types:
                continue
            try:
                within, found = self._field(inner, member, met, (*around, struct))
            except KeyError:
                continue
            return self._number(field, "offset", f"{struct}.{name}") + within, found
        raise KeyError(member)

    def _size(self, of_type: dict[str, Any], where: str) -> int:
        kind = of_type.get("kind")
        if kind == "pointer":
            return 8
        if kind == "array":
            return self._number(of_type, "count", where) * self._size(
                self._object(of_type, "subtype", where=where), where
            )
        if kind == "bitfield":
            return self._size(self._object(of_type, "type", where=where), where)
        home = {"base": "base_types", "enum": "enums"}.get(str(kind), "user_types")
        if kind not in ("base", "enum", "struct", "union", "class"):
            return 0  # a function
        name = of_type.get("name")
        types = self._object(self._data, home, {}, where)
        if not isinstance(name, str) or name not in types:
            return 0
        return self._number(types[name], "size", where)


class ConfiguredProfile:
    """The guest's own profile; what a configuration says wins over it.

    :param config: what was given
    :param guest: the guest's own profile
    :raises ConfigError: ``OS``: the configuration names another operating system, or a file that cannot be used
    """

    def __init__(self, config: Config, guest: Profile) -> None:
        ostype = config.strings.get("ostype", "Linux")
        if ostype != "Linux":
            raise ConfigError(
                LibvmiInitError.OS, f"{config.source} says ostype {ostype!r}, but the guest runs Linux {guest.release}"
            )
        self._config = config
        self._guest = guest
        self._warned = False
        json_path = config.strings.get("volatility_ist") or config.strings.get("rekall_profile")
        sysmap = config.strings.get("sysmap")
        self._layouts: _File | None = JsonProfile(json_path) if json_path else None
        self._map: _File | None = SystemMap(sysmap) if sysmap else self._layouts
        self.profile_path, self.sysmap_path = json_path, sysmap
        self.release = guest.release
        self.hostname = guest.hostname
        self.boot_id = guest.boot_id
        self.page_offset = guest.page_offset
        self.memory_size = guest.memory_size
        self.vcpus = guest.vcpus
        self.levels = guest.levels
        self.kaslr_offset = self._kaslr_offset()
        self._members: dict[tuple[str, str], Member] = {}
        self._symbols: dict[str, int] = {}

    def _kaslr_offset(self) -> int:
        """How far the guest's kernel is from the addresses in the configuration's symbols."""
        given = self._config.numbers.get("linux_kaslr")
        if given:
            return given
        if self._map is None:
            return self._guest.kaslr_offset
        try:
            return (self._guest.symbol("init_task") - self._map.symbol("init_task")) % (1 << 64)
        except KeyError:
            return self._guest.kaslr_offset

    def symbol(self, name: str) -> int:
        """As ``Profile.symbol``; a given symbol map or JSON profile wins."""
        if name not in self._symbols:
            self._symbols[name] = self._symbol(name)
        return self._symbols[name]

    def _symbol(self, name: str) -> int:
        try:
            given = self._map.symbol(name) if self._map else None
        except KeyError:
            given = None
        if given is None:
            return self._guest.symbol(name)
        given = (given + self.kaslr_offset) % (1 << 64)
        with suppress(KeyError):  # phys_startup_64 and such, which a running kernel does not list
            self._compare(f"symbol {name}", given, self._guest.symbol(name))
        return given

    def symbol_at(self, address: int) -> str:
        """As ``Profile.symbol_at``; a given symbol map or JSON profile wins."""
        if self._map is not None:
            with suppress(KeyError):
                return self._map.symbol_at((address - self.kaslr_offset) % (1 << 64))
        return self._guest.symbol_at(address)

    def member(self, struct: str, member: str) -> Member:
        """As ``Profile.member``; a given offset or layout wins."""
        key = (struct, member)
        if key not in self._members:
            self._members[key] = self._member(struct, member)
        return self._members[key]

    def _member(self, struct: str, member: str) -> Member:
        name = next((name for name, place in MEMBERS.items() if place == (struct, member)), "")
        given = self._config.numbers.get(name)
        layout: Member | None = None
        if given:
            layout = Member(given, 0)
        elif self._layouts is not None:
            with suppress(KeyError):
                layout = self._layouts.member(struct, member)
        try:
            truth = self._guest.member(struct, member)
        except KeyError:
            if layout is None:
                raise
            return layout
        if layout is None:
            return truth
        self._compare(name or f"offset of {struct}.{member}", layout.offset, truth.offset)
        return Member(layout.offset, layout.size or truth.size)

    def size(self, struct: str) -> int:
        """As ``Profile.size``; a given layout wins."""
        if self._layouts is not None:
            with suppress(KeyError):
                return self._layouts.size(struct)
        return self._guest.size(struct)

    def forget(self) -> None:
        """As ``Profile.forget``; what was given stays."""
        self._symbols.clear()
        self._guest.forget()

    def _compare(self, what: str, given: int, truth: int) -> None:
        if given != truth and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._config.source}: {what} is {given:#x}, but the running guest says {truth:#x}; "
                "the configuration wins. Remove it, or write a correct one with 'vmishim config --export'",
                stacklevel=4,
            )
