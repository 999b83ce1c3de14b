"""A relay between IDSs and an agent in an attacker's hands: whole frames go through the attacker's function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Self

import zmq

from trials.hostile.peer import PATIENCE_S, Peer

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
        self._near.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"{address}:{self._near.bind_to_random_port(address)}"
        self._far = Peer(self._context, agent)
        self._meddle = meddle
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._near, self._far:
            while True:
                *envelope, frame = self._near.recv_multipart()
                if frame == b"end":
                    return
                try:
                    replies = self._meddle(frame, self._far.ask)
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
            self._thread.join(PATIENCE_S + 1)
        assert not self._thread.is_alive(), "the relay does not end"
        self._context.term()
