"""Configurations and JSON profiles, and how we and LibVMI read each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import NamedTemporaryFile
from typing import Any

from lab import environment
from trials.configs.genuine import NAMES
from vmishim.libvmi import config
from vmishim.libvmi.profiles import JsonProfile

Reading = dict[str, int | str] | None
"""The settings of the domain ``domain``; None: a syntax error."""

SETTINGS = sorted(config.SETTINGS)
WORDS = ["domain", "other", "Linux", "Windows", "0x", "12ab", "a", "ab", "linux_taks", "win_peb", "X.y-z_"]
NUMBERS = ["0", "5", "017", "08", "0129", "0x1F", "0X1", "18446744073709551616", "0xffffffffffffffff1", "-1", "+7"]
PATHS = ["/boot/System.map", "./m", "a@b", "_x", "-", "System.map", "/a b", "//", "..", "/\xff"]
MARKS = ["{", "}", ";", "=", '"', "#", "#c\n", '# {}"\n', "\n", " ", "\t", "\r\n"]
OTHER = ["\0", "\f", "\v", "\xef\xbb\xbf", "[", ",", "'", "\\", "\x1b", "\x80", "~", "$", "\xc3\xa9"]
POOLS = (SETTINGS, WORDS, NUMBERS, PATHS, MARKS, OTHER)


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


def generated_profiles(count: int, seed: int) -> list[bytes]:
    """Sound profiles of Volatility 3: symbols, and structures that embed others, with a name or without. LibVMI takes
    what it can of damaged ones; we refuse them. A tenth of ``count``, since each answers a hundred questions."""
    random = Random(seed)
    return [json.dumps(_profile(random)).encode() for _ in range(count // 10)]


def _profile(random: Random) -> dict[str, Any]:
    # The json-c of LibVMI's wheel takes what is above 2^63 for 2^63 - 1, so kernel addresses are signed here.
    numbers = [0, 1, 4096, 0x7FFF_FFFF_FFFF_FFFF, -1, -(1 << 63), 0xFFFF_FFFF_8100_0000 - (1 << 64)]
    symbols = {f"s{at}": {"address": random.choice(numbers)} for at in range(4) if random.random() < 0.7}
    types: dict[str, Any] = {}
    for at in range(4):
        fields = {}
        for name in random.sample(["m0", "m1", "m2", "m3", "t1", "s2"], random.randrange(5)):
            # Only later structures, so that none contains itself; a few that are not there.
            inner = {"kind": random.choice(["struct", "union"]), "name": f"t{random.randrange(at + 1, 6)}"}
            plain = random.choice([{"kind": "pointer", "subtype": inner}, {"kind": "base", "name": "int"}])
            fields[name] = {"offset": random.randrange(1 << 12), "type": inner if random.random() < 0.5 else plain}
            if random.random() < 0.5:
                fields[name]["anonymous"] = True
        if random.random() < 0.9:
            types[f"t{at}"] = {"size": random.randrange(1 << 14), "fields": fields, "kind": "struct"}
    return {"symbols": symbols, "user_types": types, "base_types": {"int": {"size": 4}}}


def ours_of_profile(text: bytes) -> dict[str, int]:
    """As we read a profile."""
    found: dict[str, int] = {}
    with NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        profile = JsonProfile(file.name)
    for first in NAMES:
        with suppress(KeyError):
            found[first] = profile.symbol(first)
        with suppress(KeyError):
            found[f"{first} "] = profile.size(first)
        for second in NAMES:
            with suppress(KeyError):
                found[f"{first} {second}"] = profile.member(first, second).offset
    return found


def genuine(texts: Sequence[bytes], what: str = "configs") -> list[Any]:
    """As LibVMI reads each. :raises MissingError: its wheel cannot be had"""
    python = environment.genuine()
    where = "import importlib.util as found; print(found.find_spec('_libvmi').origin)"
    origin = subprocess.run([str(python), "-I", "-c", where], capture_output=True, text=True, check=True).stdout
    folder = Path(origin.strip()).parent / "libvmi.libs"
    libraries = [*folder.glob("libjson-c*"), *folder.glob("libvmi-*")]
    done = subprocess.run(
        [str(python), "-I", str(Path(__file__).with_name("genuine.py")), what, *map(str, libraries)],
        input="".join(f"{text.hex()}\n" for text in texts),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
