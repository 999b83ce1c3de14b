"""The screen of ``vmishim watch --domains``: a table of guests, and what happened in the one that is chosen."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from vmishim.foreign import printable
from vmishim.plural import counted
from vmishim.watching.fleet import FleetWatch
from vmishim.watching.rounds import Guest
from vmishim.watching.schedule import State

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

KEYS = {"\x1b[A": "up", "k": "up", "\x1b[B": "down", "j": "down", "\x1b[5~": "page up", "\x1b[6~": "page down"}
KEYS |= {"\r": "open", "\n": "open", "\x1b[C": "open", "\x1b": "back", "\x1b[D": "back", "b": "back", "q": "quit"}
KEYS |= {"Q": "quit", "n": "next", "\x1b[H": "first", "\x1b[F": "last"}
"""What a key means, by the bytes that a terminal sends for it."""
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Za-z]|.", re.DOTALL)
FRAME = 4
"""Lines of the screen that are not guests."""


class Choice:
    """Which guest is chosen, and whether its events are shown.

    :ivar name: the chosen guest; empty before there is any
    """

    def __init__(self) -> None:
        self.name = ""
        self.opened = False

    def on(self, key: str, guests: Sequence[Guest], page: int) -> None:
        """A key was pressed.

        :param guests: all of them, as they are shown
        :param page: how many fit
        """
        if not guests:
            return
        names = [guest.name for guest in guests]
        at = names.index(self.name) if self.name in names else 0
        steps = {"up": -1, "down": 1, "page up": -page, "page down": page, "first": -len(names), "last": len(names)}
        if key == "next":
            # The next guest with findings, from here on.
            order = [*range(at + 1, len(names)), *range(at + 1)]
            at = next((each for each in order if guests[each].findings), at)
        at = min(max(at + steps.get(key, 0), 0), len(names) - 1)
        self.name = names[at]
        self.opened = {"open": True, "back": False}.get(key, self.opened)


def run(watched: FleetWatch) -> None:
    """Draw until ``q`` or a signal."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    choice = Choice()
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def redraw() -> bool:
            live.update(drawn(watched, choice, console), refresh=True)
            return True

        def press(key: str) -> None:
            if key == "quit":
                watched.rounds.stop()
                return
            choice.on(key, list(watched.rounds.guests.values()), max(console.height - FRAME, 1))
            redraw()

        watched.redraw = redraw
        try:
            with _keyboard(lambda key: watched.rounds.inbox.put(partial(press, key))):
                watched.rounds.run()
        finally:
            watched.redraw = lambda: False
    for line in findings(list(watched.rounds.guests.values())):
        print(line)


def findings(guests: Sequence[Guest]) -> Iterator[str]:
    """What stays on the terminal after the watch: the last findings, oldest first."""
    found = sorted(
        ((when, guest.name, event) for guest in guests for when, event in guest.events if event.finding),
        key=lambda each: each[0],
    )
    for when, name, event in found:
        text = printable(f"{name} {event.sign} {event.kind} {event.text}  <- {event.finding}")
        yield f"{time.strftime('%H:%M:%S', time.localtime(when))} {text}"


def drawn(watched: FleetWatch, choice: Choice, console: Console) -> RenderableType:
    """The whole screen."""
    from rich.console import Group
    from rich.segment import Segment, Segments
    from rich.text import Text

    guests = list(watched.rounds.guests.values())
    lost = sum(guest.schedule.state in (State.LOST, State.TRYING) for guest in guests)
    told = sum(guest.findings.total() for guest in guests)
    text = f"{counted(len(guests), 'guest')}, {lost:,} not answering, {counted(told, 'finding')}"
    keys = "Esc goes back, q quits" if choice.opened else "arrows choose, Enter opens, n next with findings, q quits"
    head = Text(f"{text}  {time.strftime('%H:%M:%S')}  every {watched.rounds.interval:g} s", style="bold")
    by_name = {guest.name: guest for guest in guests}
    chosen = by_name.get(choice.name)
    body = _events(chosen) if choice.opened and chosen else _table(guests, choice.name, console.height - FRAME)
    note = Text(watched.notes[-1], style="bold red") if watched.notes else Text(keys, style="dim")
    whole = Group(head, note, body)
    lines = console.render_lines(whole, pad=False)
    if len(lines) <= console.height:
        return whole
    kept = [segment for line in lines[: console.height - 1] for segment in (*line, Segment.line())]
    return Group(Segments(kept), Text("... more does not fit", style="dim"))


