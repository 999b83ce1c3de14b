"""The agent's port: frames in, frames out, until told to stop. The only module of the agent that imports ``zmq``.

libzmq accepts and buffers whatever anyone sends, and knows no sessions. So this loop watches it: which connections
there are (its monitor), which one a frame came by (``ZMQ_SRCFD``), how much each has sent (``TCP_INFO``), and how much
of a reply a peer has left unread (``SIOCOUTQ``). What `guest_agent.connections` says must go is shut down, which makes
libzmq free it. A ROUTER socket in place of REP lets requests wait here, so each key has its turn; peers use REQ.

Every request takes this way, so it asks libzmq and the kernel as little as it can. It waits for the sockets'
descriptors (``ZMQ_FD``), which ``zmq_poll`` would look at twice. Such a descriptor tells only that something is new:
before the loop waits for it again, ``ZMQ_EVENTS`` must have said that nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import logging
import os
import select
import signal
import socket as sockets
import stat
import struct
import termios
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import zmq

from guest_agent.connections import Connection, Connections, Event, Turns
from vmishim.errors import LinkError
from vmishim.wire.session import MAX_FRAME, Reason, refusal
from vmishim.wire.sessions import Sessions

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP_CHECK_MS = 100
BACKLOG = 128
"""Connections that the kernel keeps until libzmq accepts them."""
CHECK_S, IDLE_CHECK_S = 0.05, 0.25
"""Seconds between two looks at connections and memory: while a peer has yet to prove itself, and otherwise."""
TRIM_S = 1.0
"""Seconds after a peer that sent too much was dropped until what libzmq has freed by then is given back."""
UNPROVEN_BYTES = 64 << 10
"""Bytes that a peer may send before it has proved itself; a hello takes about 200."""
QUEUE_MAX = 16
"""Requests, and replies, that libzmq keeps for a peer, which has one under way if it speaks REQ. Each time that this
thread or libzmq's own has taken half of this, it wakes the other: with 2, twice in each request."""
OWED_MIN, OWED_MAX = 8 << 10, 64 << 20
"""Bytes from which on a reply is watched until it was read, and bytes of unread replies that are kept for all peers. So
many peers as may prove themselves, with a full queue of unwatched replies each, come to as much."""
MEMORY_MAX = 256 << 20
"""Bytes of memory above which peers are dropped, where the agent's cgroup sets no limit of its own."""
_ACCEPTED, _ENDED = int(zmq.EVENT_ACCEPTED), (int(zmq.EVENT_DISCONNECTED), int(zmq.EVENT_CLOSED))
_MONITOR_EVENT = struct.Struct("=HI")  # zmq_socket_monitor(3): event and descriptor
# As plain numbers: operations on pyzmq's enumerations take as long as libzmq's answer.
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
_TCP_INFO_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received (include/uapi/linux/tcp.h; since 4.2)

_OUTCOMES = {event.value: event for event in Event}

_libc = ctypes.CDLL(None, use_errno=True)


class Listener:
    """A socket that is bound and does not listen yet: made in set-up, used once the process is confined.

    :param endpoint: ``tcp://ADDRESS:PORT`` (port 0: any free one; address ``*``: all) or ``ipc://PATH``
    :ivar endpoint: the same with the port it got
    :raises LinkError: ``endpoint`` cannot be bound
    """

    def __init__(self, endpoint: str) -> None:
        scheme, _, rest = endpoint.partition("://")
        try:
            if scheme == "tcp" and ":" in rest:
                self._socket, self.endpoint = _bound_tcp(*rest.rsplit(":", 1))
            elif scheme == "ipc" and rest:
                self._socket, self.endpoint = _bound_unix(rest), endpoint
            else:
                raise LinkError(f"cannot listen on {endpoint!r}: give tcp://ADDRESS:PORT or ipc://PATH")
        except (OSError, ValueError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LinkError(f"cannot listen on {endpoint}: {reason}") from error

    def listen(self) -> int:
        """Listen; returns the descriptor, which is the caller's from now on."""
        self._socket.listen(BACKLOG)
        return self._socket.detach()

    def close(self) -> None:
        """Give the address back, unless `listen` handed it on."""
        self._socket.close()


def _bound_tcp(host: str, port: str) -> tuple[sockets.socket, str]:
    host = host.removeprefix("[").removesuffix("]")
    if not 0 <= int(port) < 65536:
        raise ValueError(f"there is no port {port}")
    family, *_, address = sockets.getaddrinfo(
        "::" if host == "*" else host, int(port), type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE
    )[0]
    one = sockets.socket(family, sockets.SOCK_STREAM)
    try:
        one.setblocking(False)
        one.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        if family == sockets.AF_INET6:
            one.setsockopt(sockets.IPPROTO_IPV6, sockets.IPV6_V6ONLY, 0)
        one.bind(address)
        name = one.getsockname()
        shown = f"[{name[0]}]" if family == sockets.AF_INET6 else name[0]
        return one, f"tcp://{shown}:{name[1]}"
    except BaseException:
        one.close()
        raise


def _bound_unix(path: str) -> sockets.socket:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):  # of an agent that ended
            os.unlink(path)
    one = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        one.setblocking(False)
        one.bind(path)
        return one
    except BaseException:
        one.close()
        raise


