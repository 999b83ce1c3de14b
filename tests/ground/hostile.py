"""A folder with code under every name that a process of ours could import or run by mistake."""

from __future__ import annotations

from pathlib import Path

MODULES = (
    *("argparse", "asyncio", "ctypes", "hashlib", "json", "logging", "os", "pathlib", "platform", "runpy", "socket"),
    *("subprocess", "tempfile", "threading", "tomllib", "typing", "zipfile", "sitecustomize", "usercustomize"),
    *("bcc", "cryptography", "hatchling", "libvmi", "lab", "pip", "rich", "shtab", "trials", "zmq"),
    *("vmishim", "guest_agent"),
)
PROGRAMS = ("bpftool", "clang", *(f"clang-{version}" for version in range(14, 23)), "llvm-strip", "python", "python3")


def plant(folder: Path) -> Path:
    """Make the folder, which any user may write to. What runs in it leaves its name in its file ``ran``."""
    folder.mkdir()
    ran_file = str(folder / "ran")
    for name in MODULES:
        (folder / f"{name}.py").write_text("import sys\nsys.stderr.write('planted\\n')\n" + _note(ran_file, name))
    for name in ("vmishim", "guest_agent"):
        (folder / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            (folder / name / file).write_text(_note(ran_file, f"{name}/{file}"))
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>{ran_file}\nexit 1\n")
        (folder / name).chmod(0o755)
    (folder / "planted.pth").write_text(f"import sys; open({ran_file!r}, 'a').write('planted.pth\\n')\n")
    folder.chmod(0o777)
    return folder


def _note(file: str, name: str) -> str:
    return f"open({file!r}, 'a').write({name!r} + chr(10))\n"


def ran(folder: Path) -> set[str]:
    """What ran in it."""
    file = folder / "ran"
    return set(file.read_text().split()) if file.exists() else set()