def _table(guests: Sequence[Guest], chosen: str, room: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for title, justify in (("GUEST", "left"), ("STATE", "left"), ("LAST LOOK", "right"), ("PROCESSES", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("FINDINGS", justify="right")
    table.add_column("LAST FINDING", ratio=1, no_wrap=True, overflow="ellipsis")
    names = [guest.name for guest in guests]
    at = names.index(chosen) if chosen in names else 0
    first = max(min(at - room // 2, len(guests) - room), 0)
    now = time.monotonic()
    for guest in guests[first : first + max(room, 1)]:
        state, style = condition(guest)
        last = next((event for _, event in reversed(guest.events) if event.finding), None)
        cells = (
            printable(guest.name, 40),
            state,
            f"{now - guest.last:.1f} s" if guest.last else "never",
            f"{guest.counts[0]:,}" if guest.last else "",
            f"{guest.findings.total():,}",
            printable(f"{last.kind} {last.text} <- {last.finding}") if last else "",
        )
        table.add_row(*map(Text, cells), style=f"{style}{' reverse' if guest.name == chosen else ''}".strip())
    if not guests:
        table.add_row(Text("none", style="dim"))
    return table


def condition(guest: Guest) -> tuple[str, str]:
    """A guest's state in a word or two, and its style."""
    if guest.schedule.state in (State.LOST, State.TRYING):
        return f"no answer ({guest.schedule.failures:,})", "red"
    if not guest.last and not guest.looks:
        return "first look", "dim"
    if guest.history.unreadable:
        return "unreadable", "red"
    return ("ok", "yellow") if guest.findings else ("ok", "")


def _events(guest: Guest) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    state, style = condition(guest)
    processes, modules, sockets = guest.counts
    release = f", Linux {guest.seen.release}" if guest.seen.release else ""
    problem = f": {guest.seen.problem}" if guest.seen.problem else ""
    title = Text(printable(f"{guest.name}{release}, {state}{problem}"), style=style or "bold")
    counts = (
        f"{counted(processes, 'process', 'processes')}, {counted(modules, 'module')}, {counted(sockets, 'socket')}; "
        f"{counted(guest.cost.requests, 'request')}, last look {1e3 * guest.seen.cost.seconds:.1f} ms"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name, ratio in (("TIME", None), ("", None), ("WHAT", None), ("", 3), ("FINDING", 2)):
        table.add_column(name, overflow="fold", ratio=ratio)
    colours = {"+": "green", "-": "dim", "!": "bold red"}
    for when, event in reversed(guest.events):
        cells = (
            time.strftime("%H:%M:%S", time.localtime(when)),
            *(event.sign, event.kind, printable(event.text), printable(event.finding)),
        )
        table.add_row(*map(Text, cells), style="bold red" if event.finding else colours[event.sign])
    if not guest.events:
        table.add_row("", "", "", Text("no events yet", style="dim"))
    return Group(title, Text(counts), table)


def meanings(data: str) -> list[str]:
    """What keys mean, by all that a terminal sent for them at once: fast typing, or a busy machine, brings several
    in one read."""
    pressed = (key.replace("\x1bO", "\x1b[") for key in _KEY.findall(data))
    return [KEYS[key] for key in pressed if key in KEYS]


@contextmanager
def _keyboard(pressed: Callable[[str], object]) -> Iterator[None]:
    """Call ``pressed`` from a thread for each key with a meaning."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    stop, stopped = os.pipe()

    def listen() -> None:
        while True:
            ready, _, _ = select.select([keyboard, stop], [], [])
            if stop in ready:
                return
            data = os.read(keyboard, 32).decode(errors="replace")
            if not data:
                return
            for key in meanings(data):
                pressed(key)

    thread = threading.Thread(target=listen, name="vmishim-keys", daemon=True)
    tty.setcbreak(keyboard)
    thread.start()
    try:
        yield
    finally:
        os.write(stopped, b"x")
        thread.join()
        os.close(stop)
        os.close(stopped)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