class Memory:
    """How much memory this process has, and how much it should stay below. Opened in set-up, read while confined."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.most = min(MEMORY_MAX, (_cgroup_limit() or 2 * MEMORY_MAX) // 2)
        """Bytes from which on peers are dropped: well below what the kernel ends the process at."""

    def resident(self) -> int:
        """Resident bytes."""
        return int(os.pread(self._statm, 200, 0).split()[1]) * self._page

    def trim(self) -> None:
        """Give back what was freed: what peers sent lies in many small pieces."""
        _libc.malloc_trim(0)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._statm)


def _cgroup_limit() -> int | None:
    """``memory.max`` of this process's cgroup (version 2), None without one."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        return int((Path("/sys/fs/cgroup") / line[3:].lstrip("/") / "memory.max").read_text())
    except (OSError, ValueError, StopIteration):
        return None


_Request = tuple[bytes, int, bytes | None]
"""A frame that waits for its turn: whose (ROUTER's identity), by which connection, and the frame; None: not a single
frame, which is refused."""


class _Port:
    """libzmq's socket, and what is known of its connections."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], descriptors: int, memory: Memory) -> None:
        self.connections = Connections(descriptors)
        self.turns: Turns[_Request] = Turns()
        self.socket = context.socket(zmq.ROUTER)
        self._send = super(zmq.Socket, self.socket).send  # zmq.Socket's adds only what draft sockets need
        self.monitor = context.socket(zmq.PAIR)
        self._memory = memory
        self._over_memory_since: float | None = None
        self._trim_at = 0.0
        self._descriptors: dict[bytes, int] = {}
        """Of each peer, by the identity that ROUTER gave it."""
        self._identities: dict[int, bytes] = {}
        self._waiting: set[bytes] = set()
        """Peers with a request in ``turns``: one at a time, as REQ sends them."""
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME),
            (zmq.RCVHWM, QUEUE_MAX),
            (zmq.SNDHWM, QUEUE_MAX),
            (zmq.HANDSHAKE_IVL, 3000),
            # A peer that vanished without a word is noticed in five minutes.
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, 120),
            (zmq.TCP_KEEPALIVE_INTVL, 60),
            (zmq.TCP_KEEPALIVE_CNT, 3),
        ):
            self.socket.setsockopt(option, value)
        self.socket.monitor("inproc://port", zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.monitor.setsockopt(zmq.RCVHWM, 0)  # libzmq's own thread would wait for room
        self.monitor.connect("inproc://port")
        self.descriptor, self.monitor_descriptor = (int(each.get(zmq.FD)) for each in (self.socket, self.monitor))

    def close(self) -> None:
        self.socket.monitor(None, 0)
        self.monitor.close()
        self.socket.close()

    # ---- connections -------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take in which connections came and went."""
        while _readable(self.monitor):
            event, descriptor = _MONITOR_EVENT.unpack_from(self.monitor.recv_multipart()[0])
            if event == _ACCEPTED:
                self._forget(descriptor)
                self.drop(self.connections.accepted(descriptor, _source(descriptor), time.monotonic()))
            elif event in _ENDED:
                self._forget(descriptor)

    def _forget(self, descriptor: int) -> None:
        self.connections.closed(descriptor)
        identity = self._identities.pop(descriptor, None)
        if identity is not None:
            del self._descriptors[identity]

    def drop(self, descriptors: Iterable[int]) -> int:
        """Shut connections down; libzmq closes them. Returns how many."""
        dropped = 0
        for descriptor in descriptors:
            if descriptor < 0:
                continue
            _libc.shutdown(descriptor, sockets.SHUT_RDWR)
            self._forget(descriptor)
            dropped += 1
        return dropped

    # ---- frames ------------------------------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Have all frames that have come wait for their turns."""
        receive, get = self.socket.recv, self.socket.get
        while True:
            try:
                identity = receive(_NOBLOCK)
            except zmq.Again:
                return
            descriptor = self._descriptors.get(identity)
            if descriptor is None:
                # Of the identity, libzmq 4.3.4 does not tell the descriptor; of the delimiter that follows it does.
                first = receive(copy=False)
                descriptor, delimiter = self._meet(identity, _descriptor(first)), first.bytes
            else:
                delimiter = receive()
            frames = []
            while get(_RCVMORE):
                frames.append(receive())
            key, connection = None, self.connections.get(descriptor)
            if connection is not None:
                key = connection.key
                connection.taken += sum(map(len, frames))
            if identity in self._waiting or delimiter or not _has_read(descriptor, connection):
                # It speaks no REQ: it did not wait for a reply, or sent no delimiter.
                self.drop([descriptor])
            else:
                self._waiting.add(identity)
                self.turns.put(key, (identity, descriptor, frames[0] if len(frames) == 1 else None))
            if not self.readable():
                return

    def readable(self) -> bool:
        """Whether a frame has come."""
        return _readable(self.socket)

    def _meet(self, identity: bytes, descriptor: int) -> int:
        """A peer's first frame: whose connection it came by."""
        if descriptor not in self.connections:
            self.follow()  # its arrival may not have been told yet
        if descriptor not in self.connections:
            return -1
        old = self._identities.get(descriptor)
        if old is not None:
            del self._descriptors[old]
        self._descriptors[identity], self._identities[descriptor] = descriptor, identity
        return descriptor

    def answer(self, sessions: Sessions, serve: Callable[[bytes, bytes], bytes]) -> None:
        """Answer the request whose turn it is."""
        identity, descriptor, frame = self.turns.take()
        self._waiting.discard(identity)
        if frame is None:
            reply, event, key = refusal(Reason.MALFORMED), Event.REFUSED, None
        else:
            try:
                reply, outcome, key = sessions.handle(frame, serve)
                event = _OUTCOMES[outcome]
            except Exception:  # the log shows it, and the next request may fare better
                _log.exception("a request failed; its session goes on")
                reply, event, key = refusal(Reason.FAULT), Event.REFUSED, None
        # To a peer that has gone, or reads nothing, ROUTER sends nothing.
        self._send(identity, _SNDMORE)
        self._send(b"", _SNDMORE)
        self._send(reply)
        self.drop(self.connections.heard(descriptor, event, key, time.monotonic()))
        if len(reply) >= OWED_MIN and descriptor in self.connections:
            self.connections[descriptor].owed = len(reply)

    # ---- bounds ------------------------------------------------------------------------------------------------------

    @property
    def check_s(self) -> float:
        """Seconds until `check` is due again."""
        return CHECK_S if self.connections.waiting or self._over_memory_since is not None else IDLE_CHECK_S

    @property
    def watchful(self) -> bool:
        """Whether there is anything to check."""
        return len(self.connections) > 0 or self._trim_at > 0 or self._over_memory_since is not None

    def check(self) -> None:
        """Drop peers that took too long to prove themselves, sent too much, or read too little."""
        now = time.monotonic()
        self.drop(self.connections.due(now))
        if self._trim_at and now >= self._trim_at:
            self._memory.trim()
            self._trim_at = 0.0
        if self.drop([at for at in self.connections.unproven() if _received(at) > UNPROVEN_BYTES]):
            self._trim_at = now + TRIM_S
        if self.connections.owed > OWED_MAX:
            for descriptor in self.connections.in_debt():
                _has_read(descriptor, self.connections[descriptor])
            if self.connections.owed > OWED_MAX:
                self.drop(self.connections.deepest_in_debt())
        self._save_memory(now)

    def _save_memory(self, now: float) -> None:
        """Above the limit, drop those who proved nothing, then those for whom most is kept, then all."""
        before = self._memory.resident()
        if before <= self._memory.most:
            self._over_memory_since = None
            return
        if self._over_memory_since is None:
            self._over_memory_since = now
        over_s = now - self._over_memory_since
        dropped = self.drop(self.connections.unproven())
        if over_s >= 2 * CHECK_S:
            dropped += self.drop(self.connections.deepest_in_debt())
            kept = {at: _received(at) - self.connections[at].taken for at in self.connections}
            most = max(kept.values(), default=0)
            dropped += self.drop([at for at, bytes_ in kept.items() if bytes_ > UNPROVEN_BYTES and bytes_ == most])
        if over_s >= 20 * CHECK_S:
            dropped += self.drop(list(self.connections))
            self._over_memory_since = now
        self._memory.trim()
        if dropped:
            _log.warning(
                "%d MiB of memory are in use, more than %d: closed %d connections that took most of it",
                before >> 20, self._memory.most >> 20, dropped,
            )  # fmt: skip


