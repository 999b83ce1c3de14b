"""Looks at guests from the workers of a Dask cluster, each of which keeps the sessions of its guests open.

Dask's client runs in a child process in which no pickle can name a function or a class (`vmishim.inspection.cluster`
says why). Workers return what differs from the look that we have; events are made here, from our own last look. So a
worker that is killed takes nothing along: its guests' next looks are made by others, and compared with the same look.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from itertools import count

from vmishim import isolated
from vmishim.inspection.changes import LISTS, Sight
from vmishim.inspection.cluster import ANSWER_MAX, HEAD, Scheduler, told
from vmishim.watching.held import MARK, NUMBER
from vmishim.watching.rounds import TICK, Guest
from vmishim.watching.session import Seen
from vmishim.watching.sights import decode

PATIENCE = 20.0
"""Seconds that a worker gets for a look beyond the guest's own time limit: it may be killed, and another one asked."""


class Workers:
    """Looks by way of a scheduler. See `vmishim.watching.rounds.Looker`.

    :param scheduler: where it answers
    :param answered: called with each guest and what was seen
    :param lists: what to read
    """

    def __init__(
        self, scheduler: Scheduler, answered: Callable[[Guest, Seen], object], lists: Collection[str] = LISTS
    ) -> None:
        self._scheduler, self._answered, self._lists = scheduler, answered, lists
        self._numbers = count(1)
        self._asked: dict[int, tuple[Guest, float, Sight | None]] = {}
        self._has: dict[str, tuple[bytes, Sight]] = {}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, guest: Guest) -> None:
        """See `Looker.ask`."""
        number = next(self._numbers)
        with self._lock:
            name, sight = self._has.get(guest.name, (b"", None))
            until = time.monotonic() + 2 * guest.domain.timeout + PATIENCE
            self._asked[number] = guest, until, sight
            child = self._child = self._child or self._start()
        assert child.stdin is not None
        try:
            pickle.dump((number, guest.domain, self._lists, name), child.stdin)
            child.stdin.flush()
        except OSError:  # it has ended: the thread that listens to it says why
            pass

    def tend(self, now: float) -> float:
        """See `Looker.tend`: a look that no worker has answered in time has failed."""
        with self._lock:
            late = [number for number, (_, until, _) in self._asked.items() if until <= now]
        for number in late:
            self._finish(number, Seen(None, "no worker of the cluster answered in time", answered=False))
        return TICK

    def forget(self, guest: Guest) -> None:
        """See `Looker.forget`. The worker closes the session once it was not used for some minutes."""
        with self._lock:
            self._has.pop(guest.name, None)

    def close(self) -> None:
        """See `Looker.close`."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            isolated.module("vmishim.watching.workers_client"),
            cwd="/",
            env=isolated.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Dask logs what it was sent, as it is
        )
        assert child.stdin is not None
        pickle.dump(self._scheduler, child.stdin)
        child.stdin.flush()
        threading.Thread(target=self._listen, args=(child,), name="vmishim-workers", daemon=True).start()
        return child

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        """Take the child's answers until it ends; then all that it was asked has failed."""
        assert child.stdout is not None
        why = "the process that talks to the Dask scheduler has ended"
        while len(head := child.stdout.read(HEAD.size)) == HEAD.size:
            number, size = HEAD.unpack(head)
            data = child.stdout.read(min(size, ANSWER_MAX))
            if number < 0:
                why = told(data)
                break
            self._finish(number, None, data)
        child.kill()
        child.wait()
        child.stdout.close()
        with self._lock:
            if self._child is child:
                self._child = None  # the next look starts another
            asked = [] if self._closed else list(self._asked)
        for number in asked:
            self._finish(number, Seen(None, why, answered=False))

    def _finish(self, number: int, seen: Seen | None, data: bytes = b"") -> None:
        """A look has ended: by ``seen``, or by what a worker sent."""
        with self._lock:
            if number not in self._asked:
                return  # too late: it has failed already
            guest, _, before = self._asked.pop(number)
            if seen is None:
                seen = self._decoded(guest, before, data)
        self._answered(guest, seen)

    def _decoded(self, guest: Guest, before: Sight | None, data: bytes) -> Seen:
        if data[:1] != MARK:
            self._has.pop(guest.name, None)
            return Seen(None, told(data), answered=False)
        try:
            seen = decode(before, data[1 + NUMBER :])
        except ValueError as error:
            self._has.pop(guest.name, None)
            return Seen(None, str(error))
        if seen.sight is not None:
            self._has[guest.name] = data[1 : 1 + NUMBER], seen.sight
        else:
            self._has.pop(guest.name, None)
        return seen
