"""A relay between IDSs and an agent in an attacker's hands: whole frames go through the attacker's function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Self

import zmq

PATIENCE_MS = 10_000
"""How long an agent may take to answer."""

Meddle = Callable[[bytes, Callable[[bytes], bytes]], Sequence[bytes]]
"""Takes a frame from an IDS and the function that asks the agent; returns the frames that the IDS gets."""


def honest(frame: bytes, ask: Callable[[bytes], bytes]) -> Sequence[bytes]:
    """Forward the frame, and the answer back."""
    return [ask(frame)]


class Relay:
    """A forwarder of frames, in a thread of its own.

    :param agent: the agent's endpoint
    :param meddle: what becomes of a frame
    :param address: where to listen
    :ivar endpoint: where it listens
    :ivar failed: what `meddle` raised, if it did: the relay ends there
    """

    def __init__(self, agent: str, meddle: Meddle = honest, address: str = "tcp://127.0.0.1") -> None:
        self.failed: BaseException | None = None
        self._context = zmq.Context()
        self._near = self._context.socket(zmq.ROUTER)
        self._far = self._context.socket(zmq.REQ)
        for each in (self._near, self._far):
            each.setsockopt(zmq.LINGER, 0)
        self._far.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        self.endpoint = f"{address}:{self._near.bind_to_random_port(address)}"
        self._far.connect(agent)
        self._meddle = meddle
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _ask(self, frame: bytes) -> bytes:
        self._far.send(frame)
        return self._far.recv()

    def _run(self) -> None:
        with self._near, self._far:
            while True:
                *envelope, frame = self._near.recv_multipart()
                if frame == b"end":
                    return
                try:
                    replies = self._meddle(frame, self._ask)
                except BaseException as error:
                    self.failed = error
                    return
                for reply in replies:
                    self._near.send_multipart([*envelope, reply])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._context.socket(zmq.DEALER) as end:
            end.setsockopt(zmq.LINGER, 0)
            end.connect(self.endpoint)
            end.send(b"end")
            self._thread.join(PATIENCE_MS / 1000 + 1)
        assert not self._thread.is_alive(), "the relay does not end"
        self._context.term()
