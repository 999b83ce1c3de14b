"""The agent as one file: a zipapp with the parts of vmishim that the guest needs, and the eBPF objects.

The agent's files are read as data; nothing of it is imported here.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from vmishim import files
from vmishim.ebpf_objects import OBJECTS, object_bytes

PARTS = (
    "vmishim/__init__.py",
    "vmishim/ebpf_objects.py",
    "vmishim/errors.py",
    "vmishim/foreign.py",
    "vmishim/files.py",
    "vmishim/version.py",
    "vmishim/wire",
    "vmishim/kernel/__init__.py",
    "vmishim/kernel/btf.py",
    "vmishim/kernel/profile.py",
    "guest_agent",
)
"""What the agent imports; ``tests/local/test_bundle.py`` compares."""
UNIT = "vmishim-agent.service"
"""Its systemd unit."""
START = """\
import sys

if sys.version_info < (3, 11):
    sys.exit("vmishim-agent: this is Python %d.%d; 3.11 is the oldest supported" % sys.version_info[:2])
from guest_agent.__main__ import main

raise SystemExit(main())
"""
"""Its first lines run on older Pythons too, which could not read the rest."""
DATE = (1980, 1, 1, 0, 0, 0)
"""Of everything in the file: the earliest date that a zip file can hold, so that one installation always makes the same
bytes."""


def bundle(target: Path) -> Path:
    """Write the agent to ``target``, executable, and return its path. It runs on Python >= 3.11 with python3-zmq,
    python3-cryptography, libbpf1 and libseccomp2 installed; nothing is compiled in the guest.

    :raises LibvmiError: this installation has no eBPF objects
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
    files.write(target, whole.getvalue(), 0o755)
    return target


def unit() -> bytes:
    """The agent's systemd unit."""
    return resources.files("guest_agent").joinpath(UNIT).read_bytes()


def _sources(place: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """The Python files of a module or package, by path."""
    if place.is_file() and name.endswith(".py"):
        yield name, place.read_bytes()
    elif place.is_dir():
        for below in place.iterdir():
            yield from _sources(below, f"{name}/{below.name}")
