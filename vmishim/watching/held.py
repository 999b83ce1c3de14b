"""What a worker of a Dask cluster runs: a look, by a session that stays open in the worker from look to look.

Not one of Dask's own actors: a client gets an actor's handle as a pickle that names a class, and ours refuses those.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from contextlib import closing

from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.inspection.changes import Sight
from vmishim.watching.session import SOCKETS_PACE, Seen, Session, one_line
from vmishim.watching.sights import encode

KEPT_OPEN = 180.0
"""Seconds without a look after which a worker closes a session: the guest went to another worker, or is not watched."""
NUMBER = 8
"""Bytes that name a look."""
MARK = b"="
"""How an answer begins; an error's line begins otherwise."""


class Held:
    """A session, and the look that the client has if it got the last answer."""

    def __init__(self, domain: Domain, lists: Collection[str]) -> None:
        self.domain, self.lists = domain, lists
        self.session = Session(lambda: closing(reach(domain)), lists, domain.agent, domain.timeout, SOCKETS_PACE)
        self.lock = threading.Lock()
        self.used = time.monotonic()
        self.number = b""
        self.sight: Sight | None = None


_held: dict[str, Held] = {}
_lock = threading.Lock()


def look(domain: Domain, lists: Collection[str], has: bytes) -> bytes:
    """Look at a guest once. It raises nothing: Dask would send the exception as a pickle.

    :param has: names the look that the client has; empty for none
    :returns: `MARK`, the name of this look, then what was seen, as by `encode`: what differs from that look if this
        worker made it, otherwise all
    """
    held = _session(domain, lists)
    number = os.urandom(NUMBER)
    with held.lock:
        try:
            seen = held.session.look()
            base = held.sight if has and held.number == has else None
            data = encode(base, seen)
            if seen.sight is not None:
                held.sight = seen.sight
            elif base is None:
                held.sight = None
            held.number = number if held.sight is not None else b""
        except Exception as error:  # one line for whatever went wrong
            held.number = b""
            data = encode(None, Seen(None, f"{type(error).__name__}: {one_line(error)}"))
        held.used = time.monotonic()
    return MARK + number + data


def _session(domain: Domain, lists: Collection[str]) -> Held:
    """This worker's session with a guest; those that are no longer used are closed."""
    now = time.monotonic()
    with _lock:
        old = [name for name, held in _held.items() if now - held.used > KEPT_OPEN and not held.lock.locked()]
        old += [domain.name] if domain.name in _held and _held[domain.name].domain != domain else []
        closing_ = [_held.pop(name) for name in old if name in _held]
        held = _held.setdefault(domain.name, Held(domain, lists))
        held.used = now
    for each in closing_:
        with each.lock:
            each.session.close()
    return held
