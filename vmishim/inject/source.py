"""What every compiler of programs needs: the source as a file, ``inject.h``, and an error message in one line."""

from __future__ import annotations

import re
from pathlib import Path

from vmishim.inject.errors import CompileError


def header() -> Path:
    """``inject.h``, which programs include. :raises CompileError: this installation lacks it"""
    path = Path(__file__).parents[1] / "include" / "inject.h"
    if not path.exists():
        raise CompileError(f"this installation has no {path}: install vmishim again")
    return path


def source_file(source: str | Path, folder: Path) -> Path:
    """The source as a file: ``source`` itself, or its text written to ``folder``.

    :raises CompileError: no such file
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise CompileError(f"no such source file: {source}")
        return source.resolve()
    path = folder / "program.bpf.c"
    path.write_text(source)
    return path


def complaint(name: str, messages: str) -> str:
    """A compiler's messages in one line: the first error and where it is, how many more there are, what to install."""
    errors = [line for line in messages.splitlines() if re.search(r"\b(fatal )?error: ", line)]
    if not errors:
        last = messages.strip().rpartition("\n")[2] or "the compiler gave no reason"
        return f"{name} does not compile: {last}"
    where, _, what = re.sub(r"fatal error: ", "error: ", errors[0]).partition("error: ")
    place = re.match(r"(.*?):(\d+):\d+: $", where)
    at = f" at {Path(place[1]).name}:{place[2]}" if place else ""
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    package = next((package for part, package in _PACKAGES.items() if f"'{part}" in what), None)
    install = f": apt install {package}" if package and "file not found" in what else ""
    return f"{name} does not compile{at}: {what}{install}{more}"


_PACKAGES = {"bpf/": "libbpf-dev", "linux/": "linux-libc-dev", "asm/": "linux-libc-dev"}
