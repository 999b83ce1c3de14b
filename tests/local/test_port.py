"""What anyone who reaches an agent's port can do to it: sessions go on, new ones get in, memory stays bounded."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from bench.delay import delayed
from guest_agent.connections import SILENT_PER_SOURCE
from guest_agent.serve import MEMORY_MAX
from tests.until import until
from trials.hostile import flood, resident
from trials.hostile.peer import Peer
from trials.hostile.port import listening
from trials.hostile.sockets import Agent
from vmishim.client import Remote
from vmishim.link import Link
from vmishim.wire.keys import generate
from vmishim.wire.messages import BULK_MAX, Read, encode
from vmishim.wire.session import Initiator, Session

NEW = 20
"""Sessions that are made while the port is pressed."""


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))  # of this process, which floods
    with listening() as one:
        yield one
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_eleven_hundred_idle_connections_lock_out_no_new_session(agent: Agent) -> None:
    with agent.link() as live:
        remote = Remote(live.exchange)
        remote.symbols(["vsnprintf"])
        with flood.Idle(agent, 1100) as idle:
            until(lambda: idle.full, what="1,100 greeted connections")
            outcome = flood.newcomers(agent, NEW)
            assert remote.symbols(["vsnprintf"]) != [None]
            assert live.handshakes == 1
        print(outcome, f"{idle.opened} opened, {idle.closed} closed")
    assert outcome.failed == []
    assert idle.closed >= idle.opened - 1100


def test_idle_connections_of_one_source_are_closed(agent: Agent) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(flood.connected(agent)) for _ in range(SILENT_PER_SOURCE + 50)]
        for one in held:
            one.setblocking(False)
        until(lambda: sum(map(_closed, held)) == len(held), what="the agent to close all of them")


def _closed(one: socket.socket) -> bool:
    try:
        while one.recv(1000):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize("round_trip_ms", [0, 50, 100])
@pytest.mark.parametrize("known", [False, True], ids=["agent just started", "agent knows the IDS"])
def test_replayed_hellos_lock_out_no_new_session(round_trip_ms: int, known: bool) -> None:
    with ExitStack() as stack:
        agent = stack.enter_context(listening())
        recorded = [Initiator(agent.key, agent.public).hello() for _ in range(200)]
        if known:
            assert flood.newcomers(agent, 1).failed == []
        endpoint = agent.endpoint
        if round_trip_ms:
            endpoint = stack.enter_context(delayed(int(endpoint.rpartition(":")[2]), round_trip_ms / 1000))
        replayed = stack.enter_context(flood.Replayed(agent, recorded, rate=400))
        until(lambda: replayed.sent >= 100, what="100 replayed hellos")
        outcome = flood.newcomers(agent, NEW, endpoint)
        print(round_trip_ms, "ms:", outcome, f"{replayed.sent} replayed")
        assert outcome.failed == []


def test_messages_without_an_end_neither_end_the_agent_nor_fill_it(agent: Agent) -> None:
    most = 0
    with agent.link(timeout=20.0) as live, flood.Pouring(agent) as pouring:
        remote = Remote(live.exchange)
        answers = 0
        while pouring.bytes_poured < 2 << 30:
            assert remote.symbols(["vsnprintf"]) != [None]
            answers += 1
            most = max(most, resident(agent.pid))
        assert live.handshakes == 1
    print(f"{pouring.bytes_poured >> 20} MiB poured, {answers} answers, at most {most >> 10} MiB resident")
    assert most << 10 < MEMORY_MAX + (256 << 20)
    until(lambda: resident(agent.pid) << 10 < MEMORY_MAX // 2, what="the agent to give memory back")
    assert flood.newcomers(agent, 3).failed == []


class Rude:
    """A peer with a permitted key that speaks to the agent's port as it likes."""

    def __init__(self, agent: Agent, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.connect(agent.endpoint)
        initiator = Initiator(agent.key, agent.public)
        self.session: Session = initiator.finish(self.ask(initiator.hello()))

    def send(self, frame: bytes) -> None:
        self.socket.send_multipart([b"", frame])

    def ask(self, frame: bytes) -> bytes:
        self.send(frame)
        return self.socket.recv_multipart()[1]


def test_replies_that_nobody_reads_are_bounded(agent: Agent) -> None:
    with agent.link() as link:
        (code,) = Remote(link.exchange).symbols(["_text"])
        assert code is not None
        before = resident(agent.pid)
        with zmq.Context() as context:
            peers = [Rude(agent, context) for _ in range(40)]
            for peer in peers:
                for _ in range(4):  # it does not wait for a reply, let alone read one
                    peer.send(peer.session.seal(encode(Read(0, code, BULK_MAX))))
            for _ in range(50):
                assert Remote(link.exchange).symbols(["vsnprintf"]) != [None]
                assert resident(agent.pid) - before < 128 << 10
            for peer in peers:
                peer.socket.close()


def test_a_new_ids_gets_in_where_descriptors_are_few() -> None:
    """The hard limit is below what the agent would like: it keeps fewer connections, and some descriptors free."""
    with listening(descriptors=150) as few:
        with few.link() as live, flood.Idle(few, 200):
            remote = Remote(live.exchange)
            for _ in range(20):
                assert remote.symbols(["vsnprintf"]) != [None]
            assert live.handshakes == 1
        with Link(few.endpoint, few.key, few.public, 20.0) as fresh:
            assert Remote(fresh.exchange).symbols(["vsnprintf"]) != [None]


def test_a_stranger_with_a_key_of_its_own_gets_a_refusal_and_no_place(agent: Agent) -> None:
    with zmq.Context() as context, Peer(context, agent.endpoint) as stranger:
        answer = stranger.ask(Initiator(generate(), agent.public).hello())
        assert len(answer) == 19  # a refusal: a header and its reason
