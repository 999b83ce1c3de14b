"""Looks at many guests, each on its own schedule. A slow or dead guest delays no other.

All decisions are made by the thread that calls `Rounds.run`; others only look, and put what they saw into its inbox.
Why threads and not asyncio: docs/watching.md has both, measured.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from random import SystemRandom
from typing import Protocol

from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.inspection.changes import LISTS
from vmishim.inspection.changes import Event as Change
from vmishim.watching.history import History
from vmishim.watching.schedule import Action, Event, Schedule, State
from vmishim.watching.session import SOCKETS_PACE, Cost, Seen, Session

KEPT = 200
"""Events of one guest that are kept for people to look at."""
GRACE = 0.02
"""Seconds that a look may wait for a free thread before another is started."""
SPARE = 10.0
"""Seconds without work after which a thread ends."""
TICK = 0.5
"""Seconds between two calls of `Rounds.tick`, at most."""

Task = Callable[[], object]
"""What the inbox holds: called by the thread that runs the rounds."""


class Guest:
    """One watched guest, and what is kept of it.

    :ivar schedule: when it is looked at
    :ivar history: what is known from the last look
    :ivar seen: what the last look brought, without its lists
    :ivar counts: processes, modules and sockets of the last look that could be read
    :ivar last: when that was (`time.monotonic`); 0 for never
    :ivar looks: looks by how they ended: ``read``, ``unreadable``, ``unanswered``
    :ivar findings: how many, by the finding's text
    :ivar events: the newest, with their times
    :ivar cost: of all looks
    """

    def __init__(self, domain: Domain, schedule: Schedule, lists: Collection[str] = LISTS) -> None:
        self.domain, self.name = domain, domain.name
        self.schedule = schedule
        self.session = Session(lambda: closing(reach(domain)), lists, domain.agent, domain.timeout, SOCKETS_PACE)
        self.history = History()
        self.seen = Seen()
        self.counts = (0, 0, 0)
        self.last = 0.0
        self.looks: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()
        self.events: deque[tuple[float, Change]] = deque(maxlen=KEPT)
        self.cost = Cost()

    def take(self, seen: Seen, now: float) -> list[Change]:
        """Take in what a look brought. Returns its events, oldest first."""
        events = list(self.history.take(seen))
        when = time.time()
        self.events.extend((when, event) for event in events)
        for event in events:
            self.findings.update(event.finding.split("; ") if event.finding else ())
        self.cost += seen.cost
        self.looks["read" if seen.sight else "unreadable" if seen.answered else "unanswered"] += 1
        if seen.sight is not None:
            self.counts = len(seen.sight.tasks), len(seen.sight.modules), len(seen.sight.sockets)
            self.last = now
        self.seen = Seen(None, seen.problem, seen.answered, seen.renewed, seen.boot, seen.release, seen.cost)
        return events


class Looker(Protocol):
    """Looks at guests, and passes on what it saw."""

    def ask(self, guest: Guest) -> None:
        """Begin a look."""
        ...

    def tend(self, now: float) -> float:
        """See to looks that wait. Returns seconds until it wants to be called again, at most."""
        ...

    def forget(self, guest: Guest) -> None:
        """Close a guest's session; no look at it is under way."""
        ...

    def close(self) -> None:
        """End, without waiting for looks that are under way."""
        ...


class _Worker:
    """A thread, and the look that it is to make next."""

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next: SimpleQueue[Guest | None] = SimpleQueue()