def serve(
    listener: Listener | str,
    sessions: Sessions,
    answer: Callable[[bytes, bytes], bytes],
    *,
    stop: threading.Event | int | None = None,
    watched: Collection[int] = (),
    confine: Callable[[], None] | None = None,
    ready: Callable[[str], None] | None = None,
    between: Callable[[], None] | None = None,
    descriptors: int = 1024,
) -> None:
    """Answer requests at an endpoint, one at a time, until ``stop``, SIGTERM or SIGINT; then return.

    Every frame gets an answer, if only a refusal. An exception of ``answer`` or ``between`` is logged with its
    traceback, and the loop goes on.

    :param listener: where; or the endpoint, to be bound now
    :param answer: from session id and request to reply; called for authentic requests only
    :param stop: ends the loop once it is set (looked at ten times a second), or once there is something to read from
        this file descriptor (at once); it may be left out in the main thread, which heeds signals
    :param watched: more file descriptors that end the loop once there is something to read
    :param confine: called when all threads run and no peer can have sent anything
    :param ready: called once with the endpoint that is listened at
    :param between: called after each reply has been handed to the network, for work ahead of the next request
    :param descriptors: how many may be spent on connections
    :raises LinkError: the endpoint cannot be listened at
    """
    if isinstance(listener, str):
        listener = Listener(listener)
    with contextlib.closing(listener), contextlib.closing(Memory()) as memory, zmq.Context() as context:
        port = _Port(context, descriptors, memory)
        with contextlib.closing(port), _signals() as wake:
            if confine is not None:
                confine()
            port.socket.setsockopt(zmq.USE_FD, listener.listen())
            port.socket.bind(listener.endpoint)
            ends = {end for end in (wake, stop, *watched) if isinstance(end, int)}
            waiting = select.poll()
            for descriptor in (port.descriptor, port.monitor_descriptor, *ends):
                waiting.register(descriptor, select.POLLIN)
            event = stop if isinstance(stop, threading.Event) else None
            if ready is not None:
                ready(listener.endpoint)
            port.follow()
            checked, more = time.monotonic(), True
            while event is None or not event.is_set():
                patience_ms = 0 if more else _patience_ms(port, event, checked)
                happened = dict(waiting.poll(patience_ms))
                if not ends.isdisjoint(happened):
                    return
                if port.monitor_descriptor in happened:
                    port.follow()
                if more or port.descriptor in happened:
                    port.take_in()
                if port.turns:
                    port.answer(sessions, answer)
                    if between is not None:
                        try:
                            between()
                        except Exception:  # as in `_Port.answer`
                            _log.exception("work between two requests failed")
                more = bool(port.turns) or port.readable()
                if time.monotonic() - checked >= port.check_s:
                    port.check()
                    checked = time.monotonic()


