"""The connection to the agent: one ZeroMQ REQ socket, a session over it, and what happens when either breaks.

The only module of the IDS's side that imports ``zmq``.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Final, Self

import zmq

from vmishim.endpoint import host_name, problem
from vmishim.errors import LinkError
from vmishim.wire.keys import PrivateKey, PublicKey
from vmishim.wire.session import MAX_FRAME, MAX_MESSAGE, Initiator, Reason, RefusedError, Session

ZMQ_VERSION: Final = zmq.zmq_version()
"""Version of libzmq, for ``vmishim doctor``."""
_LOOK_UP_MS: Final = 20  # how often a waiting socket looks whether the connection broke
Prove = Callable[[PublicKey, Callable[[bytes], bytes]], object]
"""A check that a new session is with the right agent; raises if it is not."""
_EVENT: Final = struct.Struct("=Hi")  # zmq_socket_monitor(3): first frame of an event
_SEEN: Final = {
    int(zmq.EVENT_CONNECT_RETRIED): "nothing listens there",
    int(zmq.EVENT_CONNECTED): "a connection was made, but no answer came",
    int(zmq.EVENT_DISCONNECTED): "the connection was closed at the other end",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "what listens there does not speak ZeroMQ",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "what listens there does not speak ZeroMQ",
}
_TRIED: Final = int(zmq.EVENT_CONNECT_DELAYED) | int(zmq.EVENT_CLOSED)
"""Events of a connection that was tried. Without them, a retry means that no address was found for the name."""
_RECONNECT_MS = (50, 500)  # between two attempts to connect: at first, and at most
_WATCHED: Final = sum(_SEEN) | _TRIED
_RCVMORE: Final = int(zmq.RCVMORE)
_BROKEN: Final = frozenset(_SEEN) - {int(zmq.EVENT_CONNECT_RETRIED), int(zmq.EVENT_CONNECTED)}


class UnansweredError(LinkError):
    """No answer came from the agent's endpoint.

    :ivar fact: what happened; the error's text also says what to do
    """

    def __init__(self, fact: str, advice: str = "is the agent running? try `vmishim doctor`") -> None:
        super().__init__(f"{fact}: {advice}")
        self.fact, self.advice = fact, advice

    def __reduce__(self) -> tuple[type[UnansweredError], tuple[str, str]]:
        return type(self), (self.fact, self.advice)


class UnresolvedError(UnansweredError):
    """The host name in the agent's endpoint has no address."""


class WrongKeyError(LinkError):
    """What answers does not have the private key of the agent that is expected."""


