"""Output: tables that fit the terminal, JSON for programs, and progress."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from vmishim.foreign import paragraph, printable

Item = TypeVar("Item")

PATIENCE = 0.5
"""Seconds after which progress is shown."""
_NUMBER = re.compile(r"[-?]?|[\d,.]+( ms|x)?")
NARROWEST = 16
"""Columns of a terminal below which a table's last column is not wrapped: a number would be broken."""


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]], elsewhere: str = "--json has all") -> None:
    """Print a table, with numbers aligned to the right.

    No cell is ever cut. Where a terminal is too narrow, columns whose title begins with ``-`` are left out, and
    standard error says which; then the last column is wrapped, and if even that is not enough, the terminal wraps the
    lines.

    :param elsewhere: where to find columns that are left out
    """
    rows = list(rows)
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    titles = [title.removeprefix("-") for title in columns]
    numbers = [all(map(_NUMBER.fullmatch, (row[at] for row in texts))) for at in range(len(columns))]
    widths = [max(map(_width, column)) for column in zip(titles, *texts, strict=True)]
    # Programs that read this need whole lines.
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    shown = list(range(len(columns)))
    for at in [at for at, title in enumerate(columns) if title.startswith("-")]:
        if terminal and sum(widths[each] + 2 for each in shown) - 2 > terminal:
            shown.remove(at)
    *fixed, last = shown
    before = sum(widths[at] + 2 for at in fixed)
    room = terminal - before if terminal - before >= NARROWEST else 0
    bold = ("\x1b[1m", "\x1b[0m") if terminal and os.environ.get("TERM") != "dumb" else ("", "")
    for number, cells in enumerate([titles, *texts]):
        begin = "".join(_padded(cells[at], widths[at], numbers[at]) + "  " for at in fixed)
        end = textwrap.wrap(cells[last], room, break_on_hyphens=False) if room < _width(cells[last]) and room else []
        lines = end or [_padded(cells[last], widths[last], numbers[last])]
        for row, line in enumerate(lines):
            whole = f"{' ' * before if row else begin}{line}".rstrip()
            print(whole if number else f"{bold[0]}{whole}{bold[1]}")
    left_out = [titles[at] for at in range(len(columns)) if at not in shown]
    if left_out:
        sys.stdout.flush()
        print(f"left out for lack of room: {', '.join(left_out)} ({elsewhere})", file=sys.stderr)


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


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
