"""Where an agent answers: ``tcp://HOST:PORT`` or ``ipc://PATH``."""

from __future__ import annotations

import os
import re

_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_ADDRESS = re.compile(r"\[.*\]|[0-9.]+")
_IPC = re.compile(r"ipc://(?P<path>[^\0]+)")
_LONGEST_IPC = 107
"""Bytes of a path in ``sockaddr_un``, unix(7)."""


def is_endpoint(text: str) -> bool:
    """Whether ``text`` means to be an endpoint, by its scheme."""
    return text.startswith(("tcp://", "ipc://"))


def problem(text: str) -> str:
    """What is wrong with an endpoint, in words that follow it; empty if nothing is."""
    if tcp := _TCP.fullmatch(text):
        if tcp["port"] is None:
            return f"has no port: use {text}:5555, or the port that the agent listens on"
        return "" if 0 < int(tcp["port"]) < 65536 else "has no valid port: it must be a number from 1 to 65535"
    if ipc := _IPC.fullmatch(text):
        if len(os.fsencode(ipc["path"])) <= _LONGEST_IPC:
            return ""
        return f"has a path that is too long for a socket: at most {_LONGEST_IPC} bytes are allowed"
    return "is not a valid endpoint: use tcp://HOST:PORT or ipc://PATH"


def address(text: str) -> tuple[str, int] | str:
    """What a valid endpoint connects to: host and port, or the path of a socket."""
    if tcp := _TCP.fullmatch(text):
        return tcp["host"].removeprefix("[").removesuffix("]"), int(tcp["port"])
    ipc = _IPC.fullmatch(text)
    assert ipc, "an endpoint is one of the two"
    return ipc["path"]


def host_name(text: str) -> str:
    """The name in a valid endpoint that must be resolved to an address; empty if there is none."""
    tcp = _TCP.fullmatch(text)
    return tcp["host"] if tcp and not _ADDRESS.fullmatch(tcp["host"]) else ""
