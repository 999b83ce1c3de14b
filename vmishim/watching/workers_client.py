"""The child process that talks to a Dask scheduler for `vmishim.watching.workers`, as long as the watch lasts."""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import resource
import sys
import threading
import time
from functools import partial
from typing import Any, BinaryIO

from vmishim.inspection.cluster import error_line
from vmishim.inspection.cluster_client import MEMORY_MAX, RETRIES, answer_of, connected, one_line, refuse, write
from vmishim.watching.held import look

CONNECT = 5.0
"""Seconds that the scheduler may take to answer at first."""


def main() -> None:
    """Read requests until the parent closes its end; write answers as they come."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    scheduler = pickle.load(requests)  # noqa: S301 - of our parent
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Our parent's requests name our own classes: they are unpickled by a thread that the hook below lets do so.
    reader = threading.Thread(target=_read, args=(requests, asked), daemon=True)
    sys.addaudithook(partial(_refuse, reader))
    reader.start()
    try:
        client = connected(scheduler, time.monotonic() + CONNECT, answers)
        if client is not None:
            _serve(client, asked, answers)
    except Exception as error:  # a hostile scheduler can cause any
        write(answers, -1, error_line(f"no Dask scheduler answers at {scheduler.address}: {one_line(error)}"))
    os._exit(0)


def _refuse(reader: threading.Thread, event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and threading.get_ident() != reader.ident:
        refuse(event, arguments)


def _read(requests: BinaryIO, asked: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            asked.put(pickle.load(requests))  # noqa: S301 - of our parent
        except EOFError:
            os._exit(0)


def _serve(client: Any, asked: queue.SimpleQueue[Any], answers: BinaryIO) -> None:
    lock = threading.Lock()

    def done(number: int, future: Any) -> None:
        data = answer_of(future, time.monotonic() + CONNECT)
        with lock:
            write(answers, number, data)
        future.release()

    while True:
        number, domain, lists, has = asked.get()
        worker = chosen(domain.name, list(client.scheduler_info()["workers"]))
        future = client.submit(
            look,
            domain,
            lists,
            has,
            pure=False,
            retries=RETRIES,
            # The worker that has the session; another if it is gone.
            workers=[worker] if worker else None,
            allow_other_workers=bool(worker),
        )
        future.add_done_callback(partial(done, number))


def chosen(guest: str, workers: list[str]) -> str:
    """The worker of a guest: the same as long as it is there. If one goes, only its own guests move (rendezvous
    hashing, Thaler and Ravishankar 1998). Empty if there is none."""
    return max(workers, key=lambda worker: hashlib.sha256(f"{worker} {guest}".encode()).digest(), default="")


if __name__ == "__main__":
    main()
