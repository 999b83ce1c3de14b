"""A fleet: how many guests a second are listed, by threads of one process and by the workers of a Dask cluster.

    python -m ci.bench.fleet                 50 agents of this machine, listed by both; a worker is killed meanwhile
    python -m ci.bench.fleet --agents 10 --workers 2

The agents are this machine's own, each a process with keys and eBPF programs of its own, so a guest costs what an agent
on a real machine costs, but all of them share its processors with those who ask. Every answer is held to the truth:
processes planted here are in every listing. Writes docs/fleet.json. Exit status 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vmishim import fleet, local
from vmishim.domains import Domain
from vmishim.fleet import Answer
from vmishim.lists import Task

ROOT = Path(__file__).parents[2]
LISTS = ("ps", "ss")
PLANTED = 5
DEADLINE = 120.0

Ask = Callable[[Sequence[Domain]], Iterator[Answer]]


def main() -> int:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--agents", type=int, default=50, help="(%(default)s)")
    options.add_argument("--workers", type=int, default=4, help="of the cluster, each a process (%(default)s)")
    options.add_argument("--runs", type=int, default=5, help="(%(default)s)")
    options.add_argument("--output", type=Path, default=ROOT / "docs" / "fleet.json", help="(%(default)s)")
    chosen = options.parse_args()
    with ExitStack() as stack:
        begun = time.monotonic()
        guests = agents(stack, chosen.agents)
        started = time.monotonic() - begun
        truth = planted(stack)
        rows = []
        for what in LISTS:
            ask: Ask = partial(fleet.over, what=what, deadline=DEADLINE)
            rows.append(measure("threads", what, guests, chosen.runs, truth, ask))
        with cluster(chosen.workers) as client:
            address = str(client.scheduler.address).removeprefix("tcp://")
            name = f"Dask, {chosen.workers} workers"
            for what in LISTS:
                ask = partial(fleet.by_dask, address, what=what, deadline=DEADLINE)
                rows.append(measure(name, what, guests, chosen.runs, truth, ask))
            ask = partial(fleet.by_dask, address, what="ps", deadline=DEADLINE)
            rows.append(killed(f"{name}, one killed", guests, truth, client, ask))
    result = {
        "machine": f"Linux {os.uname().release}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "agents": chosen.agents,
        "workers": chosen.workers,
        "runs": chosen.runs,
        "seconds_to_start_all_agents": round(started, 2),
        "rows": rows,
    }
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 1 if any(row["failed"] or row["wrong"] for row in rows) else 0


def agents(stack: ExitStack, count: int) -> list[Domain]:
    """Agents of this machine, as guests."""
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: stack.enter_context(local.agent()), range(count)))
    return [
        Domain(f"guest-{number}", agent=endpoint, agent_key=public, key=str(key), timeout=30.0)
        for number, (endpoint, key, public) in enumerate(started)
    ]


def planted(stack: ExitStack) -> set[int]:
    """Processes that every listing has to have."""
    children = [subprocess.Popen(["sleep", "infinity"]) for _ in range(PLANTED)]
    for child in children:
        stack.callback(child.wait)
        stack.callback(child.kill)
    return {child.pid for child in children}


@contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """A Dask cluster on this machine, and a client to look at it."""
    distributed: Any = import_module("distributed")
    options = {"threads_per_worker": 4, "dashboard_address": ":0", "silence_logs": "CRITICAL"}
    with (
        distributed.LocalCluster(n_workers=workers, **options) as made,
        distributed.Client(made, set_as_default=False) as client,
    ):
        client.wait_for_workers(workers)
        yield client


def measure(name: str, what: str, guests: Sequence[Domain], runs: int, truth: set[int], ask: Ask) -> dict[str, Any]:
    """Ask all of them several times, after once that does not count."""
    list(ask(guests))
    times, answers = [], []
    for _ in range(runs):
        begun = time.monotonic()
        answers.append(list(ask(guests)))
        times.append(time.monotonic() - begun)
    every = [answer for some in answers for answer in some]
    return row(name, what, len(guests), answers[-1], every, median(times), truth if what == "ps" else set())


def killed(name: str, guests: Sequence[Domain], truth: set[int], client: Any, ask: Ask) -> dict[str, Any]:
    """Ask all of them four times over, and kill a worker once a fifth of the answers are there."""
    many = [Domain(**{**vars(guest), "name": f"{guest.name}-{again}"}) for again in range(4) for guest in guests]
    victim = next(iter(client.run(os.getpid).values()))
    answers = []
    begun = time.monotonic()
    for answer in ask(many):
        answers.append(answer)
        if len(answers) == len(many) // 5:
            os.kill(victim, signal.SIGKILL)
    return row(name, "ps", len(many), answers, answers, time.monotonic() - begun, truth)


def row(
    name: str,
    what: str,
    guests: int,
    answers: Sequence[Answer],
    every: Sequence[Answer],
    seconds: float,
    truth: set[int],
) -> dict[str, Any]:
    """One line of the result.

    :param answers: of one run
    :param every: of all runs: none of them may have failed, or lack what was planted
    """
    failed = [answer.error for answer in every if answer.error]
    return {
        "name": name,
        "list": what,
        "guests": guests,
        "entries": sum(len(answer.entries) for answer in answers),
        "seconds": round(seconds, 3),
        "guests_a_second": round(guests / seconds, 1),
        "failed": len(failed) + guests - len(answers),
        "wrong": sum(not truth <= pids(answer) for answer in every if not answer.error),
        "errors": sorted(set(failed)),
    }


def pids(answer: Answer) -> set[int]:
    """The processes of a listing."""
    return {entry.pid for entry in answer.entries if isinstance(entry, Task)}


def show(result: dict[str, Any]) -> None:
    """Print it."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("asked by", "list", "guests", "entries", "time", "guests/s", "failed", "wrong"):
        table.add_column(title, justify="left" if title in ("asked by", "list") else "right", no_wrap=True)
    for each in result["rows"]:
        table.add_row(
            each["name"],
            each["list"],
            f"{each['guests']:,}",
            f"{each['entries']:,}",
            f"{each['seconds']:.2f} s",
            f"{each['guests_a_second']:,.0f}",
            f"{each['failed']}",
            f"{each['wrong']}",
        )
    console.print(table)
    for error in sorted({error for each in result["rows"] for error in each["errors"]}):
        console.print(f"failed: {error}", markup=False)
    console.print(
        f"\nMedians of {result['runs']}; {result['machine']}; {result['agents']} agents, all of them on this machine, "
        f"started in {result['seconds_to_start_all_agents']:.0f} s. Each guest is connected to anew: handshake, kernel "
        "facts, one list."
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vmishim-fleet-") as scratch:
        # Dask leaves folders of its workers where it stands.
        os.environ.setdefault("DASK_TEMPORARY_DIRECTORY", scratch)
        sys.exit(main())
