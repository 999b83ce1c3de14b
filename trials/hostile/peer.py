"""A peer that asks an agent as an IDS does, also when the agent closes its connection."""

from __future__ import annotations

import time
from typing import Self

import zmq

PATIENCE_S = 10.0
"""How long an agent may take to answer."""


class Peer:
    """Sends frames to an agent, one at a time, and gets an answer to each.

    An agent closes connections that prove nothing (`guest_agent.connections`), and what it had to answer is lost with
    them. A REQ socket waits for that answer for ever. A peer asks again, over a new connection.

    :param endpoint: the agent's
    :param patience_s: seconds to wait for an answer, over however many connections
    :ivar connections: how many it has made
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, patience_s: float = PATIENCE_S) -> None:
        self._context, self._endpoint, self._patience_s = context, endpoint, patience_s
        self._asked: tuple[bytes, ...] = ()
        self.connections = 0
        self._connect()

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._endpoint)
        self.connections += 1

    def send(self, *parts: bytes) -> None:
        """Ask, in one or more parts; `recv` gets the answer."""
        if self._monitor.poll(0):
            self._again()
        self._asked = parts
        self._socket.send_multipart(parts)

    def recv(self) -> bytes:
        """The answer to what was sent. :raises zmq.Again: none came in time"""
        until = time.monotonic() + self._patience_s
        poller = zmq.Poller()
        while True:
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._monitor, zmq.POLLIN)
            happened = dict(poller.poll(max(0, int(1000 * (until - time.monotonic())))))
            if self._socket in happened:
                return self._socket.recv()
            if not happened:
                raise zmq.Again
            poller.unregister(self._socket)
            poller.unregister(self._monitor)
            self._again()
            self._socket.send_multipart(self._asked)

    def ask(self, *parts: bytes) -> bytes:
        """The answer to what is asked. :raises zmq.Again: none came in time"""
        self.send(*parts)
        return self.recv()

    def _again(self) -> None:
        """A new connection: the agent closed the one before."""
        self.close()
        self._connect()

    def close(self) -> None:
        """Let go of the agent."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
