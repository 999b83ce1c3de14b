"""Plant connected TCP sockets: ``plant_sockets.py PAIRS`` prints the pid that keeps them and their port, once they are
there. Each pair is two sockets of the kernel's hash."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys


def main() -> None:
    """Connect, go on in the background."""
    pairs = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * pairs + 64,) * 2)
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)
    kept = [
        end for _ in range(pairs) for end in (socket.create_connection(listener.getsockname()), listener.accept()[0])
    ]
    keeper = os.fork()
    if keeper:
        print(keeper, listener.getsockname()[1], flush=True)
        os._exit(0)  # the child has the sockets
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    while kept:
        signal.pause()


if __name__ == "__main__":
    main()
