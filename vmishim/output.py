"""Output: tables that fit the terminal, JSON for programs, and progress."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from vmishim.foreign import paragraph, printable

Item = TypeVar("Item")

PATIENCE = 0.5
"""Seconds after which progress is shown."""


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table, with numbers aligned to the right. On a narrow terminal, columns whose title begins with ``-`` are
    left out first, and then the last column is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Cut nothing unless this is a terminal: programs that read this need whole words.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False, emoji=False)
    whole = list(zip(columns, zip(*rows, strict=True), strict=True))
    texts = {title: [printable(str(cell)) for cell in cells] for title, cells in whole}
    widths = {title: max(map(len, (title.removeprefix("-"), *cells))) for title, cells in texts.items()}
    for title in [title for title in columns if title.startswith("-")]:
        if sum(widths.values()) + 2 * len(widths) > console.width:
            del widths[title]
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for title, cells in whole:
        if title in widths:
            right = all(isinstance(cell, int) or cell in ("", "?") for cell in cells)
            last = title == columns[-1]
            table.add_column(
                title.removeprefix("-"),
                justify="right" if right else "left",
                no_wrap=True,
                overflow="ellipsis",
                min_width=None if last else widths[title],
            )
    for row in zip(*(texts[title] for title in widths), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An uncaught exception's traceback on standard error, for ``sys.excepthook``: as Python shows it, but what a guest
    wrote into the error's text is escaped."""
    shown = "".join(traceback.format_exception(kind, error, trace))
    print(paragraph(shown), end="", file=sys.stderr)


def dump(value: Any) -> None:
    """Print JSON."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def watched(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The same items; if they take long and standard error is a terminal, it shows a count."""
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
