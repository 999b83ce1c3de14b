"""A fleet: guests listed per second, the cost on each side, and the failures survived.

    python -m bench.fleet                 50 agents of this machine; a worker and some agents are killed meanwhile
    python -m bench.fleet --agents 10 --workers 2

The agents are this machine's own, each a process with keys and eBPF programs of its own, so a guest costs what an agent
on a real machine costs. But all of them share its processors with those who ask; so the processor time of a listing is
told apart, of the asking side and of the agent: on machines of their own each side has that of its own only. Every
answer is held to the truth: processes planted here are in every listing. Writes docs/fleet.json and a paragraph of
docs/benchmark.md. Exit status 0 only if nothing was lost but what was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console

from bench import report, results, variants
from bench.variants import RunningAgent
from lab.steps import say
from vmishim.errors import LibvmiError
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.inspection import cluster, fleet
from vmishim.inspection.fleet import Answer
from vmishim.inspection.lists import whole
from vmishim.inspection.objects import Task
from vmishim.libvmi import Libvmi
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[1]
PLANTED = 5
DEADLINE = 120.0
KEPT_WIDTH = 4
"""Threads that ask over sessions that stay open: they wait little, so more would only change places."""

Ask = Callable[[Sequence[Domain]], Iterator[Answer]]


@dataclass(frozen=True)
class Row:
    """One way of asking all of the fleet."""

    name: str
    listings: int
    """In one run."""
    seconds: float
    """Of one run, the median."""
    failed: int
    """Listings that failed, in all runs ..."""
    wrong: int
    """... and listings without what was planted."""
    killed: str = ""
    """What was, meanwhile."""
    lost: int = 0
    """Listings that must fail, since their agent was killed."""
    asking_ms: float | None = None
    """Processor time of the asking side for one listing, and ..."""
    agent_ms: float | None = None
    """... of the agent."""
    errors: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Successful listings per second."""
        return (self.listings - self.lost) / self.seconds

    @property
    def good(self) -> bool:
        """Whether exactly the expected listings failed."""
        return self.failed == self.lost and not self.wrong


