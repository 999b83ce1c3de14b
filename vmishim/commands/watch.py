"""``vmishim watch``: show what starts and ends in a guest, and flag what is suspicious, as it happens.

A terminal shows a screen that is kept up to date, and at the end the findings; other outputs get one line per event. A
lost agent is an event too: the watch continues once an agent answers again.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmishim.commands import CommandError
from vmishim.commands.guests import target
from vmishim.foreign import printable
from vmishim.plural import counted
from vmishim.watching.history import History
from vmishim.watching.session import Session

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

INTERVAL = 2.0
"""Seconds between two looks."""
KEPT = 1000
"""Events kept in memory, more than any terminal shows; and as many findings."""
SIDE_BY_SIDE = 100
"""Columns of a terminal from which findings have a column of their own."""

Line = tuple[str, str, str, str, str]
"""Time, sign, kind, text, finding."""


@dataclass
class Screen:
    """The contents of the screen.

    :ivar title: the guest
    :ivar state: how much it holds, or that it does not answer
    :ivar lines: events, newest first
    :ivar findings: those of them that deserve a second look, oldest first
    """

    title: str
    state: str = "looking"
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT))
    findings: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, sign: str, kind: str, text: str, finding: str = "") -> Line:
        """Add an event at the top."""
        line = time.strftime("%H:%M:%S"), sign, kind, printable(text), printable(finding)
        self.lines.appendleft(line)
        if finding or sign == "!":
            self.findings.append(line)
        return line


class Watch:
    """Looks at one guest again and again, and survives a lost agent.

    :ivar screen: the current contents of the screen
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._name = "this machine" if options.local else str(options.domain)
        self._session = Session(lambda: target(options.domain, options.local), options.lists)
        self._history = History()
        self.screen = Screen(self._name)

    def open(self) -> None:
        """Connect to the guest. :raises LibvmiError: it can't be reached"""
        self._session.open()
        self._title()

    def _title(self) -> None:
        self.screen.title = f"{printable(self._name)}, Linux {printable(self._session.release)}"

    def close(self) -> None:
        """Disconnect."""
        self._session.close()

    def step(self) -> Iterator[Line]:
        """Look once, and give the events, newest last."""
        seen = self._session.look()
        for event in self._history.take(seen):
            yield self.screen.add(event.sign, event.kind, event.text, event.finding)
        self._title()
        sight = seen.sight
        if not seen.answered:
            self.screen.state = "no answer; trying again"
        elif sight is None:
            self.screen.state = "its lists can't be read; trying again"
        else:
            listeners = sum(each.state == "listen" for each in sight.sockets.values())
            self.screen.state = (
                f"{counted(len(sight.tasks), 'process', 'processes')}, {counted(len(sight.modules), 'module')}, "
                f"{counted(len(sight.sockets), 'socket')}, "
                f"{listeners:,} of them listening" + (f"; {len(sight.damage):,} not read" if sight.damage else "")
            )


def watch(options: argparse.Namespace) -> int:
    """Watch until ``q`` or Ctrl-C.

    :raises LibvmiError: there is no such guest, or the first connection fails
    """
    if options.domains or options.json:
        from vmishim.commands import watch_fleet

        return watch_fleet.watch(options)
    if options.output or options.journal or options.syslog or options.metrics or options.engine:
        raise CommandError("--output, --journal, --syslog, --metrics and --engine go with --domains or --json")
    interval = options.interval or INTERVAL
    watched = Watch(options)
    try:
        watched.open()
        if sys.stdout.isatty() and sys.stdin.isatty():
            _draw(watched, interval)
        else:
            _print(watched, interval)
    except KeyboardInterrupt:
        pass
    finally:
        watched.close()
    return 0


def _print(watched: Watch, interval: float) -> None:
    first = True
    while True:
        for line in watched.step():
            print(_told(line), flush=True)
        if first:
            # Printed after the first look: a program that reads this knows that no event is missed from here on.
            print(f"{time.strftime('%H:%M:%S')} watching {watched.screen.title}: {watched.screen.state}", flush=True)
            first = False
        time.sleep(interval)


def _told(line: Line) -> str:
    when, sign, kind, text, finding = line
    return f"{when} {sign} {kind} {text}{f'  <- {finding}' if finding else ''}"


def _draw(watched: Watch, interval: float) -> None:
    """Keep the screen up to date until ``q``. What was found stays on the terminal afterwards."""
    try:
        _draw_until_quit(watched, interval)
    finally:
        for line in watched.screen.findings:
            print(_told(line))


def _draw_until_quit(watched: Watch, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            for _ in watched.step():
                pass
            until = time.monotonic() + interval
            while True:
                live.update(drawn(watched.screen, console, interval), refresh=True)
                left = until - time.monotonic()
                if left <= 0:
                    break
                # Wait at most a second: the terminal may be resized.
                if pressed(min(left, 1.0)) in ("q", "Q"):
                    return


def drawn(seen: Screen, console: Console, interval: float) -> RenderableType:
    """The whole screen: the newest events at the top, as many as fit. What is too long for its column is wrapped; where
    there is no room for a column of findings, each is below its event."""
    from rich.console import Group
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    colours = {"+": "green", "-": "dim", "!": "bold red"}
    head = Text(f"{seen.title}  {time.strftime('%H:%M:%S')}  every {interval:g} s  q quits", style="bold")
    beside = console.width >= SIDE_BY_SIDE
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    columns = [("TIME", None), ("", None), ("WHAT", None), ("", 3)]
    for title, ratio in [*columns, ("FINDING", 2)] if beside else columns:
        table.add_column(title, overflow="fold", ratio=ratio)
    for when, sign, kind, text, finding in list(seen.lines)[: console.height]:
        cells = (text, finding) if beside else (f"{text}\n<- {finding}" if finding else text,)
        table.add_row(*map(Text, (when, sign, kind, *cells)), style="bold red" if finding else colours[sign])
    if not seen.lines:
        table.add_row("", "", "", Text("no events yet", style="dim"))
    whole = Group(head, Text(seen.state), Text(""), table)
    lines = console.render_lines(whole, pad=False)
    if len(lines) <= console.height:
        return whole
    kept = [segment for line in lines[: console.height - 1] for segment in (*line, Segment.line())]
    return Group(Segments(kept), Text("... older events do not fit", style="dim"))


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits the given seconds for a key, and returns it or an empty string."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(timeout: float) -> str:
        ready, _, _ = select.select([keyboard], [], [], timeout)
        return os.read(keyboard, 1).decode(errors="replace") if ready else ""

    tty.setcbreak(keyboard)
    try:
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
