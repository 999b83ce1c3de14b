"""Flood an agent as anyone who reaches its port can, while an IDS's session must still be answered."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from struct import pack

import zmq

from trials.hostile import Saboteur, resident
from trials.hostile.peer import Peer
from trials.hostile.sockets import TEXT, Agent
from vmishim.client import Remote
from vmishim.errors import LinkError
from vmishim.wire.keys import generate
from vmishim.wire.session import MAX_FRAME, Initiator

# ZMTP 3.0 (https://rfc.zeromq.org/spec/23/): a greeting for the NULL mechanism, and the command that follows it.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\0NULL".ljust(23, b"\0") + bytes(32)
_READY = b"\x04\x26\x05READY\x0bSocket-Type" + pack(">I", 3) + b"REQ\x08Identity" + pack(">I", 0)
_MORE, _LONG = 1, 2


@dataclass
class Pressed:
    """How the session and the agent fared under a flood.

    :ivar sent: what was poured in
    :ivar answers: right answers of the session meanwhile
    :ivar wrong: wrong ones, and errors
    :ivar before: the agent's memory, KiB; then its most during the flood, and after it
    """

    sent: str
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    before: int = 0
    most: int = 0
    after: int = 0

    def __str__(self) -> str:
        middle, longest = statistics.median(self.latencies) * 1000, max(self.latencies) * 1000
        return (
            f"{self.sent}: {self.answers:,} right answers, {len(self.wrong)} others; median {middle:.1f} ms, longest "
            f"{longest:.0f} ms; agent's memory {self.before:,} -> {self.most:,} -> {self.after:,} KiB"
        )


def flood(agent: Agent, pour: Callable[[Agent], str]) -> Pressed:
    """Flood the agent while a session keeps asking.

    :param pour: does it, and says what it was
    """
    stop = threading.Event()
    pressed = Pressed("", before=resident(agent.pid))

    def ask_on() -> None:
        with agent.link(timeout=20.0) as link:
            remote = Remote(link.exchange)
            (code,) = remote.symbols(["vsnprintf"])
            assert code is not None
            truth = remote.read(code, TEXT)
            ready.set()
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    if remote.read(code, TEXT) == truth:
                        pressed.answers += 1
                    else:
                        pressed.wrong.append("memory read during the flood differs from before")
                except LinkError as error:
                    pressed.wrong.append(str(error))
                pressed.latencies.append(time.monotonic() - begun)
                pressed.most = max(pressed.most, resident(agent.pid))
            if link.handshakes != 1:
                pressed.wrong.append(f"{link.handshakes} handshakes: the session did not live on")

    ready = threading.Event()
    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        assert ready.wait(20)
        pressed.sent = pour(agent)
    finally:
        stop.set()
        asking.join()
    pressed.after = resident(agent.pid)
    return pressed


def handshakes(agent: Agent, connections: int = 50, each: int = 60) -> str:
    """Hellos of strangers, replayed ones, altered ones and garbage, from many connections at once."""
    saboteur = Saboteur(1)
    strangers = generate()
    hellos = [Initiator(agent.key, agent.public).hello(), Initiator(strangers, agent.public).hello()]
    saboteur.seen += hellos
    with zmq.Context() as context, ExitStack() as stack:
        peers = [stack.enter_context(Peer(context, agent.endpoint, patience_s=60.0)) for _ in range(connections)]
        for number in range(each):
            for peer in peers:
                hello = hellos[number % 2]
                peer.send(hello if number % 3 else saboteur.altered(hello)[1])
            for peer in peers:
                peer.recv()
    return f"{connections * each:,} handshakes of {connections} connections"


def half_open(agent: Agent, connections: int = 2000) -> str:
    """Connections that send nothing, or stop in the middle of their greeting; as many as the agent accepts."""
    held: list[socket.socket] = []
    with ExitStack() as stack:
        with suppress(OSError):
            while len(held) < connections:
                held.append(stack.enter_context(connected(agent, timeout=4.0)))
                held[-1].sendall(_GREETING[: len(held) % 64])
        time.sleep(1.0)  # how long they stay open
    return f"{len(held):,} half-open connections"


def oversize(agent: Agent, connections: int = 50) -> str:
    """Frames that claim illegal sizes, up to 2^63 bytes, and frames of the longest legal size that never end."""
    with ExitStack() as stack:
        for number in range(connections):
            one = stack.enter_context(_greeted(agent))
            size = (MAX_FRAME + 1, 1 << 40, (1 << 63) - 1, MAX_FRAME)[number % 4]
            with suppress(OSError):
                one.sendall(bytes([_LONG]) + pack(">Q", size) + bytes(100_000))
        time.sleep(1.0)
    return f"oversize or unfinished frames of {connections} connections"


def connected(agent: Agent, timeout: float = 10.0) -> socket.socket:
    """A connection to the agent's port. :raises OSError: the agent did not accept it in time"""
    host, _, port = agent.endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


