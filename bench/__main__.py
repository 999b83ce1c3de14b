"""``make bench``: three listings by one unchanged script, each way to read, on one VM in one run.

    python -m bench --kernel 6.1 --local

Prints tables, writes docs/benchmark.{md,json,svg} and the README's table. What ``--quick`` or ``--local`` alone measure
is only printed, unless ``--output`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from rich.console import Console

from bench import hosts, inside, report, results, variants, workloads
from bench.hosts import Host
from bench.results import Case, Cost, Ground, Part
from lab.environment import MissingError
from lab.kernels import kernels
from lab.launch import LabError
from lab.steps import ImageError, say
from vmishim.errors import LibvmiError
from vmishim.guests.agent import Strategy
from vmishim.libvmi import Libvmi, pause
from vmishim.readahead.readahead import ReadAhead
from vmishim.readahead.snapshot import Snapshot
from vmishim.wire.messages import Walk, encode

ROOT = Path(__file__).parents[1]
STRATEGIES: tuple[Strategy, ...] = ("scalar", "page", "batch")
FULL = 1 << 18
"""Buckets of a full-size TCP hash: what a machine with 32 GiB gets by itself."""
LONG = 4_000
"""Reads from which on one scalar run has to do."""
SAMPLE = 2_000
"""Reads that a scalar listing in an emulated guest is projected from, where it has a hundred times as many."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    tasks: tuple[int, ...]
    sockets: tuple[int, ...]
    runs: dict[str, int]


