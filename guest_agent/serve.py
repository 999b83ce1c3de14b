"""The agent's socket: frames in, frames out, until stopped. The only module of the agent that imports ``zmq``."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket as sockets
import threading
from collections.abc import Callable, Collection, Iterator

import zmq

from vmishim.errors import LinkError
from vmishim.wire.session import MAX_FRAME, Reason, refusal
from vmishim.wire.sessions import Sessions

_log = logging.getLogger(__name__)
_STOP_POLL_MS = 100
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    endpoint: str,
    sessions: Sessions,
    answer: Callable[[bytes, bytes], bytes],
    *,
    stop: threading.Event | int | None = None,
    watched: Collection[int] = (),
    ready: Callable[[str], None] | None = None,
    between: Callable[[], None] | None = None,
) -> None:
    """Answer requests at ``endpoint``, one at a time, until ``stop``, SIGTERM or SIGINT; then return.

    Every message gets a reply, if only a refusal. An exception in ``answer`` or ``between`` is logged with its
    traceback, and the loop goes on.

    :param endpoint: ``tcp://ADDRESS:PORT`` (port 0: any free port) or ``ipc://PATH``
    :param answer: takes a session id and a request, returns the reply; called for authentic requests only
    :param stop: an event that ends the loop once set (checked ten times a second), or a file descriptor that ends it as
        soon as it is readable; the main thread needs neither, since signals stop it
    :param watched: more file descriptors that end the loop as soon as one is readable
    :param ready: called once, with the endpoint that the socket listens on
    :param between: called after each reply has been handed to the network, for work done ahead of the next request
    :raises LinkError: the socket cannot listen on ``endpoint``
    """
    with zmq.Context() as context, context.socket(zmq.REP) as socket, _signals() as wake:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME),
            (zmq.IPV6, 1),
            # An IDS has one request under way. More would let a flood of peers fill the guest's memory with queues.
            (zmq.RCVHWM, 2),
            (zmq.SNDHWM, 2),
            # A peer that connects and sends nothing holds a descriptor for this long, which others may need.
            (zmq.HANDSHAKE_IVL, 3000),
        ):
            socket.setsockopt(option, value)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise LinkError(f"cannot listen on {endpoint}: {error.strerror}") from error
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        for descriptor in (wake, stop if isinstance(stop, int) else None, *watched):
            if descriptor is not None:
                poller.register(descriptor, zmq.POLLIN)
        event = stop if isinstance(stop, threading.Event) else None
        if ready is not None:
            ready(socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        while event is None or not event.is_set():
            happened = poller.poll(None if event is None else _STOP_POLL_MS)
            if any(source is not socket for source, _ in happened):
                return
            if happened:
                _answer_one(socket, sessions, answer)
                if between is not None:
                    with _logged("work ahead of the next request failed; the agent goes on"):
                        between()


def _answer_one(socket: zmq.Socket[bytes], sessions: Sessions, answer: Callable[[bytes, bytes], bytes]) -> None:
    parts = socket.recv_multipart()
    reply = refusal(Reason.MALFORMED)
    if len(parts) == 1:
        reply = refusal(Reason.FAULT)
        with _logged("answering a request failed; its session goes on"):
            reply = sessions.answer(parts[0], answer)
    socket.send(reply)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:  # the log shows it, and the next request may succeed
        _log.exception(what)


@contextlib.contextmanager
def _signals() -> Iterator[int | None]:
    """A descriptor that becomes readable on SIGTERM or SIGINT; None outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    reads, writes = sockets.socketpair()
    with reads, writes:
        writes.setblocking(False)
        # The handlers do nothing: the byte that Python writes to the wakeup descriptor reports the signal.
        before = [(number, signal.signal(number, lambda *_: None)) for number in _SIGNALS]
        wakeup = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        try:
            yield reads.fileno()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before:
                signal.signal(number, handler)
