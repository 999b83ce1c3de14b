"""A watch of many guests: which they are, and where their events go."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

from vmishim.errors import LibvmiError
from vmishim.foreign import printable
from vmishim.guests.domains import Domain
from vmishim.inspection import fleet
from vmishim.inspection.changes import LISTS, Event
from vmishim.inspection.cluster import Scheduler
from vmishim.plural import counted
from vmishim.watching import metrics
from vmishim.watching.outlets import Outlet
from vmishim.watching.records import NOTICE, Record, Recorder
from vmishim.watching.rounds import Guest, Rounds, Threads
from vmishim.watching.session import Seen, one_line
from vmishim.watching.workers import Workers


class FleetWatch:
    """The watch of many guests: rounds, and where their events go.

    :param pattern: names of guests, such as ``web-*``
    :param interval: seconds between two looks at a guest
    :param lists: what a look reads
    :param scheduler: of the Dask cluster whose workers look; None: this process does

    :ivar outlets: where records go
    :ivar notes: the last things that people were told
    :ivar redraw: draws the screen, and returns whether there is one
    """

    def __init__(
        self, pattern: str, interval: float, lists: Collection[str] = LISTS, scheduler: Scheduler | None = None
    ) -> None:
        self.pattern = pattern
        looker = partial(Workers, scheduler, lists=lists) if scheduler else Threads
        self.rounds = Rounds(interval, self._told, looker, tick=self._tick, lists=lists)
        self.outlets: list[Outlet] = []
        self.figures = metrics.Figures(lambda: list(self.rounds.guests.values()), self.outlets)
        self.notes: deque[str] = deque(maxlen=5)
        self.redraw: Callable[[], bool] = lambda: False
        self._recorder = Recorder(os.urandom(8).hex())
        self._lost: dict[str, int] = {}
        self._problem = ""

    def read(self) -> None:
        """Read which guests there are. :raises LibvmiError: ``domains.toml`` is not valid"""
        said = self.rounds.watch(self.matching())
        for what, names in said.items():
            for name in names:
                self._record(name, f"guest-{what}", f"{what}: {name}")

    def begin(self) -> None:
        """Watch the guests that match now. :raises LibvmiError: as `read`"""
        _allow_files()
        self._record("", "watch-started", f"watching {self.pattern}")
        self.read()

    def reread(self) -> None:
        """For SIGHUP: read the list again, and open outputs again. A list that can't be read leaves the guests as they
        are."""
        for outlet in self.outlets:
            outlet.reopen()
        try:
            self.read()
        except LibvmiError as error:
            text = f"the guests stay as they were: {one_line(error)}"
            self._record("", "domains-invalid", text)
            self.say(text)
            return
        if not self.rounds.guests:
            self.say(f"no domain matches {self.pattern!r} now; waiting for SIGHUP")

    def end(self) -> None:
        """Write what is known, and let go of the outputs."""
        self._record("", "watch-ended", "the watch has ended")
        for outlet in self.outlets:
            outlet.close()

    def say(self, text: str) -> None:
        """Tell people."""
        self.notes.append(printable(text))
        if self.redraw():
            return
        print(f"vmishim: {printable(text)}", file=sys.stderr, flush=True)

    def matching(self) -> list[Domain]:
        """The guests whose names match. :raises LibvmiError: ``domains.toml`` is not valid"""
        return fleet.matching(self.pattern)

    def _told(self, guest: Guest, events: Sequence[Event], seen: Seen) -> None:
        self.figures.looked(seen.cost.seconds)
        if not self.outlets:
            return
        now = time.time()
        for event in events:
            for record in self._recorder.of(guest.name, event, now):
                self._write(record)
        if seen.sight is not None and guest.looks["read"] == 1:
            # After the first look: from here on no event is missed but what lived between two looks.
            processes, modules, sockets = guest.counts
            text = (
                f"watching {guest.name}, Linux {seen.release}: {counted(processes, 'process', 'processes')}, "
                f"{counted(modules, 'module')}, {counted(sockets, 'socket')}"
            )
            more = {"processes": processes, "modules": modules, "sockets": sockets}
            self._write(self._recorder.made(guest.name, "state", "guest-watched", text, now, **more))

    def _record(self, guest: str, action: str, text: str) -> None:
        if self.outlets:
            self._write(self._recorder.made(guest, "state", action, text, time.time(), NOTICE))

    def _write(self, record: Record) -> None:
        for outlet in self.outlets:
            outlet.write(record)

    def _tick(self) -> None:
        self.redraw()
        for outlet in self.outlets:
            outlet.retry()
            lost, before = outlet.lost, self._lost.get(outlet.name, 0)
            if lost > before and not outlet.pending:
                self._lost[outlet.name] = lost
                self._record("", "records-lost", f"{lost - before:,} records could not be written to {outlet.name}")


def _allow_files() -> None:
    """Allow as many open files as this process may have: each session takes some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
