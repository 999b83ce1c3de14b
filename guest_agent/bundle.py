"""Make the agent's one file: a zipapp with what the guest needs of vmishim, and the eBPF objects."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
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
OBJECTS = ("memory", "locate")


def bundle(target: Path) -> Path:
    """Write the agent to ``target``, executable, and return it. It runs on Python >= 3.11 with python3-zmq,
    python3-cryptography and libbpf1 installed; nothing is compiled in the guest.

    :raises LoadError: this installation has no eBPF objects
    :raises OSError: ``target`` can't be written
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            package, _, rest = part.partition("/")
            source = resources.files(package)
            for name in rest.split("/") if rest else ():
                source = source.joinpath(name)
            _copy(source, Path(folder, part))
        objects = Path(folder, "guest_agent", "objects")
        objects.mkdir()
        for name in OBJECTS:
            (objects / f"{name}.bpf.o").write_bytes(object_bytes(name))
        unfinished = target.with_name(target.name + ".part")
        zipapp.create_archive(folder, unfinished, "/usr/bin/env python3", "guest_agent.__main__:main", compressed=True)
        unfinished.replace(target)
    target.chmod(0o755)
    return target


def _copy(source: Traversable, target: Path) -> None:
    if source.is_dir():
        for entry in source.iterdir():
            if entry.name.endswith((".py",)) or (entry.is_dir() and entry.name not in ("__pycache__", "objects")):
                _copy(entry, target / entry.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write)