class Threads:
    """Looks from threads of this process, over sessions that stay open. A look that finds every thread busy for `GRACE`
    seconds gets a thread of its own; a thread without work for `SPARE` seconds ends.

    :param answered: called by those threads with each guest and what was seen
    """

    def __init__(self, answered: Callable[[Guest, Seen], object]) -> None:
        self._answered = answered
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []  # the last to finish is the first to be used: the others can end
        self._waiting: deque[tuple[float, Guest]] = deque()
        self._running = 0
        self._closed = False

    @property
    def running(self) -> int:
        """Threads that there are."""
        return self._running

    def ask(self, guest: Guest) -> None:
        """See `Looker.ask`."""
        with self._lock:
            if self._idle:
                self._idle.pop().next.put(guest)
                return
            self._waiting.append((time.monotonic(), guest))
            if self._running >= (os.cpu_count() or 1):
                return
        self._start()

    def tend(self, now: float) -> float:
        """See `Looker.tend`."""
        with self._lock:
            late = sum(since + GRACE <= now for since, _ in self._waiting)
            waiting = bool(self._waiting)
        for _ in range(late):
            self._start()
        return GRACE if waiting else TICK

    def forget(self, guest: Guest) -> None:
        """See `Looker.forget`."""
        guest.session.close()

    def close(self) -> None:
        """See `Looker.close`."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            for worker in self._idle:
                worker.next.put(None)
            self._idle.clear()

    def _start(self) -> None:
        with self._lock:
            self._running += 1
        # A daemon: a look at a guest that does not answer does not keep the process alive.
        threading.Thread(target=self._work, name="vmishim-look", daemon=True).start()

    def _work(self) -> None:
        worker = _Worker()
        try:
            while (guest := self._take(worker)) is not None:
                self._answered(guest, guest.session.look())
        finally:
            with self._lock:
                self._running -= 1

    def _take(self, worker: _Worker) -> Guest | None:
        """The guest to look at next; None: end."""
        with self._lock:
            if self._closed:
                return None
            if self._waiting:
                return self._waiting.popleft()[1]
            self._idle.append(worker)
        try:
            return worker.next.get(timeout=SPARE)
        except Empty:
            with self._lock:
                if worker in self._idle:
                    self._idle.remove(worker)
                    return None
            return worker.next.get()  # it was given a look just now


class Rounds:
    """Looks at guests until `stop`.

    :param interval: seconds between two looks at a guest
    :param told: called with each guest, the events of a look, and what it brought
    :param lists: what a look reads, of `vmishim.inspection.changes.LISTS`
    :param looker: makes the looks, from the function that is to be called with each result
    :ivar guests: by name
    """

    def __init__(
        self,
        interval: float,
        told: Callable[[Guest, list[Change], Seen], object],
        looker: Callable[[Callable[[Guest, Seen], object]], Looker] = Threads,
        tick: Task = lambda: None,
        lists: Collection[str] = LISTS,
    ) -> None:
        self._lists = lists
        self.interval = interval
        self.guests: dict[str, Guest] = {}
        self.inbox: SimpleQueue[Task] = SimpleQueue()
        self._told, self._tick = told, tick
        self._chance = SystemRandom().random
        self._due: list[tuple[float, int, Guest]] = []
        self._serial = count()
        self._looker = looker(lambda guest, seen: self.inbox.put(partial(self._take, guest, seen)))
        self._running = True

    def watch(self, domains: Iterable[Domain]) -> Mapping[str, list[str]]:
        """Watch these guests, and no others. A guest whose entry changed gets a new session and keeps its history.

        :returns: names of guests that were ``added``, ``removed`` and ``changed``
        """
        wanted = {domain.name: domain for domain in domains}
        said: dict[str, list[str]] = {"added": [], "removed": [], "changed": []}
        for name, guest in list(self.guests.items()):
            if wanted.get(name) == guest.domain:
                del wanted[name]
                continue
            if guest.schedule.on(Event.REMOVED, time.monotonic()) is Action.CLOSE:
                self._looker.forget(guest)
            if name not in wanted:
                del self.guests[name]
                said["removed"].append(name)
        for name, domain in wanted.items():
            made = Guest(domain, Schedule(self.interval, time.monotonic(), self._chance), self._lists)
            before = self.guests.get(name)
            if before is not None:
                made.history, made.events, made.findings = before.history, before.events, before.findings
                made.looks, made.cost = before.looks, before.cost
            said["added" if before is None else "changed"].append(name)
            self.guests[name] = made
            self._plan(made)
        return said

    def run(self) -> None:
        """Look until `stop`."""
        ticked = 0.0
        try:
            while self._running:
                now = time.monotonic()
                self._begin(now)
                wait = self._looker.tend(now)
                if now - ticked >= TICK:
                    ticked = now
                    self._tick()
                if self._due:
                    wait = min(wait, max(self._due[0][0] - now, 0))
                self._handle(wait)
        finally:
            self._looker.close()
            for guest in self.guests.values():
                if guest.schedule.state in (State.WAITING, State.LOST):
                    self._looker.forget(guest)

    def stop(self) -> None:
        """Make `run` return. For the thread that runs it: others put this into the inbox."""
        self._running = False

    def _begin(self, now: float) -> None:
        """Begin the looks that are due."""
        while self._due and self._due[0][0] <= now:
            _, _, guest = heapq.heappop(self._due)
            if guest.schedule.state in (State.WAITING, State.LOST):
                guest.schedule.on(Event.DUE, now)
                self._looker.ask(guest)

    def _handle(self, wait: float) -> None:
        """Wait for something in the inbox, and do all that is there."""
        try:
            task = self.inbox.get(timeout=wait) if wait > 0 else self.inbox.get_nowait()
            for _ in range(len(self.guests) + 1):  # and then see what is due
                task()
                task = self.inbox.get_nowait()
            self.inbox.put(task)
        except Empty:
            pass

    def _take(self, guest: Guest, seen: Seen) -> None:
        """A look has ended."""
        now = time.monotonic()
        action = guest.schedule.on(Event.ANSWERED if seen.answered else Event.UNANSWERED, now)
        if action is Action.CLOSE:
            self._looker.forget(guest)
            return
        self._told(guest, guest.take(seen, now), seen)
        self._plan(guest)

    def _plan(self, guest: Guest) -> None:
        heapq.heappush(self._due, (guest.schedule.due, next(self._serial), guest))
