"""An agent's sessions behind one function, without I/O: a frame in, a frame out. For one thread.

A hello can be recorded and replayed by anyone on the network, so it must cost little and displace nothing:

- The same hello, sent again while its session waits for the first request, gets the same welcome and the same slot.
- Each key has a few slots of its own for sessions that wait (*unproven* ones), so no key can take another's.
- A hello carries the time it was made. Of one key's slots the newest hellos stay: an old recording never displaces the
  hello that an IDS has just sent. A hello that is no newer than one whose session has carried a request gets a slot
  that only others like it compete for, so an IDS whose clock was set back still gets in when nobody replays.

The first authentic request moves a session to the *live* ones. These are bounded in all and by key; where all are
taken, the key that has most gives up the one it used longest ago.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vmishim.errors import LinkError
from vmishim.wire.keys import PrivateKey, PublicKey
from vmishim.wire.session import (
    HELLO,
    REQUEST,
    VERSION,
    Permitted,
    Reason,
    RefusedError,
    Responder,
    Session,
    parse,
    refusal,
)

LIVE_MAX, LIVE_PER_KEY = 256, 64
"""Sessions that have carried a request: of all keys, and of one."""
UNPROVEN_PER_KEY, DOUBTFUL_PER_KEY = 4, 2
"""Sessions of one key that wait for their first request: by new hellos, and by hellos that may be recordings."""

Outcome = Literal["greeted", "proven", "refused"]


class Answered(NamedTuple):
    """What an agent sends back, and what it learned of the sender.

    :ivar frame: the frame to send
    :ivar outcome: ``greeted``: a new hello of a permitted key; ``proven``: an authentic request; ``refused``: anything
        else, a hello that may be a recording included
    :ivar key: the sender's key, for the first two
    """

    frame: bytes
    outcome: Outcome = "refused"
    key: PublicKey | None = None


@dataclass(slots=True)
class _Waiting:
    """A session that waits for its first request."""

    session: Session
    hello: bytes
    welcome: bytes
    made_ns: int


class Sessions:
    """All sessions of an agent. For one thread.

    :param permitted: which keys may connect; asked at every request, so a key taken out is out at once
    :param on_end: called with the id of each session that was live and has ended, so that what was kept for it can go
    """

    def __init__(
        self,
        static: PrivateKey,
        permitted: Permitted,
        *,
        on_end: Callable[[bytes], None] | None = None,
        live: int = LIVE_MAX,
        live_per_key: int = LIVE_PER_KEY,
    ) -> None:
        self._responder = Responder(static, permitted)
        self._on_end = on_end or (lambda identity: None)
        self._most_live, self._most_per_key = live, live_per_key
        self._live: OrderedDict[bytes, Session] = OrderedDict()
        self._of_key: Counter[PublicKey] = Counter()
        self._waiting: dict[bytes, _Waiting] = {}
        self._hellos: dict[bytes, bytes] = {}
        """Ids of the sessions that wait, by the hello that made each."""
        self._slots: dict[tuple[PublicKey, bool], list[bytes]] = {}
        """Ids of the sessions that wait, by key and by whether their hello may be a recording; oldest hello first."""
        self._newest: dict[PublicKey, int] = {}
        """When the newest hello of each key was made whose session has carried a request, in ns."""

    def answer(self, frame: bytes, serve: Callable[[bytes, bytes], bytes]) -> bytes:
        """The frame that answers ``frame``, see `handle`."""
        return self.handle(frame, serve).frame

    def handle(self, frame: bytes, serve: Callable[[bytes, bytes], bytes]) -> Answered:
        """Answer ``frame``; with a refusal if it is neither a hello nor the authentic next request of a session.

        Raises nothing of its own, whatever ``frame`` holds. What ``serve`` or ``on_end`` raise goes through.

        :param serve: from session id and request to reply; called for authentic requests only
        :raises LinkError: ``serve`` returned more than ``MAX_MESSAGE``: that request has no reply
        """
        if frame and frame[0] != VERSION:
            return Answered(refusal(Reason.OTHER_VERSION))
        try:
            if frame[1:2] == bytes([HELLO]):
                return self._greet(frame)
            session, message = self._open(frame)
        except RefusedError as error:
            return Answered(refusal(error.reason))
        except LinkError:
            return Answered(refusal(Reason.MALFORMED))
        return Answered(session.seal(serve(session.id, message)), "proven", session.remote)

    def close(self) -> None:
        """End every session."""
        self._waiting.clear()
        self._hellos.clear()
        self._slots.clear()
        for identity in list(self._live):
            self._end(identity)

    @property
    def live(self) -> int:
        """How many sessions are live."""
        return len(self._live)

    def key_of(self, identity: bytes) -> PublicKey | None:
        """The key of a live session; None for any other id."""
        session = self._live.get(identity)
        return None if session is None else session.remote

    def _greet(self, frame: bytes) -> Answered:
        known = self._hellos.get(frame)
        if known is not None:  # sent again, or replayed: computing it again would only cost time
            waiting = self._waiting[known]
            self._permit(waiting.session.remote)
            return Answered(waiting.welcome)
        welcome, session, made_ns = self._responder.accept(frame)
        doubtful = made_ns <= self._newest.get(session.remote, -1)
        slots = self._slots.setdefault((session.remote, doubtful), [])
        if len(slots) >= (DOUBTFUL_PER_KEY if doubtful else UNPROVEN_PER_KEY):
            if not doubtful and made_ns < self._waiting[slots[0]].made_ns:
                raise RefusedError(Reason.BUSY)  # older than all that wait: a recording, or delayed in transit
            self._forget(slots[0])
        self._waiting[session.id] = _Waiting(session, frame, welcome, made_ns)
        self._hellos[frame] = session.id
        slots.append(session.id)
        if not doubtful:
            slots.sort(key=lambda identity: self._waiting[identity].made_ns)
        return Answered(welcome) if doubtful else Answered(welcome, "greeted", session.remote)

    def _forget(self, identity: bytes) -> _Waiting | None:
        """Remove a session from those that wait."""
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            del self._hellos[waiting.hello]
            for place in ((waiting.session.remote, True), (waiting.session.remote, False)):
                slots = self._slots.get(place, [])
                if identity in slots:
                    slots.remove(identity)
                    if not slots:
                        del self._slots[place]
        return waiting

    def _permit(self, key: PublicKey) -> None:
        if not self._responder.permits(key):
            raise RefusedError(Reason.NOT_PERMITTED)

    def _open(self, frame: bytes) -> tuple[Session, bytes]:
        """A request's session and message."""
        if frame[1:2] != bytes([REQUEST]):
            raise LinkError("the frame is not a request")
        identity = frame[2:10]
        session = self._live.get(identity)
        if session is None:
            parse(frame)
            waiting = self._waiting.get(identity)
            if waiting is None:
                raise RefusedError(Reason.UNKNOWN_SESSION)
            session = waiting.session
        try:
            self._permit(session.remote)
        except RefusedError:
            self._end(identity)
            raise
        if session.spent:
            self._end(identity)
            raise RefusedError(Reason.UNKNOWN_SESSION)
        message = session.open(frame)
        if identity in self._live:
            self._live.move_to_end(identity)
        else:
            self._begin(identity, session)
        return session, message

    def _begin(self, identity: bytes, session: Session) -> None:
        """Make a session live after its first request; older hellos of its key then count as possible recordings."""
        waiting = self._forget(identity)
        assert waiting is not None, "a session waits before it is live"
        key = session.remote
        self._newest[key] = max(waiting.made_ns, self._newest.get(key, -1))
        self._live[identity] = session
        self._of_key[key] += 1
        if self._of_key[key] > self._most_per_key:
            self._end(next(one for one, other in self._live.items() if other.remote == key))
        elif len(self._live) > self._most_live:
            most = max(self._of_key, key=self._of_key.__getitem__)
            self._end(next(one for one, other in self._live.items() if other.remote == most))

    def _end(self, identity: bytes) -> None:
        self._forget(identity)
        session = self._live.pop(identity, None)
        if session is not None:
            self._of_key[session.remote] -= 1
            if not self._of_key[session.remote]:
                del self._of_key[session.remote]
            self._on_end(identity)

    def __repr__(self) -> str:
        return f"Sessions({len(self._live)} live, {len(self._waiting)} unproven)"
