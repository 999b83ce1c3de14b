"""Forgets in time, so that the road of a cached read need not look at the time."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

PATIENCE = 0.05
"""Seconds to wait for who has the lock: most requests are answered in less."""


class Forgetful(Protocol):
    """What has something to forget."""

    lock: threading.RLock

    def hurry(self) -> None:
        """Forget what is due without the lock, which another thread keeps; `expire` follows."""
        ...

    def expire(self) -> float | None:
        """Forget what is due. Returns seconds until the next is, None when nothing is left."""
        ...


class Clock:
    """Calls ``expire`` of its owner when it is due. Its thread runs only while there is something to forget.

    :param owner: held weakly; everything here happens under its lock
    """

    def __init__(self, owner: Forgetful) -> None:
        self._owner = weakref.ref(owner)
        self._running = False

    def start(self, first: float) -> None:
        """See that ``expire`` is called, first in so many seconds. The owner's lock is held by the caller."""
        if not self._running:
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
            lock = owner.lock
            while not lock.acquire(timeout=PATIENCE):
                owner.hurry()
            try:
                wait = owner.expire()
                self._running = wait is not None
            finally:
                lock.release()
            del owner
