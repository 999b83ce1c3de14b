"""The child process that talks to a Dask scheduler, see `vmishim.inspection.cluster`.

Dask's client unpickles in many places (``__Pickled__`` in any message, results, exceptions, tracebacks, types,
warnings), and only some of them can be configured. So Python itself refuses: an audit hook sees every name that any
unpickler looks up, before it is imported, and a pickle without names is plain data.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO

from vmishim.errors import LinkError
from vmishim.inspection.cluster import ANSWER_MAX, HEAD, Scheduler, error_line, plainly

MEMORY_MAX = 4 << 30
"""Bytes of address space: what peers send must fit, with all of Dask."""
RETRIES = 3
"""Workers that may die while they ask one guest before it counts as failed."""
PERMITTED = ("builtins", "bytes")
"""The only name that a pickle may hold: Dask sends the type of a result as a pickle."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook. :raises UnpicklingError: a pickle names a function or a class"""
    if event == "pickle.find_class" and arguments != PERMITTED:
        raise pickle.UnpicklingError(f"a peer sent a pickle that names {arguments!r}")


def main() -> None:
    """Read the request, ask, write answers as they come."""
    scheduler, fleet, what, strategy, until = pickle.load(sys.stdin.buffer)  # noqa: S301 - of our parent
    answers = os.fdopen(os.dup(1), "wb")
    # A scheduler can have its clients print.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    sys.addaudithook(refuse)
    try:
        _ask(scheduler, fleet, what, strategy, until, answers)
    except Exception as error:  # a hostile scheduler can cause any
        write(answers, -1, error_line(f"no Dask scheduler answers at {scheduler.address}: {one_line(error)}"))
    # Dask's threads may wait for a peer that never answers.
    os._exit(0)


def connected(scheduler: Scheduler, until: float, answers: BinaryIO) -> Any:
    """Dask's client, connected to a scheduler; None if it can't be, which the parent is told."""
    try:
        # Not fully typed.
        distributed: Any = import_module("distributed")
    except ModuleNotFoundError:
        write(answers, -1, error_line("--engine dask:// needs Dask: pip install 'vmishim[dask]'"))
        return None
    _tolerate()
    security = None
    if scheduler.address.startswith("tls://"):
        names = ("tls_ca_file", "tls_client_cert", "tls_client_key")
        security = distributed.Security(
            require_encryption=True, **dict(zip(names, scheduler.tls, strict=bool(scheduler.tls)))
        )
        if not security.tls_ca_file or not security.tls_client_cert:
            text = (
                "--engine dask:// uses TLS: give --engine-tls CA CERT KEY, or set distributed.comm.tls in Dask's "
                "configuration files; docs/security.md says whom this trusts"
            )
            write(answers, -1, error_line(text))
            return None
    return distributed.Client(
        scheduler.address,
        security=security or distributed.Security(),
        timeout=max(min(until - time.monotonic(), 10), 1),
        set_as_default=False,
        direct_to_workers=False,
    )


def _ask(scheduler: Scheduler, fleet: Any, what: str, strategy: str, until: float, answers: BinaryIO) -> None:
    client = connected(scheduler, until, answers)
    if client is None:
        return
    numbers = {
        client.submit(plainly, domain, what, strategy, pure=False, retries=RETRIES): number
        for number, domain in enumerate(fleet)
    }
    distributed: Any = import_module("distributed")
    completed = distributed.as_completed(list(numbers), loop=client.loop, timeout=max(until - time.monotonic(), 0.1))
    try:
        for future in completed:
            write(answers, numbers[future], answer_of(future, until))
    except TimeoutError:
        return  # what is missing is late


def answer_of(future: Any, until: float) -> bytes:
    """What a worker returned, if it is bytes; otherwise an error's line."""
    try:
        answer = future.result(timeout=max(until - time.monotonic(), 0.1))
    except Exception as error:
        return error_line(f"the worker failed: {one_line(error)}")
    if type(answer) is not bytes or len(answer) > ANSWER_MAX:
        return error_line("the worker sent something else than an answer")
    return answer


def _tolerate() -> None:
    """Put an exception in the place of whatever cannot be deserialized. Dask would stop listening to the scheduler, so
    that one worker's exception would silence all guests."""

    def tolerant(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*arguments: Any, **options: Any) -> Any:
            try:
                return load(*arguments, **options)
            except Exception as error:
                return LinkError(f"it sent what cannot be accepted: {error}")

        return loaded

    for module, name in (
        ("distributed.protocol.pickle", "loads"),
        ("distributed.protocol.core", "merge_and_deserialize"),
    ):
        protocol = import_module(module)
        setattr(protocol, name, tolerant(getattr(protocol, name)))
    client: Any = import_module("distributed.client")
    clean = client.clean_exception

    def cleaned(*arguments: Any, **options: Any) -> Any:
        try:
            return clean(*arguments, **options)
        except Exception:  # what stands for the traceback is not one
            return LinkError, LinkError("it failed, with an exception that cannot be accepted"), None

    client.clean_exception = cleaned


def write(answers: BinaryIO, number: int, data: bytes) -> None:
    """Tell the parent."""
    answers.write(HEAD.pack(number, len(data)) + data)
    answers.flush()


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


if __name__ == "__main__":
    main()
