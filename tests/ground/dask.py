"""A Dask cluster on this machine, and a scheduler that is not one: it sends what a test gives it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vmishim.inspection.cluster import Scheduler

# Not fully typed.
distributed: Any = import_module("distributed")


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[tuple[Any, Scheduler]]:
    """A cluster of worker processes that speaks TLS: a client of the test's, and how we reach it."""
    security = distributed.Security.temporary()
    files = tls_files(security, folder)
    options = {"n_workers": workers, "threads_per_worker": 2, "dashboard_address": ":0", "silence_logs": "CRITICAL"}
    with (
        distributed.LocalCluster(**options, security=security, protocol="tls://") as made,
        distributed.Client(made, set_as_default=False, security=security) as client,
    ):
        client.wait_for_workers(workers, timeout=60)
        yield client, Scheduler(str(client.scheduler.address), files)


def tls_files(security: Any, folder: Path) -> tuple[str, ...]:
    """The client's files: CA, certificate, key."""
    found = []
    for name in ("tls_ca_file", "tls_client_cert", "tls_client_key"):
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_text(getattr(security, name))
        found.append(str(path))
    return tuple(found)


@dataclass(frozen=True)
class Mark:
    """Once unpickled, makes a file named by the process that did it. Like code of an attacker's, but harmless."""

    folder: str

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open('{self.folder}/%d' % __import__('os').getpid(), 'w').close()",)


def marked(folder: Path) -> set[int]:
    """The processes that unpickled a `Mark`."""
    return {int(each.name) for each in folder.iterdir()}


class Hostile:
    """A scheduler by the first messages that Dask's client reads; where it is told to, it sends what it is given.

    :param where: ``identity``, ``stream-start`` or ``gather``: the reply to replace; anything else: after a task came
    :param message: makes the message, from the key of that task
    :ivar sent: set once it was sent
    :ivar graph: the bytes of the tasks that came
    """

    def __init__(self, where: str, message: Callable[[str], Any]) -> None:
        self.where, self.message = where, message
        self.address = ""
        self.sent = threading.Event()
        self.graph = b""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._key = ""
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def serve() -> None:
            self._listener = await distributed.comm.listen("tcp://127.0.0.1:0", self._talk, deserialize=False)
            self.address = self._listener.contact_address
            self._ready.set()

        self._serving = self._loop.create_task(serve())
        self._loop.run_forever()

    def close(self) -> None:
        """Stop answering."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _talk(self, comm: Any) -> None:
        try:
            while True:
                told = await comm.read()
                for one in told if isinstance(told, list | tuple) else [told]:
                    await self._answer(comm, one.get("op"), one)
        except OSError:  # the client hung up
            return

    async def _answer(self, comm: Any, op: str, told: Any) -> None:
        if op == "identity":
            honest = {"type": "Scheduler", "id": "s", "address": self.address, "services": {}, "workers": {}}
            await self._say(comm, "identity", honest)
        elif op == "register-client":
            await self._say(comm, "stream-start", [{"op": "stream-start"}])
        elif op == "gather":
            await self._say(comm, "gather", {"status": "OK", "data": {}})
        elif op == "update-graph":
            self._key = next(iter(told["keys"]))
            self.graph = b"".join(map(bytes, told["expr_ser"].frames))
            if self.where == "gather":
                await comm.write([{"op": "key-in-memory", "key": self._key, "type": b"", "workers": []}])
            elif self.where not in ("identity", "stream-start"):
                await self._say(comm, self.where, None)
                # The task ends, so that the client need not wait any longer.
                await comm.write([{"op": "cancelled-keys", "keys": [self._key]}])

    async def _say(self, comm: Any, where: str, honest: Any) -> None:
        await comm.write(self.message(self._key) if where == self.where else honest)
        if where == self.where:
            self.sent.set()
