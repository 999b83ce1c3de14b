"""Configurations, and how we and LibVMI read each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from lab import environment
from vmishim.libvmi import config

Reading = dict[str, int | str] | None
"""The settings of the domain ``domain``; None: a syntax error."""

SETTINGS = sorted(config.SETTINGS)
WORDS = ["domain", "other", "Linux", "Windows", "0x", "12ab", "a", "ab", "linux_taks", "win_peb", "X.y-z_"]
NUMBERS = ["0", "5", "017", "08", "0129", "0x1F", "0X1", "18446744073709551616", "0xffffffffffffffff1", "-1", "+7"]
PATHS = ["/boot/System.map", "./m", "a@b", "_x", "-", "System.map", "/a b", "//", "..", "/\xff"]
MARKS = ["{", "}", ";", "=", '"', "#", "#c\n", '# {}"\n', "\n", " ", "\t", "\r\n"]
OTHER = ["\0", "\f", "\v", "\xef\xbb\xbf", "[", ",", "'", "\\", "\x1b", "\x80", "~", "$", "\xc3\xa9"]
POOLS = (SETTINGS, WORDS, NUMBERS, PATHS, MARKS, OTHER)


class Case(NamedTuple):
    """A ``libvmi.conf``, and what LibVMI reads of it."""

    text: bytes
    theirs: Reading


def generated(count: int, seed: int) -> list[bytes]:
    """Configurations: valid ones, damaged ones, and heaps of tokens. Each ends with a newline: LibVMI takes a comment
    for one only if it has an end of line, and we are not that strict."""
    random = Random(seed)
    return [f"{_one(random)}\n".encode("latin-1") for _ in range(count)]


def _one(random: Random) -> str:
    if random.random() < 0.2:
        return "".join(
            random.choice(random.choice(POOLS)) + random.choice(["", " "]) for _ in range(random.randrange(12))
        )
    text = "".join(_domain(random) for _ in range(random.choice([1, 1, 1, 2, 3])))
    for _ in range(random.choice([0, 0, 1, 1, 2, 4])):
        at = random.randrange(len(text) + 1)
        cut = random.choice([0, 0, 1, 2])
        text = text[:at] + random.choice(["", random.choice(random.choice(POOLS))]) + text[at + cut :]
    return text


def _domain(random: Random) -> str:
    space = random.choice(["", " ", "\n", "\t# c\n"])
    settings = [_setting(random) for _ in range(random.randrange(5))]
    return f"{random.choice(['domain', 'domain', 'other'])}{space}{{{space}{space.join(settings)}}}{space}"


def _setting(random: Random) -> str:
    name = random.choice(SETTINGS)
    strings, words = name in config.PATHS, name in config.WORDS
    likely = random.choice(PATHS[:4] if strings else ["Linux", "IA32E"] if words else NUMBERS[:6])
    value = likely if random.random() < 0.9 else random.choice(random.choice(POOLS[:4]))
    quote = '"' if (strings or words) == (random.random() < 0.97) else ""
    return f"{name}{random.choice(['=', ' = '])}{quote}{value}{quote};"


def ours(text: bytes) -> Reading:
    """As we read it. ``linux_addr`` is left out: LibVMI warns of it and forgets it."""
    try:
        found = config.parse(text.decode("utf-8", "surrogateescape"), "given").get("domain")
    except config.ConfigError:
        return None
    values: dict[str, int | str] = {**found.numbers, **found.strings} if found else {}
    return {name: value for name, value in values.items() if name != "linux_addr"}


def genuine(texts: Sequence[bytes]) -> list[Reading]:
    """As LibVMI reads each. :raises MissingError: its wheel cannot be had"""
    python = environment.genuine()
    where = "import importlib.util as found; print(found.find_spec('_libvmi').origin)"
    origin = subprocess.run([str(python), "-I", "-c", where], capture_output=True, text=True, check=True).stdout
    folder = Path(origin.strip()).parent / "libvmi.libs"
    libraries = [*folder.glob("libjson-c*"), *folder.glob("libvmi-*")]
    done = subprocess.run(
        [str(python), "-I", str(Path(__file__).with_name("genuine.py")), *map(str, libraries)],
        input="".join(f"{text.hex()}\n" for text in texts),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
