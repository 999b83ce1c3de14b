"""Make processes, connections and modules come and go, and report it. Run in the guest, by the guest's own Python:

    churn.py HOST PORT SEED MODULE...

Tells the host, a line of JSON each, what it is about to do and what it has done: a number that is never used again, the
phase, and in the first line what it is ("process", "socket" or "module") and its key, in the second the entries that a
listing has to have. The first of the modules stays once it is loaded, as do the first of the others.

Something changes every now and then, and when the host says "c". It also says "s" (answer with a line, so that all that
happened before is told), "h" (hold still) and "g" (go on). It ends with the connection, and takes everything along.
"""

import contextlib
import functools
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

End = functools.partial[None]

KEPT = 5
MOST = 20
PAUSE = 0.4
"""Seconds between two changes, at most."""
LISTENER = 1
"""Number of the listener's address; each connection has one of its own."""


def address(number: int) -> str:
    return f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


class Churn:
    def __init__(self, host: socket.socket, seed: str, modules: Sequence[str]) -> None:
        self.host = host
        self.random = random.Random(seed)
        self.number = LISTENER
        self.modules = modules
        # What there is of each kind: (number, how it is ended).
        self.living: dict[str, list[tuple[int, End]]] = {"process": [], "socket": [], "module": []}
        self.begin = {"process": self.process, "socket": self.connection, "module": self.module}
        self.most = {"process": MOST, "socket": MOST, "module": len(modules)}
        self.kept = {"process": KEPT, "socket": KEPT, "module": 1}
        where = (address(LISTENER), 0)
        self.tell(LISTENER, "starting", "socket", where[0])
        self.listener = socket.create_server(where)
        self.port = self.listener.getsockname()[1]
        self.tell(LISTENER, "begun", [f"{where[0]}:{self.port}", "0.0.0.0:0", "LISTEN"])

    def tell(self, *line: object) -> None:
        self.host.sendall(json.dumps(line).encode() + b"\n")

    def run(self) -> None:
        going, due = True, 0.0
        while True:
            left = max(due - time.monotonic(), 0) if going else None
            order = b"c"
            if select.select([self.host], [], [], left)[0]:
                order = self.host.recv(1)
                if not order:
                    return
                going = order == b"g" if order in b"gh" else going
                if order == b"s":
                    self.tell("told")
            if order == b"c":
                self.change(self.random.choice(list(self.living)))
                due = time.monotonic() + self.random.uniform(0, PAUSE)

    def change(self, kind: str) -> None:
        living = self.living[kind]
        # Begins more often than it ends while there are few.
        if len(living) < self.kept[kind] or self.random.random() * self.most[kind] > len(living):
            self.number += 1
            living.append((self.number, self.begin[kind](self.number)))
        elif len(living) > self.kept[kind]:
            number, end = living.pop(self.random.randrange(self.kept[kind], len(living)))
            self.tell(number, "ending")
            end()
            self.tell(number, "ended")

    def process(self, number: int) -> End:
        name, uid = f"soak{number:09}", 100_000 + number
        self.tell(number, "starting", "process", name)
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                with open("/proc/self/comm", "w") as comm:
                    comm.write(name)
                os.setresuid(uid, uid, uid)
                # A connection lives while any process has it open.
                os.dup2(writes, 3)
                os.closerange(4, 1 << 16)
                os.write(3, b".")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writes)
        os.read(reads, 1)
        os.close(reads)
        self.tell(number, "begun", [name, pid, uid])

        return functools.partial(kill, pid)

    def connection(self, number: int) -> End:
        self.tell(number, "starting", "socket", address(number))
        near = socket.socket()
        near.bind((address(number), 0))
        near.connect((address(LISTENER), self.port))
        far = self.listener.accept()[0]
        ends = ":".join(map(str, near.getsockname())), ":".join(map(str, far.getsockname()))
        self.tell(number, "begun", [*ends, "ESTABLISHED"], [*reversed(ends), "ESTABLISHED"])

        return functools.partial(reset, near, far)

    def module(self, number: int) -> End:
        loaded = {end.args[0] for _, end in self.living["module"]}
        name = next(name for name in self.modules if name not in loaded)
        self.tell(number, "starting", "module", name)
        subprocess.run(["modprobe", name], check=True)
        self.tell(number, "begun", [name])
        return functools.partial(unload, name)

    def close(self) -> None:
        for kind in self.living.values():
            for _, end in kind:
                end()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reset(near: socket.socket, far: socket.socket) -> None:
    """Let go of a connection so that nothing is left of it, at either end."""
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()
    far.close()


def unload(name: str) -> None:
    subprocess.run(["rmmod", name], check=True)


def main(host: str, port: str, seed: str, *modules: str) -> None:
    with socket.create_connection((host, int(port))) as connection:
        churn = Churn(connection, seed, modules)
        with contextlib.closing(churn), contextlib.suppress(ConnectionError):
            churn.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
