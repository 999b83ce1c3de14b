"""LibVMI's configuration: ``libvmi.conf``, strings, dictionaries, and JSON profiles of kernels.

vmishim needs none of it, the guest tells its own offsets. One that is given is read as LibVMI reads it, checked, and
wins where it says something; where it contradicts the guest, that is warned about once.

Source: ``config/grammar.y``, ``config/lexicon.l``, ``core.c`` and ``json_profiles/`` of LibVMI.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vmishim.errors import LibvmiError
from vmishim.kernel.profile import Member, Profile
from vmishim.libvmi.constants import VMIConfig

MEMBERS = {
    "linux_tasks": ("task_struct", "tasks"),
    "linux_mm": ("task_struct", "mm"),
    "linux_pid": ("task_struct", "pid"),
    "linux_name": ("task_struct", "comm"),
    "linux_pgd": ("mm_struct", "pgd"),
}
"""Offsets that ``Libvmi.get_offset`` knows, and what each is the offset of."""

_NUMBERS = {
    *MEMBERS, "kpgd", "linux_addr", "linux_init_task", "linux_kaslr",
    "aarch64_ttbr0_va_width", "aarch64_ttbr1_va_width",
    "win_ntoskrnl", "win_ntoskrnl_va", "win_tasks", "win_pdbase", "win_pid", "win_pname", "win_kdvb", "win_kdbg",
    "win_kpcr", "win_sysproc",
    "freebsd_name", "freebsd_pid", "freebsd_vmspace", "freebsd_pmap", "freebsd_pgd",
}  # fmt: skip
_PATHS = {"sysmap", "rekall_profile", "volatility_ist"}
_WORDS = {"ostype", "pagemode", "aarch64_ttbr0_granule_size", "aarch64_ttbr1_granule_size"}

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*(?:\n|$))
    |(?P<text>[a-zA-Z0-9/._@-]+)
    |(?P<mark>["{};=])""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|[0-9]+")
_WORD = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]+")


@dataclass(frozen=True)
class Config:
    """What a configuration says of one domain."""

    source: str
    """Where it was read, for messages."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Offsets (``linux_tasks`` ...) and addresses (``kpgd``, ``linux_init_task``), by LibVMI's names."""
    strings: Mapping[str, str] = field(default_factory=dict)
    """``ostype``, ``pagemode``, ``sysmap``, ``rekall_profile``, ``volatility_ist``."""


def search_path() -> Iterator[Path]:
    """Where LibVMI looks for ``libvmi.conf``; the first that exists is taken."""
    yield Path.cwd() / "libvmi.conf"
    with suppress(KeyError):
        yield Path(pwd.getpwnam(os.environ["SUDO_USER"]).pw_dir) / "etc/libvmi.conf"
    if "HOME" in os.environ:
        yield Path(os.environ["HOME"]) / "etc/libvmi.conf"
    yield Path("/etc/libvmi.conf")


def read(mode: VMIConfig, config: Any, domain: str) -> Config | None:
    """Read what ``Libvmi(domain, config_mode=mode, config=config)`` was given.

    :returns: None: there is no configuration, and none is needed
    :raises LibvmiError: ``NO_CONFIG``: it cannot be read; ``NO_CONFIG_ENTRY``: it was named, but does not know the
        domain
    :raises RuntimeError: a value of a dictionary is neither a string nor a number
    """
    # A path as a domain (LibVMI's file mode) is configured under its last part.
    name = domain.rsplit("/", 1)[-1]
    if mode is VMIConfig.GLOBAL_FILE_ENTRY:
        path = next((path for path in search_path() if path.is_file()), None)
        return parse(_text(path), str(path)).get(name) if path else None
    if mode is VMIConfig.DICT:
        return _dictionary(config)
    if not isinstance(config, str):
        raise LibvmiError(
            f"NO_CONFIG: config_mode {mode.name} needs config to be a string, not {type(config).__name__}"
        )
    if mode is VMIConfig.JSON_PATH:
        return Config(config, strings={"volatility_ist": config})
    if mode is VMIConfig.STRING:
        return parse(f"domain {config}", "config string")["domain"]
    found = parse(_text(Path(config)), config).get(name)
    if found is None:
        raise LibvmiError(f"NO_CONFIG_ENTRY: {config} has no entry for {name!r}; add '{name} {{ ... }}' to it")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise LibvmiError(f"NO_CONFIG: {path} cannot be read: {error.strerror}") from None


