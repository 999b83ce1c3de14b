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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
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
    options.add_argument("--list", action="append", choices=list(fleet.LISTS), help="may be given again (ps)")
    chosen = options.parse_args()
    wanted = chosen.list or ["ps"]
    with ExitStack() as stack:
        begun = time.monotonic()
        guests = agents(stack, chosen.agents)
        started = time.monotonic() - begun
        truth = planted(stack)
        rows = []
        for what in wanted:
            ask: Ask = partial(fleet.over, what=what, deadline=DEADLINE)
            rows.append(measure("threads", what, guests, chosen.runs, truth, ask))
        with cluster(chosen.workers) as client:
            address = str(client.scheduler.address).removeprefix("tcp://")
            name = f"Dask, {chosen.workers} workers"
            for what in wanted:
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
    import distributed

    made: Any = distributed.LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=workers, threads_per_worker=4, dashboard_address=":0", silence_logs="CRITICAL"
    )
    with made, distributed.Client(made, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        client.wait_for_workers(workers)
        yield client


def measure(name: str, what: str, guests: Sequence[Domain], runs: int, truth: set[int], ask: Ask) -> dict[str, Any]:
    """Ask all of them several times, after once that does not count."""
    list(ask(guests))
    times, failed, wrong, entries = [], 0, 0, 0
    errors: set[str] = set()
    for _ in range(runs):
        begun = time.monotonic()
        answers = list(ask(guests))
        times.append(time.monotonic() - begun)
        failed += sum(bool(answer.error) for answer in answers)
        errors.update(answer.error for answer in answers if answer.error)
        wrong += sum(what == "ps" and not has(answer, truth) for answer in answers if not answer.error)
        entries = sum(len(answer.entries) for answer in answers)
    seconds = median(times)
    return {
        "name": name,
        "list": what,
        "guests": len(guests),
        "entries": entries,
        "seconds": round(seconds, 3),
        "guests_a_second": round(len(guests) / seconds, 1),
        "failed": failed,
        "wrong": wrong,
        "errors": sorted(errors),
    }


def killed(name: str, guests: Sequence[Domain], truth: set[int], client: Any, ask: Ask) -> dict[str, Any]:
    """Ask all of them four times over, and kill a worker once a fifth of the answers are there."""
    many = [Domain(**{**vars(guest), "name": f"{guest.name}-{again}"}) for again in range(4) for guest in guests]
    pids = client.run(os.getpid)
    victim = threading.Event()
    answers = []
    begun = time.monotonic()
    for answer in ask(many):
        answers.append(answer)
        if len(answers) > len(many) // 5 and not victim.is_set():
            victim.set()
            os.kill(next(iter(pids.values())), signal.SIGKILL)
    seconds = time.monotonic() - begun
    return {
        "name": name,
        "list": "ps",
        "guests": len(many),
        "entries": sum(len(answer.entries) for answer in answers),
        "seconds": round(seconds, 3),
        "guests_a_second": round(len(many) / seconds, 1),
        "failed": sum(bool(answer.error) for answer in answers) + (len(many) - len(answers)),
        "wrong": sum(not has(answer, truth) for answer in answers if not answer.error),
        "errors": sorted({answer.error for answer in answers if answer.error}),
    }


def has(answer: Answer, truth: set[int]) -> bool:
    """Whether a listing has all that was planted."""
    return truth <= {entry.pid for entry in answer.entries if isinstance(entry, Task)}


def show(result: dict[str, Any]) -> None:
    """Print it."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("asked by", "list", "guests", "entries", "time", "guests/s", "failed", "wrong"):
        table.add_column(title, justify="left" if title in ("asked by", "list") else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["name"],
            row["list"],
            f"{row['guests']:,}",
            f"{row['entries']:,}",
            f"{row['seconds']:.2f} s",
            f"{row['guests_a_second']:,.0f}",
            f"{row['failed']}",
            f"{row['wrong']}",
        )
    console.print(table)
    for error in sorted({error for row in result["rows"] for error in row["errors"]}):
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
