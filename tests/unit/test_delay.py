"""The benchmark's forwarder with a delay."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack

import pytest

from bench.delay import Lane, delayed


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_lane_gives_what_is_due_and_nothing_else(seconds: float) -> None:
    with ExitStack() as ends:
        (near, source), (target, far) = ([ends.enter_context(end) for end in socket.socketpair()] for _ in range(2))
        lane = Lane(source, target, seconds)
        near.sendall(b"there")
        assert lane.take()
        lane.give()
        assert bool(select.select([far], [], [], 0)[0]) is (not seconds)
        if not seconds:
            assert far.recv(64) == b"there"
        near.close()
        assert not lane.take()


def test_a_delayed_connection_changes_no_bytes() -> None:
    sent = bytes(range(256)) * 256
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as ends:
        endpoint = ends.enter_context(delayed(listener.getsockname()[1], 1e-3))
        near = ends.enter_context(socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))))
        far = ends.enter_context(listener.accept()[0])
        for one, other in ((near, far), (far, near)):
            one.sendall(sent)
            assert other.makefile("rb").read(len(sent)) == sent
