"""Ask guests from the workers of an existing Dask cluster, and believe nothing but plain data.

Dask's client unpickles what its scheduler sends: results, their types, exceptions, warnings, and any part of any
message. A pickle can run code, so a hostile worker or scheduler could run code here. Therefore Dask's client runs in a
child process (`vmishim.inspection.cluster_client`) in which no pickle can name a function or a class. Workers return
bytes that `plain` makes; the child passes them on as they are, and `parsed` checks them against the shape of the list.

The connection is TLS with certificates on both sides; plain TCP only to this machine, and only if you ask for it.
Workers still run what the scheduler sends them: docs/security.md says whom that makes you trust.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pickle
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from vmishim import files, isolated
from vmishim.errors import LinkError
from vmishim.guests.agent import Strategy
from vmishim.guests.domains import Domain
from vmishim.inspection.fleet import DEADLINE, Answer, Entry, ask, failed, late, over
from vmishim.inspection.lists import MARKS_MAX
from vmishim.inspection.objects import Module, Socket, Task

KINDS: dict[str, type[Entry]] = {"ps": Task, "threads": Task, "lsmod": Module, "ss": Socket}
"""The class of a list's entries, by the key of `vmishim.inspection.fleet.LISTS`."""
ANSWER_MAX = 64 << 20
"""Bytes of one guest's answer; about 500,000 processes."""
LINE_MAX = 8192
"""Bytes of one entry, or of an error."""
TEXT_MAX = 1024
"""Characters of one text in an entry: four for each byte of the longest module name."""
ERROR_MAX = 1000
"""Characters of a worker's error that are shown."""
GRACE = 10.0
"""Seconds that the child gets beyond the deadline, to start and to say why it failed."""
HEAD = struct.Struct("<iI")
"""What the child writes before each answer: its number, or -1 if it could ask nobody, and how many bytes follow."""


@dataclass(frozen=True)
class Scheduler:
    """Where a cluster's scheduler answers, and how it is reached.

    :ivar address: ``tls://HOST:PORT``, or ``tcp://`` and a loopback address
    :ivar tls: files with the CA's certificate, our certificate and its key; empty: those of Dask's configuration files
    """

    address: str
    tls: tuple[str, ...] = ()

    @classmethod
    def named(cls, text: str, tls: Sequence[str] = ()) -> Scheduler:
        """The scheduler that ``--engine`` names: ``dask://HOST:PORT`` by TLS, ``dask+tcp://127.0.0.1:PORT`` without.

        :raises LinkError: it is not valid, or plain TCP would leave this machine
        """
        scheme, _, address = text.partition("://")
        if scheme not in ("dask", "dask+tcp") or not address:
            raise LinkError(
                f"--engine {text!r} is not valid; give dask://HOST:PORT, or leave --engine out to ask from this machine"
            )
        if scheme == "dask":
            return cls(f"tls://{address}", tuple(str(Path(file).expanduser().absolute()) for file in tls))
        if not _is_loopback(address):
            raise LinkError(
                f"--engine {text!r} would send unprotected TCP over a network; give dask://{address}, which uses TLS "
                "(dask+tcp:// is for 127.0.0.1 and [::1] only)"
            )
        return cls(f"tcp://{address}")


def _is_loopback(address: str) -> bool:
    # Only literal addresses: a name means what the resolver says.
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def engine(named: str, tls: Sequence[str] = ()) -> Callable[..., Iterator[Answer]]:
    """The function that asks guests: `vmishim.inspection.fleet.over` for an empty name, otherwise `by_dask` with the
    scheduler that it names.

    :param tls: files with the CA's certificate, our certificate and its key
    :raises LinkError: the name is not valid, or another user could have written a file, or read the key
    """
    return partial(by_dask, scheduler_of(named, tls)) if named else over


def scheduler_of(named: str, tls: Sequence[str] = ()) -> Scheduler:
    """The scheduler that ``--engine`` names, once the files of TLS are checked. :raises LinkError: as `engine`"""
    scheduler = Scheduler.named(named, tls)
    for path in scheduler.tls:
        _check(path, is_key=path == scheduler.tls[-1])
    return scheduler


def _check(path: str, is_key: bool) -> None:
    try:
        with files.open_trusted(path) as file:
            status = os.fstat(file.fileno())
            files.check_mode(path, status)
    except OSError as error:
        raise LinkError(f"--engine-tls {path}: {error.strerror}") from None
    if is_key and status.st_mode & 0o077:
        raise LinkError(f"--engine-tls {path}: other users can access this private key; run: chmod 600 {path}")