THOROUGH = Extent((100, 300, 1000), (20, 200, 2000), {"scalar": 5, "page": 9, "batch": 30, "native": 15})
QUICK = Extent((100, 300), (20, 200), {"scalar": 1, "page": 3, "batch": 10, "native": 5})


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n")[0])
    names = list(kernels())
    parser.add_argument("--kernel", action="append", default=[], choices=names, help="in a lab VM; may be repeated")
    parser.add_argument("--local", action="store_true", help="this machine's own kernel, as root")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and runs, no full-size TCP hash")
    parser.add_argument("--output", type=Path, help="folder for benchmark.md, .json and .svg (default: docs)")
    options = parser.parse_args()
    chosen: list[str | None] = options.kernel or ([] if options.local else [None])
    extent = QUICK if options.quick else THOROUGH
    console = Console(width=100 if not sys.stdout.isatty() else min(100, Console().width), highlight=False)
    grounds = []
    try:
        for name in chosen:
            grounds.append(_in_vm(name, extent, full=not options.quick))
            report.show(grounds[-1], console)
        if options.local:
            grounds.append(_here(extent))
            report.show(grounds[-1], console)
    except (ImageError, LabError, LibvmiError, MissingError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.output or (chosen and not options.quick):
        words = [word for name in options.kernel for word in ("--kernel", name)]
        words += ["--local"] * options.local + ["--quick"] * options.quick
        _write(grounds, options.output or ROOT / "docs", " ".join(["python -m bench", *words]))
    return 0


def _write(grounds: Sequence[Ground], folder: Path, command: str) -> None:
    folder.mkdir(exist_ok=True)
    of_fleet = folder / "fleet.json"
    known = json.loads(of_fleet.read_text()) if of_fleet.exists() else None
    (folder / "benchmark.md").write_text(report.document(grounds, command, known))
    record = {"command": command, "grounds": [results.as_json(ground) for ground in grounds]}
    (folder / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "benchmark.svg").write_text(report.plotted(grounds))
    if folder.resolve() == ROOT / "docs":
        readme = ROOT / "README.md"
        readme.write_text(report.marked(readme.read_text(), "bench", report.quote(grounds)))


# ---- where -----------------------------------------------------------------------------------------------------------


def _in_vm(name: str | None, extent: Extent, *, full: bool) -> Ground:
    with hosts.lab(name) as host, contextlib.closing(_Measured(host, extent)) as measured:
        measured.processes()
        measured.modules()
        for total in extent.sockets:
            measured.sockets(total)
        parts = measured.parts()
    cases, load = measured.cases, measured.load
    if full:
        with (
            hosts.lab(name, append=f"thash_entries={FULL}") as larger,
            contextlib.closing(_Measured(larger, extent)) as again,
        ):
            again.sockets(extent.sockets[-1])
            cases, load = [*cases, *again.cases], max(load, again.load)
    return measured.ground(cases, parts, load)


def _here(extent: Extent) -> Ground:
    with (
        variants.here(variants.PLAIN) as agent,
        contextlib.ExitStack() as ends,
        contextlib.closing(_Measured(hosts.Here(agent, ends), extent)) as measured,
    ):
        measured.processes()
        measured.modules()
        for total in extent.sockets:
            measured.sockets(total)
        return measured.ground(measured.cases, measured.parts(), measured.load)


# ---- what ------------------------------------------------------------------------------------------------------------


class _Measured:
    """The measurements of one host, as they are made."""

    def __init__(self, host: Host, extent: Extent) -> None:
        self._host, self._extent = host, extent
        self._guests = {strategy: host.connect(strategy) for strategy in STRATEGIES}
        self._vmis = {strategy: Libvmi.over(guest) for strategy, guest in self._guests.items()}
        self.at = hosts.find(self._guests["batch"].profile)
        self.cases: list[Case] = []
        self._planted: dict[str, set[int]] = {"processes": set(), "modules": set(), "sockets": set()}
        self._ports: dict[int, int] = {}
        self._first: dict[str, float] = {}
        self._first_of = 0
        self._cached: dict[str, float] = {}
        self._last_of = 0
        self.load = 0.0
        """The highest load average seen."""

    def close(self) -> None:
        """End the connections."""
        for vmi in self._vmis.values():
            vmi.destroy()

    def processes(self) -> None:
        """Measure each number of tasks; at the second one, what a first listing costs."""
        for step, total in enumerate(self._extent.tasks):
            missing = total - len(self._list("processes"))
            if missing > 0:
                self._planted["processes"] |= self._host.plant_processes(missing)
            case, native = self._measure("processes", cached=step == 1)
            self._last_of = case.size
            if step == 1:
                self._start(native, case.size)

    def modules(self) -> None:
        """Measure the modules there are, in a kernel that has any."""
        if "modules" in self.at:
            self._measure("modules")

    def sockets(self, total: int) -> None:
        """Measure about so many sockets, listeners aside."""
        pairs = (total - len(self._list("sockets"))) // 2
        if pairs > 0:
            self._ports[self._host.plant_sockets(pairs)] = 2 * pairs
        self._measure("sockets")

    def ground(self, cases: list[Case], parts: list[Part], load: float) -> Ground:
        """All of it."""
        return Ground(
            kernel=self._host.kernel,
            where=self._host.where,
            machine=results.machine(),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            cases=cases,
            first=self._first,
            first_of=self._first_of,
            cached=self._cached,
            parts=parts,
            parts_of=self._last_of,
            emulated=self._host.emulated,
            network=self._host.network,
            load=load,
            cpus=os.cpu_count() or 0,
        )

    def _list(self, name: str) -> list[Any]:
        return workloads.once(self._vmis["batch"], self.at, name)[1]

    def _measure(self, name: str, cached: bool = False) -> tuple[Case, workloads.Result | None]:
        counting = hosts.Counting(self._vmis["batch"])
        size = len(workloads.once(cast(Libvmi, counting), self.at, name)[1])
        buckets = self._buckets() if name == "sockets" else 0
        costs: dict[str, Cost] = {}
        for strategy in reversed(STRATEGIES):
            say(f"bench: {size:,} {name}{f' in {buckets:,} buckets' if buckets else ''}, {strategy}")
            costs[strategy] = self._cost(strategy, name, counting.calls)
        native = self._native(name, cached)
        if native is not None:
            self._check(name, "native", native["found"])
            costs["native"] = Cost(native["runs"])
        self.load = max(self.load, os.getloadavg()[0])
        ordered = {strategy: costs[strategy] for strategy in results.STRATEGIES if strategy in costs}
        self.cases.append(Case(name, size, counting.calls, ordered, buckets))
        return self.cases[-1], native

    def _cost(self, strategy: Strategy, name: str, reads: int) -> Cost:
        vmi, link = self._vmis[strategy], self._guests[strategy].link
        if strategy == "scalar" and self._host.emulated and reads > 100 * SAMPLE:
            return self._projected(reads)
        runs = 1 if strategy == "scalar" and reads > LONG else self._extent.runs[strategy]
        # Batch has learned after these what this script reads; the others have nothing to learn.
        for _ in range(3 if strategy == "batch" else 0):
            workloads.once(vmi, self.at, name)
        before = link.requests, link.bytes_sent + link.bytes_received
        seconds = []
        for _ in range(runs):
            if strategy == "page":
                vmi.pagecache_flush()  # a listing on fresh memory each time, as batch has it
            taken, found = workloads.once(vmi, self.at, name)
            seconds.append(taken)
            self._check(name, strategy, found)
        requests, carried = link.requests - before[0], link.bytes_sent + link.bytes_received - before[1]
        return Cost(seconds, round(requests / runs), round(carried / runs))

    def _projected(self, reads: int) -> Cost:
        """What the scalar listing of a table would cost, by its first buckets."""
        vmi, link = self._vmis["scalar"], self._guests["scalar"].link
        table = vmi.read_addr_va(self.at["tcp_hashinfo"] + self.at["inet_hashinfo ehash"], 0)
        before = link.bytes_sent + link.bytes_received
        seconds = [inside.timed(lambda at=at: vmi.read_addr_va(at, 0))[0] for at in range(table, table + 8 * SAMPLE, 8)]  # type: ignore[misc]
        carried = link.bytes_sent + link.bytes_received - before
        return Cost([sum(seconds) / SAMPLE * reads], reads, carried * reads // SAMPLE, projected=True)

    def _native(self, name: str, cached: bool = False) -> workloads.Result | None:
        return self._host.native(self._vmis["batch"], self.at, name, self._extent.runs["native"], cached=cached)

    def _check(self, name: str, strategy: str, found: list[Any]) -> None:
        """:raises RuntimeError: a listing lacks what was planted"""
        if name == "processes":
            missing = len(self._planted[name] - {row[0] for row in found})
        elif name == "sockets":
            missing = sum(count - sum(port in (row[0], row[1]) for row in found) for port, count in self._ports.items())
        else:
            missing = not found
        if missing:
            raise RuntimeError(f"{missing} of the planted {name} are not listed by {strategy}")

    def _buckets(self) -> int:
        return self._vmis["scalar"].read_32_va(self.at["tcp_hashinfo"] + self.at["inet_hashinfo ehash_mask"], 0) + 1

    def _start(self, native: workloads.Result | None, size: int) -> None:
        """What a first listing costs, connection and all; and a cached read."""
        self._first_of = size
        for strategy in STRATEGIES:
            taken = [inside.timed(lambda strategy=strategy: self._first_listing(strategy))[0] for _ in range(3)]  # type: ignore[misc]
            self._first[strategy] = median(taken) * 1e3
            if strategy != "scalar":  # which keeps nothing
                self._cached[strategy] = (
                    median(workloads.cached_read(self._vmis[strategy], self.at) for _ in range(5)) * 1e9
                )
        if native is not None:
            self._first["native"], self._cached["native"] = native["first"] * 1e3, native["cached"] * 1e9

    def _first_listing(self, strategy: Strategy) -> None:
        with Libvmi.over(self._host.connect(strategy)) as vmi:
            workloads.listed(vmi, self.at, "processes")

    def parts(self) -> list[Part]:
        """Where the time of a batch listing of processes goes."""
        say("bench: where the time goes")
        runs = self._extent.runs["batch"]
        guest, vmi = self._guests["batch"], self._vmis["batch"]
        whole = self._median(lambda: self._list("processes"), runs)
        with pause(vmi):
            self._list("processes")
            reads = self._median(lambda: self._list("processes"), runs)
        reader = guest.reader
        assert isinstance(reader, ReadAhead)
        tasks = next(listing for listing in reader.listings.values() if listing.kernel_list.name == "tasks")
        stage = tasks.fields.stages[0]
        plan = tasks.plan
        request = encode(Walk(plan, [], b""))
        empty = self._median(lambda: guest.remote.symbols([]), runs)
        exchange = self._median(lambda: guest.link.exchange(request), runs)
        agent = self._host.inside(request, runs)
        (chunk,) = guest.remote.walk(plan)
        opened = inside.cryptography(len(chunk.bulk), runs)[1]
        taken_in = self._median(lambda: Snapshot().add(plan, stage, chunk.bulk), runs)
        carried = exchange - empty - agent["answer"] - agent["seal"] - opened
        kept = whole - reads - exchange - taken_in
        size = f"{len(chunk.bulk):,} bytes"
        found = (
            ("the script and its cached reads", reads, "IDS, Python"),
            ("round trip of an empty request", empty, "both, network"),
            ("walking the list", agent["walk"], "guest, eBPF"),
            ("decoding the request, building the reply", agent["answer"] - agent["walk"], "guest, Python"),
            (f"sealing {size}", agent["seal"], "guest, cryptography"),
            (f"carrying {size}", carried, "network"),
            (f"opening {size}", opened, "IDS, cryptography"),
            ("turning records into cells", taken_in, "IDS, Python"),
            ("storing cells, dropping old ones", kept, "IDS, Python"),
        )
        return [Part(what, max(seconds, 0.0) * 1e3, where) for what, seconds, where in found]

    @staticmethod
    def _median(call: Any, runs: int) -> float:
        return median(inside.timed(call)[0] for _ in range(runs))


if __name__ == "__main__":
    sys.exit(main())