@contextmanager
def _greeted(agent: Agent) -> Iterator[socket.socket]:
    """A connection past its greeting, on which messages can be sent."""
    with connected(agent) as one:
        one.sendall(_GREETING + _READY)
        said = b""
        while b"ROUTER" not in said:  # sending before the other end is ready violates the protocol
            came = one.recv(1000)
            if not came:
                raise ConnectionResetError("the agent closed the connection")
            said += came
        one.sendall(bytes([_MORE, 0]))  # an envelope's delimiter; then come the frames
        yield one


@dataclass
class Newcomers:
    """How new sessions fared while an agent's port was pressed.

    :ivar seconds: how long each took from its connection to its first answer
    :ivar failed: what those met that did not get in
    """

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        if not ordered:
            return f"no new session got in: {self.failed[:1]}"
        middle, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        return (
            f"{len(ordered)} new sessions in {middle * 1000:.0f} ms (median), {late * 1000:.0f} ms (p99); "
            f"{len(self.failed)} failed"
        )


def newcomers(agent: Agent, count: int, endpoint: str = "", timeout: float = 5.0) -> Newcomers:
    """Make ``count`` new sessions, one after the other, each with one question."""
    outcome = Newcomers()
    for _ in range(count):
        begun = time.monotonic()
        try:
            with agent.link(endpoint, timeout) as link:
                assert Remote(link.exchange).symbols(["vsnprintf"]) != [None]
            outcome.seconds.append(time.monotonic() - begun)
        except LinkError as error:
            outcome.failed.append(str(error))
    return outcome


class Idle:
    """Connections that greeted as ZeroMQ does, and say nothing more. What the agent closes is opened again at once.

    :param connections: how many are held
    """

    def __init__(self, agent: Agent, connections: int) -> None:
        self._agent, self._most = agent, connections
        self._held: list[socket.socket] = []
        self._stop = threading.Event()
        self.opened = self.closed = 0
        self._thread = threading.Thread(target=self._hold)

    def __enter__(self) -> Idle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._held:
            one.close()

    @property
    def full(self) -> bool:
        """Whether as many were opened as are to be held."""
        return self.opened >= self._most

    def _hold(self) -> None:
        while not self._stop.is_set():
            if len(self._held) < self._most:
                with suppress(OSError):
                    one = connected(self._agent, timeout=1.0)
                    one.sendall(_GREETING + _READY)
                    one.setblocking(False)
                    self._held.append(one)
                    self.opened += 1
            if len(self._held) >= self._most or self.opened % 50 == 0:
                self._held = [one for one in self._held if self._open(one)]

    def _open(self, one: socket.socket) -> bool:
        try:
            while one.recv(1000):
                pass
        except BlockingIOError:
            return True
        except OSError:
            pass
        one.close()
        self.closed += 1
        return False


class Replayed:
    """Recorded hellos of a permitted IDS, sent again and again from connections of their own.

    :param hellos: the recordings
    :param rate: how many a second
    """

    def __init__(self, agent: Agent, hellos: list[bytes], rate: float) -> None:
        self._agent, self._hellos, self._rate = agent, hellos, rate
        self._stop = threading.Event()
        self.sent = 0
        self._thread = threading.Thread(target=self._replay)

    def __enter__(self) -> Replayed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _replay(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as one:
            one.setsockopt(zmq.LINGER, 0)
            one.setsockopt(zmq.SNDTIMEO, 100)
            one.setsockopt(zmq.RCVTIMEO, 200)  # the agent closes what proves nothing
            one.setsockopt(zmq.RECONNECT_IVL, 10)
            one.connect(self._agent.endpoint)
            begun = time.monotonic()
            while not self._stop.is_set():
                with suppress(zmq.Again):
                    one.send_multipart([b"", self._hellos[self.sent % len(self._hellos)]])
                    self.sent += 1
                    one.recv_multipart()
                self._stop.wait(max(0.0, begun + self.sent / self._rate - time.monotonic()))


class Pouring:
    """Messages without an end, poured into the agent's port from several connections for as long as the block lasts."""

    def __init__(self, agent: Agent, connections: int = 4) -> None:
        self._agent = agent
        self._stop = threading.Event()
        self.bytes_poured = 0
        self._threads = [threading.Thread(target=self._pour) for _ in range(connections)]

    def __enter__(self) -> Pouring:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _pour(self) -> None:
        part = bytes([_LONG | _MORE]) + pack(">Q", 1 << 20) + bytes(1 << 20)
        while not self._stop.is_set():
            with suppress(OSError), _greeted(self._agent) as one:
                one.settimeout(1.0)
                while not self._stop.is_set():
                    one.sendall(part)
                    self.bytes_poured += len(part)
