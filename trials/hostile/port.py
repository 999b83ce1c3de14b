"""What an agent's port withstands, measured: idle connections, replayed hellos, endless messages, a greedy IDS."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from bench.delay import delayed
from trials.hostile import flood, resident
from trials.hostile.sockets import Agent, running
from vmishim.client import Remote
from vmishim.errors import LinkError
from vmishim.wire.keys import generate
from vmishim.wire.messages import BULK_MAX
from vmishim.wire.session import Initiator

NEW = 50
"""Sessions that are made while the port is pressed."""
GREEDY = 64
"""Connections that a greedy IDS asks from at once."""
NAMES = [f"no_such_symbol_{number}" for number in range(1024)]


@contextmanager
def listening(*options: str, descriptors: int | None = None) -> Iterator[Agent]:
    """An agent of this machine that listens on a port of the loopback.

    :param descriptors: how many it may have; this process keeps its own limit
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with ExitStack() as stack:
        with ExitStack() as starting:
            if descriptors is not None:
                limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (descriptors, descriptors))
                limited = partial(subprocess.Popen, preexec_fn=limit)
                starting.enter_context(mock.patch.object(subprocess, "Popen", limited))
            agent = stack.enter_context(running("--listen", endpoint, *options))
        yield replace(agent, endpoint=endpoint)


def port(seconds: float) -> Iterator[str]:
    """Press an agent's port in each way, and say how it fared.

    :param seconds: how long endless messages are poured
    """
    with listening() as agent, flood.Idle(agent, 1100) as idle:
        _wait_for(lambda: idle.full)
        yield f"1,100 greeted, idle connections: {flood.newcomers(agent, NEW)}; {idle.closed:,} closed"
    for round_trip_ms in (0, 50, 100):
        with listening() as agent, ExitStack() as stack:
            recorded = [Initiator(agent.key, agent.public).hello() for _ in range(200)]
            endpoint = agent.endpoint
            if round_trip_ms:
                endpoint = stack.enter_context(delayed(int(endpoint.rpartition(":")[2]), round_trip_ms / 1000))
            stack.enter_context(flood.Replayed(agent, recorded, rate=400))
            yield f"400 replayed hellos a second, {round_trip_ms} ms: {flood.newcomers(agent, NEW, endpoint)}"
    with listening() as agent, agent.link(timeout=20.0) as link, flood.Pouring(agent) as pouring:
        latencies, most = _latencies(Remote(link.exchange), agent, seconds)
        yield (
            f"{pouring.bytes_poured >> 20:,} MiB of endless messages in {seconds:.0f} s: {_shown(latencies)}, "
            f"{link.handshakes} session; at most {most >> 10} MiB resident"
        )
    yield from _greedy()


def _greedy() -> Iterator[str]:
    """How long an IDS waits beside another that asks all it can, from many connections."""
    greedy, modest = generate(), generate()
    with tempfile.NamedTemporaryFile("w", prefix="vmishim-", suffix=".permitted") as permitted:
        permitted.write(f"{greedy.public.text}\n{modest.public.text}\n")
        permitted.flush()
        Path(permitted.name).chmod(0o644)
        with listening("--permitted", permitted.name) as agent:
            with replace(agent, key=modest).link(timeout=20.0) as link:
                alone, _ = _latencies(Remote(link.exchange), agent, 3.0)
                with _asking(replace(agent, key=greedy)) as answered:
                    beside, _ = _latencies(Remote(link.exchange), agent, 10.0)
            yield f"an IDS alone: {_shown(alone)}"
            yield (
                f"the same beside one that asks from {GREEDY} connections: {_shown(beside)}, {link.handshakes} "
                f"session; the other got {answered[0]:,} answers"
            )


@contextmanager
def _asking(agent: Agent) -> Iterator[list[int]]:
    """An IDS that asks for 1,024 unknown names and for the most memory, from many connections at once."""
    stop, answered = threading.Event(), [0]

    def ask(number: int) -> None:
        with agent.link(timeout=60.0) as link:
            remote = Remote(link.exchange)
            while not stop.is_set():
                with contextlib.suppress(LinkError):  # it takes its own sessions away
                    if number % 2:
                        remote.symbols(NAMES)
                    else:
                        (code,) = remote.symbols(["_text"])
                        remote.read(code or 0, BULK_MAX)
                    answered[0] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(GREEDY)]
    for thread in threads:
        thread.start()
    try:
        _wait_for(lambda: answered[0] > GREEDY)
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _latencies(remote: Remote, agent: Agent, seconds: float) -> tuple[list[float], int]:
    """Seconds of each small question for so long, and the most memory that the agent had, KiB."""
    found, most, until = [], 0, time.monotonic() + seconds
    pace = threading.Event()
    while (begun := time.monotonic()) < until:
        assert remote.symbols(["vsnprintf"]) != [None]
        found.append(time.monotonic() - begun)
        most = max(most, resident(agent.pid))
        pace.wait(0.01)
    return found, most


def _shown(latencies: list[float]) -> str:
    ordered = sorted(latencies)
    p99 = ordered[len(ordered) * 99 // 100]
    return f"{len(ordered):,} answers, median {statistics.median(ordered) * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms"


def _wait_for(condition: Callable[[], bool]) -> None:
    until, pace = time.monotonic() + 60, threading.Event()
    while not condition():
        if time.monotonic() > until:
            raise LinkError("the agent's port did not come under pressure within 60 s")
        pace.wait(0.02)
