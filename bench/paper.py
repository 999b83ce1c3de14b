"""Compare with earlier work: its read strategies beside ours, and the effect of a slow network.

    python -m bench.paper

One lab VM holds 100, 300 and 1,000 processes, modules and TCP sockets; each strategy lists them, and so do the genuine
bindings. Then this machine's lists are read with 10 us to 10 ms added to each round trip. Writes
docs/paper.{md,json,svg}; takes some minutes and needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, cast

from rich.console import Console

from bench import delay, hosts, inside, paper_page, plant_modules, plot, report, results, variants, workloads
from bench.paper_page import THEIRS, Delay, Distance, Paper
from bench.results import Case, Cost
from lab.agent import InstalledAgent
from lab.environment import MissingError
from lab.kernels import kernels
from lab.launch import LabError
from lab.steps import ImageError, say
from vmishim.errors import LibvmiError
from vmishim.guests.agent import AgentGuest, Strategy
from vmishim.libvmi import Libvmi

ROOT = Path(__file__).parents[1]
READ: dict[str, Strategy] = {"scalar": "scalar", THEIRS: "batch", "page": "page", "batch": "batch"}
"""How each strategy's memory is asked for. Theirs is kept here as ours is; its agent is another."""
RUNS = {"scalar": 3, THEIRS: 15, "page": 5, "batch": 15}
STARTS = 3
"""Times that a connection, or the genuine bindings, are started."""
FLUSHED = 4
"""Listings after each of those that begin with no cache."""
PATIENCE = 15.0
"""Seconds of a scalar listing from which on its time is projected by the reads that were done."""
HURRY = 2.0
"""The same where there are a hundred thousand reads."""
ENOUGH = 5.0
"""Seconds of listing by one strategy after which it is not listed again."""
TRIES = 5
"""Times that a listing is begun whose list changed under it."""
SIZES = (100, 300, 1000)
ROUND_TRIPS = (10e-6, 30e-6, 100e-6, 300e-6, 1e-3, 3e-3, 10e-3)
"""Seconds added to a round trip."""
EMPTY = 200
"""Empty requests by which a round trip is measured."""


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", choices=list(kernels()), help="of the lab VM")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for paper.md, .json and .svg")
    options = parser.parse_args()
    console = Console(width=110 if not sys.stdout.isatty() else min(110, Console().width), highlight=False)
    try:
        paper = _measure(options.kernel)
    except (ImageError, LabError, LibvmiError, MissingError, RuntimeError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for title, rows in paper_page.tables(paper):
        report.terminal(title, rows, console)
    options.output.mkdir(exist_ok=True)
    (options.output / "paper.md").write_text(paper_page.document(paper))
    (options.output / "paper.json").write_text(json.dumps(results.rounded(asdict(paper)), indent=1) + "\n")
    (options.output / "paper.svg").write_text(paper_page.drawn(paper))
    return 0


def _measure(kernel: str | None) -> Paper:
    with hosts.lab(kernel) as lab, contextlib.ExitStack() as ends:
        agents = dict.fromkeys(READ, lab.agent) | {THEIRS: variants.beside(lab.vm, lab.agent, variants.SEQUENTIAL)}
        measured = _Lab(lab, agents, ends)
        for name in workloads.LISTINGS:
            for size in SIZES:
                measured.list(name, size)
        release, where = lab.kernel, lab.where
    port = _free_port()
    with variants.here(variants.PLAIN, f"tcp://127.0.0.1:{port}") as agent, contextlib.ExitStack() as ends:
        direct, floor, distances = _over_delays(agent, port, hosts.Here(agent, ends))
    return Paper(
        kernel=release,
        where=where,
        here=f"Linux {os.uname().release.split('-')[0]}, this machine",
        machine=results.machine(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        load=max(measured.load, os.getloadavg()[0]),
        cpus=os.cpu_count() or 0,
        direct=direct,
        floor=floor,
        cases=measured.cases,
        distances=distances,
    )


# ---- one listing -----------------------------------------------------------------------------------------------------


@dataclass
class _Connected:
    """A guest by one strategy, and what the script needs to know of it."""

    strategy: str
    guest: AgentGuest
    vmi: Libvmi
    at: workloads.Offsets

    @classmethod
    def to(cls, strategy: str, agent: InstalledAgent) -> _Connected:
        guest = agent.connect("paper", READ[strategy])
        return cls(strategy, guest, Libvmi.over(guest), hosts.find(guest.profile))

    def cost(self, name: str, reads: int, check: Callable[[list[Any]], None]) -> Cost:
        """Of one listing, in the steady state."""
        link = self.guest.link
        for _ in range(3 if READ[self.strategy] == "batch" else 0):  # what this script reads is learned
            self.once(name, reads)
        seconds: list[float] = []
        requests = carried = 0
        while len(seconds) < RUNS[self.strategy] and sum(seconds) < ENOUGH:
            if self.strategy == "page":
                self.vmi.pagecache_flush()  # a listing on fresh memory each time, as the others have it
            before = link.requests, link.bytes_sent + link.bytes_received
            taken, found, done = self.once(name, reads)
            requests, carried = link.requests - before[0], link.bytes_sent + link.bytes_received - before[1]
            if found is None:
                share = reads / done
                return Cost([taken * share], round(requests * share), round(carried * share), projected=True)
            check(found)
            seconds.append(taken)
        return Cost(seconds, requests, carried)

    def once(self, name: str, reads: int) -> tuple[float, list[Any] | None, int]:
        """Seconds, what was found, None if that was not all, and calls made. Again, when the list changed meanwhile."""
        for left in reversed(range(TRIES)):
            counting = hosts.Counting(self.vmi, 2 * reads + 1000, HURRY if reads > 100_000 else PATIENCE)
            # Counting costs a microsecond a call: nothing beside a request for each, much beside one for all.
            vmi = cast(Libvmi, counting) if self.strategy == "scalar" else self.vmi
            begun = monotonic()
            try:
                found: list[Any] | None = workloads.LISTINGS[name](vmi, self.at)
            except hosts.TooLongError:
                found = None
            except (hosts.LostError, LibvmiError):
                if left:
                    continue
                raise RuntimeError(
                    f"the {name} changed each of {TRIES} times that {self.strategy} listed them"
                ) from None
            return monotonic() - begun, found, counting.calls
        raise AssertionError


# ---- the table -------------------------------------------------------------------------------------------------------


class _Lab:
    """The listings of one VM, as they are made."""

    def __init__(self, lab: hosts.Lab, agents: dict[str, InstalledAgent], ends: contextlib.ExitStack) -> None:
        self._lab, self._agents = lab, agents
        self._strategies = {strategy: _Connected.to(strategy, agent) for strategy, agent in agents.items()}
        for connected in self._strategies.values():
            ends.callback(connected.vmi.destroy)
        self._planted: dict[str, set[Any]] = {name: set() for name in workloads.LISTINGS}
        self.cases: list[Case] = []
        self.load = 0.0

    def list(self, name: str, size: int) -> None:
        """Plant until there are so many, and list them by each strategy."""
        batch = self._strategies["batch"]
        counting = hosts.Counting(batch.vmi)
        self._plant(name, size - len(workloads.LISTINGS[name](batch.vmi, batch.at)))
        there = len(workloads.LISTINGS[name](cast(Libvmi, counting), batch.at))
        costs: dict[str, Cost] = {}
        for strategy, connected in self._strategies.items():
            say(f"paper: {there:,} {name}, {strategy}")
            costs[strategy] = connected.cost(name, counting.calls, partial(self._check, name, strategy))
        costs["batch, flushed"] = Cost([workloads.flushed(batch.vmi, batch.at, name) for _ in range(FLUSHED)])
        for strategy in (THEIRS, "batch"):
            first = [inside.timed(partial(self._first, strategy, name))[0] for _ in range(STARTS)]
            costs[f"{strategy}, first"] = Cost(first)
        costs |= self._native(name)
        self.cases.append(Case(name, there, counting.calls, costs, self._buckets() if name == "sockets" else 0))
        self.load = max(self.load, os.getloadavg()[0])

    def _plant(self, name: str, count: int) -> None:
        planted, vm = self._planted[name], self._lab.vm
        if count <= 0:
            return
        say(f"paper: planting {count:,} {name}")
        if name == "processes":
            planted |= self._lab.plant_processes(count)
        elif name == "modules":
            prefix = f"planted{len(planted)}_"
            source = Path(plant_modules.__file__).read_text()
            vm.run("python3", "-c", source, prefix, str(count), timeout=300.0)
            planted |= {f"{prefix}{number}" for number in range(count)}
        elif count > 1:
            port = self._lab.plant_sockets(count // 2)
            planted |= {(port, end) for end in range(count // 2 * 2)}

    def _check(self, name: str, strategy: str, found: Sequence[Sequence[Any]]) -> None:
        """:raises RuntimeError: a listing lacks what was planted"""
        planted = self._planted[name]
        if name == "sockets":
            ports = {port for port, _ in planted}
            missing = len(planted) - sum(bool(ports & {row[0], row[1]}) for row in found)
        else:
            missing = len(planted - {row[0] for row in found})
        if missing:
            raise RuntimeError(f"{missing} of the planted {name} are not listed by {strategy}")

    def _first(self, strategy: str, name: str) -> None:
        with Libvmi.over(self._agents[strategy].connect("first", READ[strategy])) as vmi:
            workloads.listed(vmi, self._strategies[strategy].at, name)

    def _native(self, name: str) -> dict[str, Cost]:
        batch = self._strategies["batch"]
        runs = [self._lab.native(batch.vmi, batch.at, name, 5, flushed=FLUSHED) for _ in range(STARTS)]
        for run in runs:
            self._check(name, "native", run["found"])
        return {
            "native": Cost([seconds for run in runs for seconds in run["runs"]]),
            "native, flushed": Cost([seconds for run in runs for seconds in run["flushed"]]),
            "native, first": Cost([run["first"] for run in runs]),
        }

    def _buckets(self) -> int:
        scalar = self._strategies["scalar"]
        return scalar.vmi.read_32_va(scalar.at["tcp_hashinfo"] + scalar.at["inet_hashinfo ehash_mask"], 0) + 1


# ---- the figure ------------------------------------------------------------------------------------------------------


def _over_delays(agent: InstalledAgent, port: int, host: hosts.Here) -> tuple[float, float, list[Distance]]:
    """Milliseconds of an empty request, what a forwarder without a delay adds to that, and the workloads."""
    strategies = ("scalar", "page", "batch")
    with _connections(agent, strategies) as near:
        batch = near["batch"]
        missing = SIZES[1] - len(workloads.LISTINGS["processes"](batch.vmi, batch.at))
        host.plant_processes(max(missing, 0))
        direct = _empty(batch.guest)
        distances = []
        for name in (name for name in workloads.LISTINGS if workloads.HEADS[name] in batch.at):
            counting = hosts.Counting(batch.vmi)
            size = len(workloads.LISTINGS[name](cast(Libvmi, counting), batch.at))
            base = {}
            for strategy in strategies:
                say(f"paper: {size:,} {name} here, {strategy}")
                base[strategy] = near[strategy].cost(name, counting.calls, lambda found: None)
            distances.append(Distance(name, size, counting.calls, base))
    with delay.delayed(port, 0.0) as endpoint, _connections(_at(agent, endpoint), ("batch",)) as over:
        floor = _empty(over["batch"].guest) - direct
    for added in ROUND_TRIPS:
        with delay.delayed(port, added) as endpoint:
            # One connection after the other, as the forwarder carries them.
            with _connections(_at(agent, endpoint), ("batch",)) as over:
                measured = _empty(over["batch"].guest)
            for distance in distances:
                distance.delays.append(Delay(added * 1e3, measured, {}))
            for strategy in strategies:
                with _connections(_at(agent, endpoint), (strategy,)) as over:
                    for distance in distances:
                        say(f"paper: {distance.listing} with {plot.duration(added * 1e3)} added, {strategy}")
                        cost = over[strategy].cost(distance.listing, distance.reads, lambda found: None)
                        distance.delays[-1].costs[strategy] = cost
    return direct, floor, distances


def _at(agent: InstalledAgent, endpoint: str) -> InstalledAgent:
    return replace(agent, endpoint=endpoint)


@contextlib.contextmanager
def _connections(agent: InstalledAgent, strategies: Sequence[str]) -> Iterator[dict[str, _Connected]]:
    with contextlib.ExitStack() as ends:
        made = {strategy: _Connected.to(strategy, agent) for strategy in strategies}
        for connected in made.values():
            ends.callback(connected.vmi.destroy)
        yield made


def _empty(guest: AgentGuest) -> float:
    """Milliseconds of a request that asks for nothing."""
    begun = monotonic()
    taken: list[float] = []
    while len(taken) < EMPTY and monotonic() < begun + 1.0:
        taken.append(inside.timed(lambda: guest.remote.symbols([]))[0])
    return median(taken) * 1e3


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
