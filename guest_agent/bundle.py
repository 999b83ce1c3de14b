"""Make the agent's one file: a zipapp with what the guest needs of vmishim, and the eBPF objects."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from guest_agent.programs import object_bytes

PARTS = (
    "vmishim/__init__.py",
    "vmishim/errors.py",
    "vmishim/wire",
    "vmishim/kernel/__init__.py",
    "vmishim/kernel/btf.py",
    "vmishim/kernel/profile.py",
    "guest_agent",
)
"""What the agent imports; ``tests/unit/test_imports.py`` holds it to that."""
OBJECTS = ("memory", "locate", "sealed")
START = "from guest_agent.__main__ import main\n\nraise SystemExit(main())\n"
DATE = (1980, 1, 1, 0, 0, 0)
"""Of all that is in the file, the earliest that there is in one: the same installation makes the same bytes."""


def bundle(target: Path) -> Path:
    """Write the agent to ``target``, executable, and return it. It runs on Python >= 3.11 with python3-zmq,
    python3-cryptography, libbpf1 and libseccomp2 installed; nothing is compiled in the guest.

    :raises LoadError: this installation has no eBPF objects
    :raises OSError: ``target`` can't be written
    """
    contents = {"__main__.py": START.encode()}
    contents |= {f"guest_agent/objects/{name}.bpf.o": object_bytes(name) for name in OBJECTS}
    for part in PARTS:
        package, *rest = part.split("/")
        contents |= _sources(resources.files(package).joinpath(*rest), part)
    whole = io.BytesIO(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(contents.items()):
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    unfinished = target.with_name(target.name + ".part")
    unfinished.write_bytes(whole.getvalue())
    unfinished.chmod(0o755)
    return unfinished.replace(target)


def _sources(place: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """What is to be imported of a module or a package, by its path."""
    if place.is_file() and name.endswith(".py"):
        yield name, place.read_bytes()
    elif place.is_dir():
        for below in place.iterdir():
            yield from _sources(below, f"{name}/{below.name}")
