"""A process as an intruder could make it, to escape who looks at main threads only. Runs as a program of its own.

Its main thread has exited; of the others, one has a file table of its own (``unshare(CLONE_FILES)``), one has
credentials of its own. Prints the ports that it listens on as JSON; ends with its standard input.

    thread_group.py [DESCRIPTOR]: the number to which the own table's listener is moved
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import socket
import sys
import threading

CLONE_FILES = 0x400
SYS_EXIT, SYS_SETRESUID = 60, 117
"""Of x86-64."""

libc = ctypes.CDLL(None, use_errno=True)
ready = threading.Barrier(3, timeout=20)
ports: dict[str, int] = {}
kept: list[socket.socket | int] = []


def listen(name: str) -> socket.socket:
    """A listener on a free port."""
    made = socket.create_server(("127.0.0.1", 0))
    ports[name] = made.getsockname()[1]
    kept.append(made)
    return made


def with_own_files() -> None:
    """Listens in a table that no other thread has."""
    assert libc.unshare(CLONE_FILES) == 0
    made = listen("own")
    if len(sys.argv) > 1:
        number = int(sys.argv[1])
        hard = max(number + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, hard))
        kept.append(fcntl.fcntl(made, fcntl.F_DUPFD, number))
        made.close()
    ready.wait()
    os.read(0, 1)
    os._exit(0)


def with_own_credentials() -> None:
    """Is another user."""
    assert libc.syscall(SYS_SETRESUID, 1000, 1000, 1000) == 0
    ready.wait()
    threading.Event().wait()


if __name__ == "__main__":
    threads = [threading.Thread(target=target) for target in (with_own_files, with_own_credentials)]
    for thread in threads:
        thread.start()
    listen("shared")
    ready.wait()
    print(json.dumps(ports), flush=True)
    libc.syscall(SYS_EXIT, 0)  # not exit(3), which ends the whole process
