"""Output: a table for people that fits their terminal, JSON for programs, progress beside both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

PATIENCE = 0.5
"""Seconds of work after which progress is shown."""


def printable(text: str) -> str:
    """``text`` with everything escaped that is not to be seen: names come from the guest, which may be hostile, and
    must not drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table. Whole numbers stand to the right; a column whose title begins with ``-`` is cut first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # Not on a terminal nothing is cut: whoever reads it looks for whole words.
    console = Console(width=None if terminal else 10_000, highlight=False, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    body = [tuple(row) for row in rows]
    for number, title in enumerate(columns):
        right = bool(body) and all(isinstance(row[number], int) for row in body)
        table.add_column(
            title.removeprefix("-"),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=None if title.startswith("-") else max([len(title), *(len(str(row[number])) for row in body)]),
        )
    for row in body:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    console.print(table)


def dump(value: Any) -> None:
    """Print JSON."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def watched(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The same items; counts them on standard error, if that is a terminal and they take long."""
    if not sys.stderr.isatty():
        yield from items
        return
    begun = said = time.monotonic()
    count = 0
    try:
        for item in items:
            yield item
            count += 1
            now = time.monotonic()
            if now - begun > PATIENCE and now - said > 0.1:
                said = now
                print(f"\r{count:,} {what} ...", end="", file=sys.stderr, flush=True)
    finally:
        if said != begun:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