def main() -> int:
    """Measure, print, write."""
    options = argparse.ArgumentParser(prog="python -m bench.fleet", description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--agents", type=int, default=50, help="(%(default)s)")
    options.add_argument("--workers", type=int, default=2, help="of the cluster, each a process (%(default)s)")
    options.add_argument("--runs", type=int, default=5, help="(%(default)s)")
    options.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for fleet.json (%(default)s)")
    options.add_argument("--list", choices=list(fleet.LISTS), default="ps", help="(%(default)s)")
    chosen = options.parse_args()
    with ExitStack() as stack:
        say(f"fleet: starting {chosen.agents} agents")
        begun = time.monotonic()
        running = started(stack, chosen.agents)
        starting = time.monotonic() - begun
        guests = enrolled(stack, running)
        truth = planted(stack) if chosen.list == "ps" else set()
        pids = [agent.pid for agent in running]
        rows = []

        def measured(name: str, ask: Ask, asking: Sequence[int]) -> None:
            say(f"fleet: {name}")
            rows.append(measure(name, guests, chosen.runs, truth, ask, asking, pids))

        ask: Ask = partial(fleet.over, what=chosen.list, deadline=DEADLINE)
        measured("one after the other", partial(in_turn, ask), [os.getpid()])
        measured(f"{fleet.WIDTH} threads", ask, [os.getpid()])
        with Kept(chosen.list) as kept:
            measured(f"{KEPT_WIDTH} threads, sessions kept", kept, [os.getpid()])
        with local_cluster(chosen.workers) as client:
            scheduler = cluster.Scheduler(str(client.scheduler.address))
            by_dask: Ask = partial(cluster.by_dask, scheduler, what=chosen.list, deadline=DEADLINE)
            workers = list(client.run(os.getpid).values())
            measured(f"Dask, {chosen.workers} workers", by_dask, [os.getpid(), *workers])
            say("fleet: a worker is killed")
            rows.append(without_worker(f"Dask, {chosen.workers} workers", guests, truth, workers[0], by_dask))
        dead = running[: max(chosen.agents // 10, 1)]
        say(f"fleet: agents are killed: {len(dead)}")
        for agent in dead:
            os.kill(agent.pid, signal.SIGKILL)
        rows.append(without_agents(f"{fleet.WIDTH} threads", guests, truth, len(dead), ask))
    result = {
        "machine": f"Linux {os.uname().release.split('-')[0]}, {results.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "list": chosen.list,
        "agents": chosen.agents,
        "runs": chosen.runs,
        "seconds_to_start_all_agents": round(starting, 2),
        "rows": [asdict(row) | {"rate": row.rate} for row in rows],
    }
    chosen.output.mkdir(exist_ok=True)
    (chosen.output / "fleet.json").write_text(json.dumps(results.rounded(result), indent=1) + "\n")
    page = chosen.output / "benchmark.md"
    if page.exists():
        page.write_text(report.marked(page.read_text(), "fleet", report.fleet(result)))
    report.terminal(f"{chosen.agents} guests", report.fleet_rows(result), Console(width=100, highlight=False))
    for error in sorted({error for row in rows for error in row.errors}):
        print(f"failed: {error}")
    return 0 if all(row.good for row in rows) else 1


class Kept:
    """Asks over sessions that stay open, as ``vmishim watch --domains`` does, but without a pause."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._sessions: dict[str, Libvmi] = {}
        self._pool = ThreadPoolExecutor(KEPT_WIDTH)

    def __call__(self, guests: Sequence[Domain]) -> Iterator[Answer]:
        return self._pool.map(self._ask, guests)

    def _ask(self, guest: Domain) -> Answer:
        try:
            if guest.name not in self._sessions:
                self._sessions[guest.name] = Libvmi.over(reach(guest))
            entries, damage = whole(self._sessions[guest.name], fleet.LISTS[self._what])
            return Answer(guest.name, entries, damage=damage)
        except LibvmiError as error:
            return fleet.failed(guest, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for session in self._sessions.values():
            session.destroy()


def started(stack: ExitStack, count: int) -> list[RunningAgent]:
    """Agents of this machine."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda _: stack.enter_context(variants.here(variants.PLAIN)), range(count)))


def enrolled(stack: ExitStack, running: Sequence[RunningAgent]) -> list[Domain]:
    """These agents as guests, by keys in files."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    guests = []
    for number, agent in enumerate(running):
        key = folder / f"key-{number}"
        save_private(key, agent.private)
        made = Domain(f"guest-{number}", agent=agent.endpoint, agent_key=agent.public.text, key=str(key), timeout=20.0)
        guests.append(made)
    return guests


def planted(stack: ExitStack) -> set[int]:
    """Processes that every listing has to have."""
    children = [subprocess.Popen(["sleep", "infinity"]) for _ in range(PLANTED)]
    for child in children:
        stack.callback(child.wait)
        stack.callback(child.kill)
    return {child.pid for child in children}


@contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A Dask cluster on this machine, and a client to look at it."""
    import distributed

    made: Any = distributed.LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=workers, threads_per_worker=4, dashboard_address=":0", silence_logs="CRITICAL"
    )
    with made, distributed.Client(made, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        client.wait_for_workers(workers)
        yield client


def in_turn(ask: Ask, guests: Sequence[Domain]) -> Iterator[Answer]:
    """Ask one guest after the other."""
    for guest in guests:
        yield from ask([guest])


def measure(
    name: str,
    guests: Sequence[Domain],
    runs: int,
    truth: set[int],
    ask: Ask,
    asking: Sequence[int],
    agents: Sequence[int],
) -> Row:
    """Ask all of them several times, after once that does not count.

    :param asking: processes of the asking side
    :param agents: processes of the agents
    """
    list(ask(guests))
    seconds, answers = [], []
    before = processor_time(asking), processor_time(agents)
    for _ in range(runs):
        begun = time.monotonic()
        answers += list(ask(guests))
        seconds.append(time.monotonic() - begun)
    ours, theirs = processor_time(asking) - before[0], processor_time(agents) - before[1]
    listings = len(guests) * runs
    return _row(
        name,
        len(guests),
        median(seconds),
        answers,
        truth,
        listings,
        asking_ms=1e3 * ours / listings,
        agent_ms=1e3 * theirs / listings,
    )


def without_worker(name: str, guests: Sequence[Domain], truth: set[int], victim: int, ask: Ask) -> Row:
    """Ask all of them four times over, and kill a worker once a fifth of the answers are there."""
    many = [replace(guest, name=f"{guest.name}-{again}") for again in range(4) for guest in guests]
    answers: list[Answer] = []
    begun = time.monotonic()
    for answer in ask(many):
        answers.append(answer)
        if len(answers) == len(many) // 5:
            os.kill(victim, signal.SIGKILL)
    return _row(name, len(many), time.monotonic() - begun, answers, truth, len(many), killed="a worker")


def without_agents(name: str, guests: Sequence[Domain], truth: set[int], dead: int, ask: Ask) -> Row:
    """Ask all of them, some of which are not there any more; the time is until the last of the others has answered."""
    begun, seconds, answers = time.monotonic(), 0.0, []
    for answer in ask(guests):
        answers.append(answer)
        if not answer.error:
            seconds = time.monotonic() - begun
    killed = f"{dead} agents" if dead > 1 else "an agent"
    return _row(name, len(guests), seconds, answers, truth, len(guests), killed=killed, lost=dead)


def _row(
    name: str, listings: int, seconds: float, answers: Sequence[Answer], truth: set[int], due: int, **more: Any
) -> Row:
    failed = sum(bool(answer.error) for answer in answers) + due - len(answers)
    wrong = sum(not has(answer, truth) for answer in answers if not answer.error)
    errors = tuple(sorted({answer.error for answer in answers if answer.error}))
    return Row(name, listings, seconds, failed, wrong, errors=errors, **more)


def processor_time(pids: Sequence[int]) -> float:
    """Seconds that processes ran so far, in user space and in the kernel for them (proc(5), stat)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def has(answer: Answer, truth: set[int]) -> bool:
    """Whether a listing has all that was planted."""
    return truth <= {entry.pid for entry in answer.entries if isinstance(entry, Task)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vmishim-fleet-") as scratch:
        # Dask leaves its workers' folders in the working directory.
        os.environ.setdefault("DASK_TEMPORARY_DIRECTORY", scratch)
        sys.exit(main())