def parse(text: str, source: str) -> dict[str, Config]:
    """Read the text of a ``libvmi.conf``.

    :param source: its name, for messages
    :returns: by domain; of a domain that stands twice the last entry counts, as in LibVMI
    :raises LibvmiError: ``NO_CONFIG``, with the line and what was expected there
    """
    tokens = list(_tokens(text, source))
    at = 0

    def take(*expected: str) -> str:
        nonlocal at
        token, line = tokens[at] if at < len(tokens) else ("end of file", text.count("\n") + 1)
        if at >= len(tokens) or (expected and token not in expected):
            wanted = " or ".join(expected) or "a name"
            raise LibvmiError(f"NO_CONFIG: {source}:{line}: expected {wanted}, found {token}")
        at += 1
        return token

    def wrong(message: str) -> LibvmiError:
        return LibvmiError(f"NO_CONFIG: {source}:{tokens[at - 1][1]}: {message}")

    domains: dict[str, Config] = {}
    while at < len(tokens):
        domain = take()
        if not _WORD.fullmatch(domain) or _NUMBER.fullmatch(domain):
            raise wrong(f"{domain!r} is no name of a domain: two or more of a-z A-Z 0-9 . _ -, not only digits")
        take("{")
        numbers: dict[str, int] = {}
        strings: dict[str, str] = {}
        while (key := take()) != "}":
            if key == ";":  # LibVMI allows an empty assignment
                continue
            take("=")
            if key in _NUMBERS:
                value = take()
                if not _NUMBER.fullmatch(value):
                    raise wrong(f"{key} needs a number such as 0x450, found {value}")
                numbers[key] = _c_number(value)
            elif key in _PATHS | _WORDS:
                take('"')
                strings[key] = take()
                take('"')
            else:
                raise wrong(f"unknown setting {key!r}; LibVMI knows {', '.join(sorted(_NUMBERS | _PATHS | _WORDS))}")
            take(";")
        domains[domain] = Config(f"{source}, entry {domain}", numbers, strings)
    return domains


def _c_number(text: str) -> int:
    """As strtoull with base 0 reads it: 0x is hexadecimal, and a leading 0 octal."""
    if text.startswith("0") and set(text) <= set("01234567"):
        return int(text, 8)
    return int(text, 16 if text.startswith("0x") else 10)


def _tokens(text: str, source: str) -> Iterator[tuple[str, int]]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise LibvmiError(f"NO_CONFIG: {source}:{line}: unexpected character {text[at]!r}")
        if match.lastgroup != "space":
            yield match.group(), line
        line += match.group().count("\n")
        at = match.end()


def _dictionary(config: Any) -> Config:
    if not isinstance(config, Mapping):
        raise LibvmiError(f"NO_CONFIG: config_mode DICT needs config to be a dictionary, not {type(config).__name__}")
    numbers: dict[str, int] = {}
    strings: dict[str, str] = {}
    for key, value in config.items():
        key = "ostype" if key == "os_type" else key  # LibVMI takes both
        if isinstance(value, str):
            strings[key] = value
        elif isinstance(value, int):
            numbers[key] = value
        else:
            raise RuntimeError(f"Invalid value {value} in config")
    for key in numbers.keys() - _NUMBERS | strings.keys() - _PATHS - _WORDS:
        warnings.warn(f"config: LibVMI knows no setting {key!r} of this kind; it is ignored", stacklevel=2)
    return Config("config dictionary", numbers, strings)


class _Given(Protocol):
    """Symbols and layouts from a file."""

    def symbol(self, name: str) -> int: ...
    def symbol_at(self, address: int) -> str: ...
    def member(self, struct: str, member: str) -> Member: ...
    def size(self, struct: str) -> int: ...