def by_dask(
    scheduler: Scheduler, fleet: Sequence[Domain], what: str, strategy: Strategy = "batch", deadline: float = DEADLINE
) -> Iterator[Answer]:
    """Ask guests from the workers of a Dask cluster; otherwise like `vmishim.inspection.fleet.over`.

    If a worker dies, another one asks its guest. Workers need this version of vmishim, a network path to the agents,
    and private keys of their own at the paths that the entries give: no key is sent to them.

    :raises LinkError: no scheduler answers there, it is not trusted, or ``vmishim[dask]`` is not installed
    """
    missing = dict(enumerate(fleet))
    command = isolated.module("vmishim.inspection.cluster_client")
    child = subprocess.Popen(
        command,
        cwd="/",
        env=isolated.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Dask logs what it was sent, as it is
    )
    assert child.stdin is not None
    assert child.stdout is not None
    ending = threading.Timer(deadline + GRACE, child.kill)
    ending.daemon = True
    ending.start()
    try:
        with child.stdin as request:
            pickle.dump((scheduler, list(fleet), what, strategy, time.monotonic() + deadline), request)
        while missing and len(head := child.stdout.read(HEAD.size)) == HEAD.size:
            number, size = HEAD.unpack(head)
            data = child.stdout.read(min(size, ANSWER_MAX))
            if number not in missing:
                raise LinkError(told(data))
            yield parsed(missing.pop(number), what, data)
        for domain in missing.values():
            yield late(domain, deadline)
    finally:
        ending.cancel()
        child.kill()
        child.stdout.close()
        child.wait()


def plainly(domain: Domain, what: str, strategy: Strategy) -> bytes:
    """What a worker runs: `ask`, with the list or the error as `plain` bytes. It raises nothing, because Dask would
    send the exception as a pickle."""
    try:
        return plain(*ask(domain, what, strategy))
    except Exception as error:  # one line for whatever went wrong
        return error_line(failed(domain, error).error)


def plain(entries: Sequence[Entry], damage: Sequence[str] = ()) -> bytes:
    """A list as bytes: one line of JSON for each entry, an array of its fields' values in order; then one for each
    sentence of its damage, an object."""
    lines: list[Any] = [astuple(entry) for entry in entries]
    lines += [{"damage": mark[:ERROR_MAX]} for mark in damage]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def error_line(text: str) -> bytes:
    """An error as bytes: one line of JSON, a string."""
    return json.dumps(text[:ERROR_MAX]).encode() + b"\n"


def parsed(domain: Domain, what: str, data: bytes) -> Answer:
    """A guest's answer, from bytes that a worker sent.

    Every field has its type and bounds; one that does not fails the whole answer, which then says so.
    """
    if len(data) >= ANSWER_MAX:
        return Answer(domain.name, error=f"the worker sent more than {ANSWER_MAX >> 20} MiB")
    entries: list[Entry] = []
    damage: list[str] = []
    lines = BytesIO(data)
    try:
        while line := lines.readline(LINE_MAX):
            values = json.loads(line)
            if type(values) is str and not entries:
                return Answer(domain.name, error=told(line))
            if type(values) is dict:
                damage.append(_mark(values))
            else:
                entries.append(checked(KINDS[what], values))
            if len(damage) > MARKS_MAX + 1:
                raise ValueError
    except (ValueError, RecursionError):
        number = len(entries) + len(damage) + 1
        return Answer(domain.name, error=f"line {number} of the worker's answer is malformed")
    return Answer(domain.name, entries, damage=damage)


def checked(kind: type[Entry], values: Any) -> Entry:
    """An entry, from the values of its fields. :raises ValueError: the values are not those of such an entry"""
    expected = fields(kind)
    if type(values) is not list or len(values) != len(expected):
        raise ValueError
    for field, value in zip(expected, values, strict=True):
        if field.type == "str":
            fits = type(value) is str and len(value) <= TEXT_MAX
        else:
            fits = type(value) is int and 0 <= value < 1 << 64
            fits = fits or (value is None and field.type == "int | None")
        if not fits:
            raise ValueError
    return kind(*values)


def _mark(values: dict[str, Any]) -> str:
    """:raises ValueError: the values are not a sentence about damage"""
    match values:
        case {"damage": str(mark), **rest} if not rest and len(mark) <= ERROR_MAX:
            return mark
    raise ValueError


def told(line: bytes) -> str:
    """The text of an `error_line`."""
    try:
        text = json.loads(line[:LINE_MAX])
    except (ValueError, RecursionError):
        text = None
    return text[:ERROR_MAX] if type(text) is str else "the worker's error is malformed"
