"""LibVMI's configuration: ``libvmi.conf``, strings and dictionaries.

vmishim does not need one: the guest knows its own offsets. A configuration that you give is read as LibVMI reads it and
checked. Where it contradicts the guest it wins, with one warning.

Source: ``config/grammar.y``, ``config/lexicon.l`` and ``core.c`` of LibVMI.
"""

from __future__ import annotations

import os
import pwd
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmishim import files
from vmishim.errors import LibvmiError
from vmishim.kernel.profile import Profile
from vmishim.libvmi.constants import LibvmiInitError, VMIConfig

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
PATHS = {"sysmap", "rekall_profile", "volatility_ist"}
WORDS = {"ostype", "pagemode", "aarch64_ttbr0_granule_size", "aarch64_ttbr1_granule_size"}
SETTINGS = _NUMBERS | PATHS | WORDS
"""All settings that LibVMI knows: those whose value is a number, a path, or a word."""

TEXT_MAX, TOKEN_MAX = 1 << 20, 1023
"""Bytes of a ``libvmi.conf``, which has room for ten thousand domains; of a word in it, which LibVMI would cut."""

# Like LibVMI's lexer, pass over every character that begins no token: a byte-order mark, a form feed, a NUL. Unlike it,
# take a comment without an end of line for a comment.
_TOKEN = re.compile(r"""#[^\n]*|\n|[a-zA-Z0-9/._@-]+|["{};=]""")
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|[0-9]+")
_RELEASE = re.compile(r"[a-zA-Z0-9._+~-]{1,64}")
_WORD = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]+")


class ConfigError(LibvmiError):
    """A configuration that was given cannot be used. The text is the name of ``reason``, a colon, and what is wrong.

    :ivar reason: ``NO_CONFIG``, ``NO_CONFIG_ENTRY`` or ``OS``
    """

    def __init__(self, reason: LibvmiInitError, what: str) -> None:
        super().__init__(f"{reason.name}: {what}")
        self.reason = reason

    def __reduce__(self) -> tuple[type[ConfigError], tuple[LibvmiInitError, str]]:
        return type(self), (self.reason, str(self).removeprefix(f"{self.reason.name}: "))


@dataclass(frozen=True)
class Config:
    """What a configuration says of one domain."""

    source: str
    """Where it came from, for messages."""
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
    :raises ConfigError: ``NO_CONFIG``: it cannot be read; ``NO_CONFIG_ENTRY``: it was named, but does not know the
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
        raise ConfigError(
            LibvmiInitError.NO_CONFIG,
            f"config_mode {mode.name} needs config to be a string, not {type(config).__name__}",
        )
    if mode is VMIConfig.JSON_PATH:
        return Config(config, strings={"volatility_ist": config})
    if mode is VMIConfig.STRING:
        # LibVMI gets it as a C string, which ends at a NUL.
        return parse(f"domain {config.partition(chr(0))[0]}", "config string")["domain"]
    found = parse(_text(Path(config)), config).get(name)
    if found is None:
        raise ConfigError(
            LibvmiInitError.NO_CONFIG_ENTRY, f"{config} has no entry for {name!r}; add '{name} {{ ... }}' to it"
        )
    return found


def _text(path: Path) -> str:
    try:
        return files.read(path, TEXT_MAX).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigError(LibvmiInitError.NO_CONFIG, f"{path} cannot be read: {error.strerror}") from None


def parse(text: str, source: str) -> dict[str, Config]:
    """Read the text of a ``libvmi.conf``.

    :param source: its name, for messages
    :returns: by domain; of a domain that stands twice the last entry counts, as in LibVMI
    :raises ConfigError: ``NO_CONFIG``, with the line and what was expected there
    """
    tokens = list(_tokens(text, source))
    at = 0

    def take(expected: str, fits: Callable[[str], bool]) -> str:
        nonlocal at
        if at < len(tokens) and fits(tokens[at][0]):
            at += 1
            return tokens[at - 1][0]
        found, line = tokens[at] if at < len(tokens) else ("the end", text.count("\n") + 1)
        raise ConfigError(LibvmiInitError.NO_CONFIG, f"{source}:{line}: expected {expected}, found {found}")

    def mark(expected: str) -> None:
        take(expected, lambda word: word == expected)

    domains: dict[str, Config] = {}
    while at < len(tokens):
        domain = take("the name of a domain (two or more of a-z A-Z 0-9 . _ -, not only digits)", _is_word)
        mark("{")
        numbers: dict[str, int] = {}
        strings: dict[str, str] = {}
        while (key := take("a setting of LibVMI, or }", lambda word: word in SETTINGS or word in "};")) != "}":
            if key == ";":  # LibVMI allows an empty assignment
                continue
            mark("=")
            if key in _NUMBERS:
                numbers[key] = _c_number(take("a number such as 0x450", lambda word: bool(_NUMBER.fullmatch(word))))
            else:
                mark('"')
                if key in PATHS:
                    strings[key] = take("a path with a slash, such as ./System.map", _is_path)
                else:
                    strings[key] = take("a word of two or more letters", _is_word)
                mark('"')
            mark(";")
        domains[domain] = Config(f"{source}, entry {domain}", numbers, strings)
    return domains


def _is_word(word: str) -> bool:
    return bool(_WORD.fullmatch(word)) and not _NUMBER.fullmatch(word) and word not in SETTINGS


def _is_path(word: str) -> bool:
    """Whether LibVMI's lexer takes it for a file's name: neither a mark, nor a word, nor a number."""
    return not (_WORD.fullmatch(word) or _NUMBER.fullmatch(word) or word in '"{};=')


def _c_number(text: str) -> int:
    """As strtoull with base 0 reads it: 0x is hexadecimal, a leading 0 octal up to the first other digit, and what is
    too large the largest."""
    if text.startswith("0x"):
        number = int(text, 16)
    elif text.startswith("0"):
        number = int(re.split("[89]", text)[0], 8)
    else:
        number = int(text)
    return min(number, (1 << 64) - 1)


def _tokens(text: str, source: str) -> Iterator[tuple[str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        word = match.group()
        if word == "\n":
            line += 1
        elif not word.startswith("#"):
            if len(word) > TOKEN_MAX:
                raise ConfigError(LibvmiInitError.NO_CONFIG, f"{source}:{line}: a word of more than {TOKEN_MAX} bytes")
            yield word, line


def _dictionary(config: Any) -> Config:
    if not isinstance(config, Mapping):
        raise ConfigError(
            LibvmiInitError.NO_CONFIG, f"config_mode DICT needs config to be a dictionary, not {type(config).__name__}"
        )
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
    for key in numbers.keys() - _NUMBERS | strings.keys() - PATHS - WORDS:
        warnings.warn(f"config: LibVMI knows no setting {key!r} of this kind; it is ignored", stacklevel=2)
    return Config("config dictionary", numbers, strings)


def export_entry(profile: Profile, name: str) -> str:
    """A ``libvmi.conf`` entry for a running guest, for use with LibVMI itself.

    :param profile: the guest's own
    :param name: the domain's name, as LibVMI will be asked for it
    :raises ValueError: LibVMI's grammar cannot express the name, or the kernel's release is not valid
    :raises KeyError: the kernel lacks one of the structures
    """
    if not _is_word(name):
        raise ValueError(
            f"libvmi.conf cannot hold a domain named {name!r}: two or more of a-z A-Z 0-9 . _ -, not only digits"
        )
    if not _RELEASE.fullmatch(profile.release):
        raise ValueError(f"libvmi.conf cannot hold the kernel's release {profile.release!r}")
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