def _descriptor(frame: zmq.Frame) -> int:
    """The connection that a frame came by; -1 if libzmq does not know, as of a peer that left before it was named."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def _patience_ms(port: _Port, stop: threading.Event | None, checked: float) -> int | None:
    """How long to wait for something to happen, None: until it does."""
    waits = [_STOP_CHECK_MS] if stop is not None else []
    if port.watchful:
        waits.append(max(1, int(1000 * (checked + port.check_s - time.monotonic()))))
    return min(waits, default=None)


def _source(descriptor: int) -> str:
    """The address that a connection comes from, as it is counted by: of IPv6 the /64 that one customer has."""
    with contextlib.suppress(OSError, ValueError):
        one = sockets.socket(fileno=descriptor)
        try:
            if one.family in (sockets.AF_INET, sockets.AF_INET6):
                address = ipaddress.ip_address(one.getpeername()[0].partition("%")[0])
                if isinstance(address, ipaddress.IPv6Address):
                    if address.ipv4_mapped is not None:
                        return str(address.ipv4_mapped)
                    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
                return str(address)
        finally:
            one.detach()
    return ""


def _received(descriptor: int) -> int:
    """Bytes that came by a TCP connection; 0 for another, or one that has ended."""
    with contextlib.suppress(OSError):
        one = sockets.socket(fileno=descriptor)
        try:
            if one.family in (sockets.AF_INET, sockets.AF_INET6):
                info = one.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _TCP_INFO_BYTES_RECEIVED + 8)
                if len(info) >= _TCP_INFO_BYTES_RECEIVED + 8:
                    return int.from_bytes(info[_TCP_INFO_BYTES_RECEIVED:], "little")
        finally:
            one.detach()
    return 0


def _has_read(descriptor: int, connection: Connection | None) -> bool:
    """Whether a peer that asks again has read the reply before."""
    if connection is None or not connection.owed:
        return True
    if not _unread(descriptor):
        connection.owed = 0
    return not connection.owed


def _unread(descriptor: int) -> int:
    """Bytes sent by a connection that its peer has not taken."""
    with contextlib.suppress(OSError):
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), "little")
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[int | None]:
    """A descriptor that has something to read once the process was told to end; None outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    reads, writes = sockets.socketpair()
    with reads, writes:
        writes.setblocking(False)
        # The handlers do nothing: a signal's mark is the byte that Python writes to the descriptor.
        before = [(number, signal.signal(number, lambda *_: None)) for number in _SIGNALS]
        wakeup = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        try:
            yield reads.fileno()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before:
                signal.signal(number, handler)