class SystemMap:
    """A ``System.map`` or a copy of ``/proc/kallsyms``.

    :raises LibvmiError: ``OS``: it cannot be read
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            text = Path(path).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise LibvmiError(
                f"OS: symbol map {path} cannot be read: {error.strerror}; vmishim does not need one"
            ) from None
        self._symbols: dict[str, int] = {}
        for line in text.splitlines():
            columns = line.split(None, 3)
            if len(columns) < 3:
                continue
            try:
                self._symbols.setdefault(columns[2], int(columns[0], 16))
            except ValueError:
                raise LibvmiError(f"OS: {path} is no symbol map: {line[:80]!r}") from None

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

    :raises LibvmiError: ``OS``: it cannot be read, or is neither
    """

    def __init__(self, path: str) -> None:
        try:
            self._data: dict[str, Any] = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise LibvmiError(f"OS: profile {path} cannot be read: {error}") from None
        if isinstance(self._data, dict) and "user_types" in self._data:
            self._symbols = {name: entry["address"] for name, entry in self._data.get("symbols", {}).items()}
            self._rekall = False
        elif isinstance(self._data, dict) and "$STRUCTS" in self._data:
            self._symbols = dict(self._data.get("$CONSTANTS", {}))
            self._rekall = True
        else:
            raise LibvmiError(
                f"OS: {path} is no kernel profile: it has neither 'user_types' (Volatility 3) nor '$STRUCTS' (Rekall)"
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
        if self._rekall:
            return int(self._data["$STRUCTS"][struct][0])
        return int(self._data["user_types"][struct]["size"])

    def member(self, struct: str, member: str) -> Member:
        """As ``Profile.member``. :raises KeyError: not in the file."""
        if self._rekall:
            offset, _ = self._data["$STRUCTS"][struct][1][member]
            return Member(int(offset), 0)
        offset, entry = 0, {"kind": "struct", "name": struct}
        for part in member.split("."):
            within, entry = self._field(entry["name"], part)
            offset += within
        return Member(offset, self._size(entry))

    def _field(self, struct: str, member: str) -> tuple[int, dict[str, Any]]:
        fields = self._data["user_types"][struct]["fields"]
        if member in fields:
            return int(fields[member]["offset"]), fields[member]["type"]
        for entry in fields.values():
            if entry.get("anonymous"):
                try:
                    within, of_type = self._field(entry["type"]["name"], member)
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
    """The guest's own profile, overruled by a configuration where that says something.

    :param config: what was given
    :param guest: the guest's own truth
    :raises LibvmiError: ``OS``: the configuration names another operating system, or a file that cannot be used
    """

    def __init__(self, config: Config, guest: Profile) -> None:
        ostype = config.strings.get("ostype", "Linux")
        if ostype != "Linux":
            raise LibvmiError(f"OS: {config.source} says ostype {ostype!r}, but the guest runs Linux {guest.release}")
        self._config = config
        self._guest = guest
        self._warned = False
        json_path = config.strings.get("volatility_ist") or config.strings.get("rekall_profile")
        sysmap = config.strings.get("sysmap")
        self._layouts: _Given | None = JsonProfile(json_path) if json_path else None
        self._map: _Given | None = SystemMap(sysmap) if sysmap else self._layouts
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


def export_entry(profile: Profile, name: str) -> str:
    """A ``libvmi.conf`` entry for a running guest, for use with LibVMI itself.

    :param profile: the guest's own
    :param name: the domain's name, as LibVMI will be asked for it
    :raises ValueError: LibVMI's grammar cannot express the name
    :raises KeyError: the kernel lacks one of the structures
    """
    if not _WORD.fullmatch(name) or _NUMBER.fullmatch(name) or name in _NUMBERS | _PATHS | _WORDS:
        raise ValueError(
            f"libvmi.conf cannot hold a domain named {name!r}: two or more of a-z A-Z 0-9 . _ -, not only digits"
        )
    lines = [
        f"# Linux {profile.release}, written by vmishim from the running guest",
        f"{name} {{",
        '    ostype = "Linux";',
        "    # Copy this file from the guest, or name your own copy of it.",
        f'    sysmap = "/boot/System.map-{profile.release}";',
        *(f"    {key} = {profile.member(*place).offset:#x};" for key, place in MEMBERS.items()),
        "}",
    ]
    return "\n".join(lines) + "\n"