class Link:
    """Sends requests to the agent at ``endpoint``. Connects and makes a handshake at the first request, and again
    whenever it must.

    A request is sent once more, over a new socket and a new handshake and within the same deadline, if its reply is
    lost or the agent does not know the session (because it was restarted). So every request must be safe to carry out
    twice, as reads are. The first attempt gets half of the time, so an answer may take that long.

    Threads may share a link; their requests go one after the other. A forked process makes its own socket and
    handshake, and leaves its parent's alone.

    :param endpoint: ``tcp://HOST:PORT`` or ``ipc://PATH``
    :param static: this host's key, which the agent must permit
    :param remote: the agent's public key, or several while it is being changed; only its holder can answer
    :param timeout: seconds that an exchange may take, handshake and retry included (kept to within 20 ms)
    :param proofs: checks that run in each new session, in turn, before it carries anything else: called with the
        agent's key and a function from a request to its reply; an exception ends the session

    :ivar requests: requests that were answered
    :ivar bytes_sent: bytes of all request frames
    :ivar bytes_received: bytes of all reply frames
    :ivar handshakes: sessions made
    :ivar remote: the agent's public key; of several, the one that made the last session, at first the first
    :ivar proofs: as the parameter; more may be added
    :ivar pinned: number of the handshake whose session every request must use, 0 for any: the agent ends what a session
        holds (a freeze) with that session

    :raises LinkError: ``endpoint`` or ``timeout`` is not valid
    """

    def __init__(
        self,
        endpoint: str,
        static: PrivateKey,
        remote: PublicKey | Sequence[PublicKey],
        timeout: float = 5.0,
        proofs: Sequence[Prove] = (),
    ) -> None:
        if wrong := problem(endpoint):
            raise LinkError(f"{endpoint!r} {wrong}")
        if not timeout > 0:
            raise LinkError(f"timeout must be a positive number of seconds, not {timeout}")
        self.endpoint = endpoint
        self.timeout = timeout
        self.requests = self.bytes_sent = self.bytes_received = self.handshakes = self.pinned = 0
        self._static = static
        self._remotes = (remote,) if isinstance(remote, PublicKey) else tuple(remote)
        self.remote = self._remotes[0]
        self.proofs = [*proofs]
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._session: Session | None = None
        self._closed = False
        _links.add(self)

    def exchange(self, message: bytes, timeout: float | None = None) -> bytes:
        """The agent's reply to ``message``.

        :param timeout: seconds, instead of the link's own
        :raises RefusedError: the agent (or an attacker on the network) refuses to answer
        :raises LinkError: no reply in time, or one that is not authentic; or the session that is ``pinned`` is lost
        """
        if len(message) > MAX_MESSAGE:
            raise LinkError(f"a request of {len(message)} bytes is too long: at most {MAX_MESSAGE} fit in a frame")
        allowed = self.timeout if timeout is None else timeout
        deadline = monotonic() + allowed
        if not self._lock.acquire(timeout=max(allowed, 0)):
            raise LinkError(f"other threads kept the link to {self.endpoint} for {allowed:g} s")
        try:
            if self._closed:
                raise LinkError(f"the link to {self.endpoint} is closed")
            try:
                reply = self._ask(message, deadline, share=0.5)
            except (_LostError, RefusedError) as error:
                self._drop()
                if isinstance(error, RefusedError) and error.reason is not Reason.UNKNOWN_SESSION:
                    raise
                reply = self._ask(message, deadline, share=1.0)
            self.requests += 1
            return reply
        except BaseException as error:
            # Whatever went wrong, Ctrl-C included: a reply may still be under way, so this socket can't be used again.
            self._drop()
            if isinstance(error, _LostError):
                raise self._explain(error, allowed) from None
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let go of the agent. A further ``exchange`` is a ``LinkError``; closing twice is not."""
        with self._lock:
            self._closed = True
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_line", None) is not None:
            self._drop()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._session else "not connected"
        return f"Link({self.endpoint!r}, {state}, agent={self.remote!r})"

    def _ask(self, message: bytes, deadline: float, share: float) -> bytes:
        """One attempt, which may wait for ``share`` of the time that is left."""
        if self.pinned and (self._session is None or self.pinned != self.handshakes):
            raise LinkError(
                f"the session with {self.endpoint} was lost within a pause, and the pause with it: resume_vm, then "
                "pause_vm again"
            )
        if self._session is None or self._session.spent:
            session = self._greet(deadline)
            for prove in self.proofs:
                prove(session.remote, lambda request: self._carry(session, request, deadline, share))
            self._session = session
        return self._carry(self._session, message, deadline, share)

    def _carry(self, session: Session, message: bytes, deadline: float, share: float) -> bytes:
        """The reply to one request of a session."""
        line = self._line
        assert line is not None, "a session has its socket"
        frame = session.seal(message)
        self.bytes_sent += len(frame)
        now = monotonic()
        reply = line.exchange(frame, now + (deadline - now) * share)
        self.bytes_received += len(reply)
        try:
            return session.open(reply)
        except LinkError as error:
            raise self._named(error) from None

    def _greet(self, deadline: float) -> Session:
        """A new session. Sends the hello again whenever the connection breaks (a forwarded port keeps closing it while
        the guest boots), and after half of the remaining time: a hello has no effect, so it may be sent often."""
        # An agent with another key refuses a hello as malformed. So may an attacker on the network, since a refusal is
        # not sealed: it decides nothing. The other keys are tried, then the first once more, and only a welcome, which
        # takes the private key, says which key is the agent's.
        others = [key for key in self._remotes if key != self.remote]
        keys = [self.remote, *others, self.remote] if others else [self.remote]
        while True:
            self._drop()
            self._line = _Line(self.endpoint)
            initiator = Initiator(self._static, keys[0])
            now = monotonic()
            try:
                answer = self._line.exchange(initiator.hello(), min(deadline, now + max((deadline - now) / 2, 0.25)))
            except _LostError as lost:
                if monotonic() >= deadline:
                    raise _LostError(str(lost), early=False, tried=lost.tried) from None
                continue
            try:
                session = initiator.finish(answer)
            except RefusedError as refused:
                if refused.reason is Reason.MALFORMED and len(keys) > 1:
                    del keys[0]
                    continue
                raise self._named(refused) from None
            except LinkError as error:
                key = f"{keys[0].fingerprint} {keys[0].name}".rstrip()
                raise WrongKeyError(f"{self.endpoint} is not the agent with key {key}: {error}") from None
            self.remote = keys[0]
            self.handshakes += 1
            return session

    def _drop(self) -> None:
        """Give up the session and its socket, so that nothing still under way can arrive later."""
        self._session = None
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _named(self, error: LinkError) -> LinkError:
        """The same error, with the endpoint in its text."""
        text = f"{self.endpoint}: {error}"
        return RefusedError(error.reason, text) if isinstance(error, RefusedError) else LinkError(text)

    def _explain(self, lost: _LostError, allowed: float) -> UnansweredError:
        name = host_name(self.endpoint)
        if name and not lost.tried:
            fact = f"no address was found for {name!r}, the host in {self.endpoint}, within {allowed:g} s"
            return UnresolvedError(fact, "check the name, or give an address")
        fact = f"nothing answered at {self.endpoint} within {allowed:g} s"
        if lost.early:
            fact = f"{self.endpoint} closed the connection before it answered, twice"
        return UnansweredError(f"{fact} ({lost})")

    def _disown(self) -> None:
        """In a forked child: leave the parent's socket as it is, and never collect it, which would close it."""
        _inherited.append(self._line)
        self._line = None
        self._session = None  # sealing under the parent's keys and numbers would break both
        self._lock = threading.Lock()


