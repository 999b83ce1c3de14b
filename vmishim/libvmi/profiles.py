"""The profile of a guest for which a configuration was given: files of symbols and layouts, laid over the guest's own.

Source: ``core.c`` and ``json_profiles/`` of LibVMI.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from io import BytesIO
from typing import Any, Protocol

from vmishim import files
from vmishim.kernel.profile import Member, Profile
from vmishim.libvmi.config import MEMBERS, Config, ConfigError
from vmishim.libvmi.constants import LibvmiInitError

MAP_MAX, SYMBOLS_MAX, PROFILE_MAX = 128 << 20, 1 << 20, 256 << 20
"""Bytes of a symbol map, its symbols, and bytes of a JSON profile: several times as many as any kernel's."""


class _File(Protocol):
    """Symbols and layouts from a file."""

    def symbol(self, name: str) -> int: ...
    def symbol_at(self, address: int) -> str: ...
    def member(self, struct: str, member: str) -> Member: ...
    def size(self, struct: str) -> int: ...


class SystemMap:
    """A ``System.map`` or a copy of ``/proc/kallsyms``.

    :raises ConfigError: ``OS``: it cannot be read
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            data = files.read(path, MAP_MAX)
        except OSError as error:
            raise ConfigError(
                LibvmiInitError.OS, f"symbol map {path} cannot be read: {error.strerror}; vmishim does not need one"
            ) from None
        self._symbols: dict[str, int] = {}
        for raw in BytesIO(data):
            line = raw.decode("ascii", "replace")
            columns = line.split(None, 3)
            if len(columns) < 3:
                continue
            try:
                self._symbols.setdefault(columns[2], int(columns[0], 16))
            except ValueError:
                raise ConfigError(LibvmiInitError.OS, f"{path} is not a symbol map: {line[:80]!r}") from None
            if len(self._symbols) > SYMBOLS_MAX:
                raise ConfigError(LibvmiInitError.OS, f"{path} has more than {SYMBOLS_MAX} symbols")

    @cached_property
    def _names(self) -> dict[int, str]:
        return {address: name for name, address in reversed(self._symbols.items())}

    def symbol(self, name: str) -> int:
        """Address as the file has it. :raises KeyError: not in it."""
        return self._symbols[name]

    def symbol_at(self, address: int) -> str:
        """The first name at exactly ``address``. :raises KeyError: none."""
        return self._names[address]

    def member(self, struct: str, member: str) -> Member:
        """:raises KeyError: always; a symbol map has no layouts."""
        raise KeyError(member)

    def size(self, struct: str) -> int:
        """:raises KeyError: always; a symbol map has no layouts."""
        raise KeyError(struct)


class JsonProfile:
    """A Volatility 3 symbol file (ISF), or a Rekall profile, in plain JSON.

    :raises ConfigError: ``OS``: it cannot be read, or is neither
    """

    def __init__(self, path: str) -> None:
        try:
            self._data: dict[str, Any] = json.loads(files.read(path, PROFILE_MAX))
        except RecursionError:
            raise ConfigError(LibvmiInitError.OS, f"profile {path} cannot be read: it is nested too deeply") from None
        except (OSError, ValueError) as error:
            raise ConfigError(LibvmiInitError.OS, f"profile {path} cannot be read: {error}") from None
        self._path = path
        with self._checked("its symbols"):
            self._read_symbols()

    @contextmanager
    def _checked(self, what: str) -> Iterator[None]:
        """For the length of the block, anything that the file does not have as its format says is a clear error."""
        try:
            yield
        except (AttributeError, IndexError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ConfigError(
                LibvmiInitError.OS, f"profile {self._path} is damaged at {what[:80]}: {str(error)[:80]}"
            ) from None

    def _read_symbols(self) -> None:
        path = self._path
        if isinstance(self._data, dict) and "user_types" in self._data:
            symbols = self._data.get("symbols", {}).items()
            self._symbols = {name: int(entry.get("address", "no address")) for name, entry in symbols}
            self._rekall = False
        elif isinstance(self._data, dict) and "$STRUCTS" in self._data:
            self._symbols = {name: int(address) for name, address in self._data.get("$CONSTANTS", {}).items()}
            self._rekall = True
        else:
            raise ConfigError(
                LibvmiInitError.OS,
                f"{path} is not a kernel profile: it has neither 'user_types' (Volatility 3) nor '$STRUCTS' (Rekall)",
            )

    @cached_property
    def _names(self) -> dict[int, str]:
        return {address: name for name, address in reversed(self._symbols.items())}

    def symbol(self, name: str) -> int:
        """Address as the file has it. :raises KeyError: not in it."""
        # Some dumps write addresses as signed 64-bit numbers.
        return int(self._symbols[name]) % (1 << 64)

    def symbol_at(self, address: int) -> str:
        """The first name at exactly ``address``. :raises KeyError: none."""
        return self._names[address]

    def size(self, struct: str) -> int:
        """Bytes of the structure. :raises KeyError: not in the file."""
        with self._checked(struct):
            if self._rekall:
                return int(self._data["$STRUCTS"][struct][0])
            return int(self._data["user_types"][struct]["size"])

    def member(self, struct: str, member: str) -> Member:
        """As ``Profile.member``. :raises KeyError: not in the file."""
        with self._checked(f"{struct}.{member}"):
            if self._rekall:
                offset, _ = self._data["$STRUCTS"][struct][1][member]
                return Member(int(offset), 0)
            offset, entry = 0, {"kind": "struct", "name": struct}
            for part in member.split("."):
                within, entry = self._field(entry["name"], part, set())
                offset += within
            return Member(offset, self._size(entry))

    def _field(self, struct: str, member: str, met: set[str]) -> tuple[int, dict[str, Any]]:
        if struct in met:  # a structure that was searched does not have it, wherever else it is embedded
            raise KeyError(member)
        met.add(struct)
        fields = self._data["user_types"][struct]["fields"]
        if member in fields:
            return int(fields[member]["offset"]), fields[member]["type"]
        for entry in fields.values():
            if entry.get("anonymous"):
                try:
                    within, of_type = self._field(entry["type"]["name"], member, met)
                except KeyError:
                    continue
                return int(entry["offset"]) + within, of_type
        raise KeyError(member)

    def _size(self, entry: dict[str, Any]) -> int:
        match entry["kind"]:
            case "pointer":
                return 8
            case "array":
                return int(entry["count"]) * self._size(entry["subtype"])
            case "base":
                return int(self._data["base_types"][entry["name"]]["size"])
            case "enum":
                return int(self._data["enums"][entry["name"]]["size"])
            case "bitfield":
                return self._size(entry["type"])
            case _:
                return self.size(entry["name"])


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
        self.profile_path = json_path
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
