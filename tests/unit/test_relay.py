"""What stands between IDSs and an agent in tests: a relay, and peers whose connections the agent closes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.until import until
from trials.hostile.peer import Peer
from trials.hostile.relay import Relay


class Closing:
    """An agent's port that closes connections instead of answering, as an agent does to peers that prove nothing.

    :param endpoint: where it listens
    :param closes: how many requests it closes the connection of, before it echoes
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, closes: int) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(endpoint)
        self.closes = closes
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._socket:
            while True:
                identity, delimiter, frame = self._socket.recv_multipart(copy=False)
                if self.closes > 0:
                    self.closes -= 1
                    with socket.socket(fileno=os.dup(int(delimiter.get(zmq.SRCFD)))) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
                    continue
                self._socket.send_multipart([identity, b"", frame])
                if frame.bytes == b"end":
                    return

    def close(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        """End it."""
        with Peer(context, endpoint) as last:
            last.ask(b"end")
        self._thread.join()


@pytest.fixture(params=[0, 1, 3])
def closing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The endpoint of a `Closing`, and how many connections it closes."""
    endpoint = f"ipc://{tmp_path}/agent"
    with zmq.Context() as context:
        port = Closing(context, endpoint, request.param)
        yield endpoint, request.param
        port.closes = 0
        port.close(context, endpoint)


def test_a_relay_asks_again_when_the_agent_closes_its_connection(closing: tuple[str, int]) -> None:
    endpoint, _ = closing
    with zmq.Context() as context, Relay(endpoint) as relay, Peer(context, relay.endpoint) as peer:
        assert peer.ask(b"1") == b"1"
        assert peer.ask(b"2") == b"2"
        assert relay.failed is None


def test_a_peer_asks_again_when_the_agent_closes_its_connection(closing: tuple[str, int]) -> None:
    endpoint, closes = closing
    with zmq.Context() as context, Peer(context, endpoint) as peer:
        assert peer.ask(b"1") == b"1"
        assert peer.connections == closes + 1


def test_a_peer_notices_a_connection_that_was_closed_while_it_was_idle(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as port:
        port.bind(f"ipc://{tmp_path}/agent")
        with Peer(context, f"ipc://{tmp_path}/agent") as peer:
            peer.send(b"1")
            identity, delimiter, _ = port.recv_multipart(copy=False)
            port.send_multipart([identity, b"", b"1"])
            assert peer.recv() == b"1"
            with socket.socket(fileno=os.dup(int(delimiter.get(zmq.SRCFD)))) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            until(lambda: peer._monitor.poll(0), what="the peer's libzmq to notice")
            peer.send(b"2")
            assert peer.connections == 2
            port.send_multipart(port.recv_multipart())
            assert peer.recv() == b"2"


def test_a_peer_whose_agent_never_answers_gives_up(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as port:
        port.bind(f"ipc://{tmp_path}/agent")
        with Peer(context, f"ipc://{tmp_path}/agent", patience_s=0.05) as peer, pytest.raises(zmq.Again):
            peer.ask(b"1")
