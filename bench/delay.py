"""A slow network: forwards TCP, and holds everything back for half a round trip in each direction.

``delay.py PORT SECONDS`` forwards one connection after the other to PORT on the loopback, until standard input ends; it
prints the port it listens at. SECONDS are a round trip's. What the forwarding itself costs comes on top: the caller
measures it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from time import monotonic


@contextlib.contextmanager
def delayed(port: int, seconds: float) -> Iterator[str]:
    """The ZeroMQ endpoint of a delayed path to ``port``, until the block ends."""
    command = [sys.executable, "-I", __file__, str(port), repr(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        yield f"tcp://127.0.0.1:{int(child.stdout.readline())}"


class Lane:
    """One direction of a connection: what was received, each part with the time it is due."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        self.source, self.target, self._delay = source, target, delay
        self._waiting: deque[tuple[float, bytes]] = deque()

    @property
    def due(self) -> float:
        return self._waiting[0][0] if self._waiting else float("inf")

    def take(self) -> bool:
        """Receive; False at the end."""
        data = self.source.recv(1 << 20)
        self._waiting.append((monotonic() + self._delay, data))
        return bool(data)

    def give(self) -> None:
        """Send what is due."""
        while self.due <= monotonic():
            self.target.sendall(self._waiting.popleft()[1])


def forward(near: socket.socket, far: socket.socket, delay: float) -> None:
    """Carry a connection's bytes both ways until either end closes it, or standard input ends."""
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lanes = {near: Lane(near, far, delay), far: Lane(far, near, delay)}
    while True:
        left = min(lane.due for lane in lanes.values()) - monotonic()
        ready, _, _ = select.select([near, far, sys.stdin], [], [], None if left > 1e9 else max(left, 0.0))
        if sys.stdin in ready:
            raise SystemExit
        for end, lane in lanes.items():
            if end in ready and not lane.take():
                return
            lane.give()


def main() -> None:
    """See above."""
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    # Otherwise a sleep may last 50 us longer than it should (prctl(2), PR_SET_TIMERSLACK).
    Path("/proc/self/timerslack_ns").write_text("1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
            with near, far, contextlib.suppress(ConnectionError):
                forward(near, far, seconds / 2)


if __name__ == "__main__":
    main()