class _LostError(Exception):
    """No reply arrived. ``early``: because the connection broke before the deadline. ``tried``: as of `_Line`."""

    def __init__(self, text: str, *, early: bool, tried: bool = True) -> None:
        super().__init__(text)
        self.early, self.tried = early, tried


class _Line:
    """One REQ socket, and the monitor that reports on its connection. After a lost reply it cannot be used again.

    :ivar tried: whether an address was known to which a connection was tried
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._monitor: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._seen = "nothing listens there"
        self.tried = False
        try:
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.MAXMSGSIZE, MAX_FRAME),
                (zmq.IPV6, 1),
                (zmq.SNDTIMEO, 0),  # a request is queued at once or not at all
                (zmq.RCVTIMEO, _LOOK_UP_MS),
                # One reply is under way. With 1, libzmq's own thread would be woken twice in each request.
                (zmq.RCVHWM, 8),
                (zmq.RECONNECT_IVL, _RECONNECT_MS[0]),
                (zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1]),
            ):
                self._socket.setsockopt(option, value)
            self._monitor.setsockopt(zmq.LINGER, 0)
            # A link that is idle reads no events. With a bound, libzmq's own thread would wait for it to, and `close`
            # for that thread, once the agent has been away for minutes.
            self._monitor.setsockopt(zmq.RCVHWM, 0)
            self._socket.monitor("inproc://monitor", _WATCHED)
            self._monitor.connect("inproc://monitor")
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"cannot connect to {endpoint}: {error.strerror}") from error

    def exchange(self, frame: bytes, until: float) -> bytes:
        """The frame that answers ``frame``. :raises _LostError: none by ``until``, or the connection broke"""
        try:
            self._socket.send(frame)
        except zmq.Again:
            raise _LostError("it accepts no requests", early=True) from None
        while True:
            left = until - monotonic()
            if left * 1000 < _LOOK_UP_MS:
                self._socket.setsockopt(zmq.RCVTIMEO, max(int(left * 1000), 0))
            try:
                reply = self._socket.recv()
            except zmq.Again:
                if self._broke():
                    raise _LostError(self._seen, early=True) from None
                left = until - monotonic()
                if left <= 0:
                    raise _LostError(self._seen, early=False, tried=self.tried) from None
                # This takes longer than most replies do. A thousand links that wait must not wake up all the time.
                zmq.select([self._socket, self._monitor], [], [], left)
                continue
            # An agent answers in one part; anything else counts as an empty frame, which the session refuses.
            if not self._socket.get(_RCVMORE):
                return reply
            while self._socket.get(_RCVMORE):
                self._socket.recv()
            return b""

    def _broke(self) -> bool:
        broke = False
        with contextlib.suppress(zmq.Again):
            while True:
                event = _EVENT.unpack_from(self._monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
                self.tried = self.tried or event != zmq.EVENT_CONNECT_RETRIED
                self._seen = _SEEN.get(event, self._seen)
                broke = broke or event in _BROKEN
        return broke

    def close(self) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._socket.monitor(None, 0)
        self._socket.close()
        self._monitor.close()
        self._context.term()


_links: weakref.WeakSet[Link] = weakref.WeakSet()
_inherited: list[object] = []


def _disown_all() -> None:
    for link in list(_links):
        link._disown()


os.register_at_fork(after_in_child=_disown_all)
