"""Forgets in time, so that a cached read need not look at the time."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """What has something to forget."""

    def expire(self) -> float | None:
        """Forget what is due, without waiting for a request. Returns seconds until the next is due, or None."""
        ...


class Clock:
    """Calls ``expire`` of its owner when something is due. Its thread runs only while there is something to forget.

    :param owner: held weakly
    """

    def __init__(self, owner: Forgetful) -> None:
        self._owner = weakref.ref(owner)
        self._lock = threading.Lock()
        self._running = False

    def start(self, first: float) -> None:
        """See that ``expire`` is called, the first time in ``first`` seconds."""
        with self._lock:
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, args=(first,), name="vmishim-clock", daemon=True).start()

    def _run(self, first: float) -> None:
        wait: float | None = first
        never = threading.Event()
        while wait is not None:
            never.wait(wait)
            owner = self._owner()
            if owner is None:
                return
            with self._lock:  # or `start` might come between the last look and the end
                wait = owner.expire()
                self._running = wait is not None
            del owner
