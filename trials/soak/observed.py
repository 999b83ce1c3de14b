"""Listings by a reader that knows LibVMI only (compat/ids): what of them was planted, by the key of what planted it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

from trials.soak.truth import Entry, Kind
from vmishim.libvmi import Libvmi

COMPAT = Path(__file__).parents[2] / "compat"
PREFIX = "soak"
"""Prefix of the names of planted processes, and of no others."""
PLANTED = f"{PREFIX}-planted"
"""Name of the processes that stay; several have it."""
ADDRESSES = ip_network("127.64.0.0/10")
"""Addresses of planted connections, and of no others."""


def reader(vmi: Libvmi) -> Any:
    """The guest by plain LibVMI reads."""
    # Last on the path, so that modules of the same names come from elsewhere.
    sys.path += [place for place in (str(COMPAT), str(COMPAT / "ids")) if place not in sys.path]
    return import_module("linux").Linux(vmi, import_module("layout").Layout(vmi))


def processes(linux: Any) -> Iterator[tuple[str, Entry]]:
    """(name, pid, uid) of each."""
    for task in linux.tasks():
        process = linux.process(task)
        if process.comm.startswith(PREFIX):
            key = f"{PLANTED} {process.pid}" if process.comm == PLANTED else process.comm
            yield key, (process.comm, process.pid, process.uid)


def sockets(linux: Any) -> Iterator[tuple[str, Entry]]:
    """(local end, remote end, state) of each; a connection goes by the address that is its own."""
    for sock in linux.hashed_sockets():
        found = linux.socket(sock)
        # A bracketed IPv6 address is not one of ours.
        ends = [IPv4Address(end.rpartition(":")[0]) for end in (found.local, found.remote) if not end.startswith("[")]
        planted = [end for end in ends if end in ADDRESSES]
        if planted:
            yield str(max(planted)), (found.local, found.remote, found.state)


def modules(linux: Any) -> Iterator[tuple[str, Entry]]:
    """The name of every module: all of them are known."""
    for module in linux.listed_modules():
        name = linux.module_name(module)
        yield name, (name,)


LISTINGS: dict[Kind, Callable[[Any], Iterator[tuple[str, Entry]]]] = {
    "process": processes,
    "socket": sockets,
    "module": modules,
}
