"""Soak: list a guest's processes, sockets and modules for a long time, all of which come and go, while the agent is
killed and the network is cut; hold every listing to what was planted.

    python -m trials.soak                            an hour
    python -m trials.soak --minutes 2 --seed 7       the same choices as any other run with this seed

Exit status 0 only if no listing was wrong, every outage ended in recovery, and neither side has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import random
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.agent import InstalledAgent, install
from lab.launch import LabError
from lab.steps import ImageError, say
from lab.vm import LabVM
from trials.soak.forwarder import Forwarder
from trials.soak.observed import LISTINGS, PLANTED, reader
from trials.soak.outages import KINDS as OUTAGES
from trials.soak.outages import SERVICE, Counts, Outages
from trials.soak.truth import KINDS, Entry, Interval, Kind, Truth
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests.agent import AgentGuest, Strategy, connect
from vmishim.libvmi import Libvmi, pause

MODULES = "ts_kmp", "ts_bm", "ts_fsm", "crc7"
"""Modules that nothing depends on; the first stays loaded."""
STAYING = 20
"""Processes planted in the container for the whole time."""
TIMEOUT = 5.0
"""Timeout of an answer in seconds, the default."""
TRIES = 3
"""How often a torn list is read before giving up."""
WARM_UP = 20.0
"""Seconds before a side's size is first measured."""
HOST_GROWTH, AGENT_GROWTH = 16 << 10, 8 << 10
"""KiB that either side's memory may grow by after that."""
DESCRIPTORS_GROWTH = 2
SHOWN = 20
"""How many wrong answers are recorded in full."""


@dataclass(frozen=True)
class Size:
    """The resources of a process."""

    pid: int
    kib: int
    """Its resident memory."""
    descriptors: int


@dataclass
class Figures:
    """The result of a soak."""

    seed: str
    minutes: float
    kernel: str = ""
    listings: dict[str, int] = field(default_factory=dict)
    """Correct listings, by strategy, kind and whether they were made in a hold."""
    requests: int = 0
    handshakes: int = 0
    came_and_went: dict[str, int] = field(default_factory=dict)
    interrupted: int = 0
    """Listings that ended with a LinkError, all during an outage."""
    torn: int = 0
    """Listings that met something that ended meanwhile, reported it, and were repeated."""
    wrong: int = 0
    wrong_answers: list[str] = field(default_factory=list)
    outages: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind: how many there were, and the longest recovery in seconds."""
    sizes: dict[str, list[Size]] = field(default_factory=lambda: {"host": [], "agent": []})
    """First and last."""
    failures: list[str] = field(default_factory=list)
    """Why this soak failed; empty if it passed."""


class Soak:
    """One run.

    :param agent: in ``vm``
    :param seed: decides on all that is left to chance
    """

    def __init__(self, vm: LabVM, agent: InstalledAgent, minutes: float, seed: str) -> None:
        self.figures = Figures(seed, minutes, vm.image.release)
        self._vm, self._agent = vm, agent
        self._random = random.Random(f"{seed} listings")
        self._seconds = 60.0 * minutes
        self._truth = Truth()
        self._forwarder = Forwarder(vm.port)
        self._guests: dict[Strategy, AgentGuest] = {}
        self._readers: dict[Strategy, Any] = {}
        self._let_go = Counts(0, 0)

    def run(self) -> Figures:
        """Run the soak. :raises LabError: the VM lacks what the soak needs"""
        outages = Outages(self._vm, self._forwarder, f"{self.figures.seed} outages", self._counts)
        with contextlib.ExitStack() as stack:
            stack.callback(self._forwarder.close)
            stack.callback(self._let_all_go)
            self._plant(stack)
            for strategy in ("batch", "scalar"):
                self._open(strategy)
            outages.start()
            stack.callback(outages.stop)
            self._list_on(outages)
            self._sum_up(outages)
        return self.figures

    def _list_on(self, outages: Outages) -> None:
        """List until the time is over and every kind of event has happened."""
        sizes, begun = self.figures.sizes, time.monotonic()
        end, told = begun + self._seconds, begun
        warm = {"host": begun + WARM_UP, "agent": math.inf}
        while not outages.over:
            self._round(outages)
            now = time.monotonic()
            # One agent has to run for long, or a leak would not show.
            if not outages.spare_agent and outages.complete and now > (begun + end) / 2:
                outages.spare_agent = True
                warm["agent"] = now + WARM_UP
                end = max(end, now + 2 * WARM_UP)
            for side, when in warm.items():
                if now > when and not sizes[side] and outages.quiet.acquire(blocking=False):
                    try:
                        sizes[side].append(self._size(side))
                    finally:
                        outages.quiet.release()
            if now > end and all(sizes.values()):
                outages.stop()
            if now > told + 10:
                told = now
                self._tell(now - begun, outages)
        if outages.error is None:
            for side in sizes:
                sizes[side].append(self._size(side))

    # ---- the guest ---------------------------------------------------------------------------------------------------

    def _plant(self, stack: contextlib.ExitStack) -> None:
        for line in self._vm.read("/proc/modules").decode().splitlines():
            name = line.split()[0]
            self._truth.plant("module", name, (name,))
        pids = self._vm.spawn("sleep", "infinity", count=STAYING, comm=PLANTED)
        stack.callback(self._vm.kill, pids)
        for pid in pids:
            self._truth.plant("process", f"{PLANTED} {pid}", (PLANTED, pid, 0))
        stack.callback(self._truth.close)
        self._truth.churn(self._vm, f"{self.figures.seed} churn", MODULES)

    def _open(self, strategy: Strategy) -> None:
        if strategy in self._guests:
            self._let_one_go(strategy)
        entry = replace(self._agent.domain(timeout=TIMEOUT), agent=f"tcp://127.0.0.1:{self._forwarder.port}")
        guest = connect(entry, strategy, self._agent.private)
        self._guests[strategy], self._readers[strategy] = guest, reader(Libvmi.over(guest))

    def _let_one_go(self, strategy: Strategy) -> None:
        guest = self._guests.pop(strategy)
        link, before = guest.link, self._let_go
        self._readers.pop(strategy).vmi.destroy()
        self._let_go = Counts(before.answers + link.requests, before.handshakes + link.handshakes)

    def _let_all_go(self) -> None:
        for strategy in list(self._guests):
            self._let_one_go(strategy)

    def _counts(self) -> Counts:
        links = [guest.link for guest in list(self._guests.values())]
        return Counts(
            self._let_go.answers + sum(link.requests for link in links),
            self._let_go.handshakes + sum(link.handshakes for link in links),
        )

    # ---- listings ----------------------------------------------------------------------------------------------------

    def _round(self, outages: Outages) -> None:
        """Make one listing and judge it."""
        strategy: Strategy = "scalar" if self._random.random() < 0.1 else "batch"
        kind = self._random.choice(KINDS)
        held = self._random.random() < 0.5
        reconnect = self._random.random() < 0.05
        begun = time.monotonic()
        for _ in range(TRIES):
            try:
                if reconnect or strategy not in self._guests:
                    self._open(strategy)
                with self._interval(strategy) as interval:
                    listed = self._list(strategy, kind, held)
            except LinkError as error:
                if not outages.since(begun):
                    self._wrong([f"{strategy}: no answer, and nothing was broken: {error}"])
                self.figures.interrupted += 1
                return
            except LibvmiError:
                self.figures.torn += 1
                continue
            wrong = interval.wrong(kind, listed)
            self._wrong([f"{strategy}{', held' if held else ''}: {each}" for each in wrong])
            name = f"{strategy} {kind}{' held' if held else ''}"
            self.figures.listings[name] = self.figures.listings.get(name, 0) + (not wrong)
            return
        self._wrong([f"{strategy}: {kind} could not be listed in {TRIES} tries"])

    @contextlib.contextmanager
    def _interval(self, strategy: Strategy) -> Iterator[Interval]:
        """The interval of a listing. Scalar reads of a changing list promise nothing, so for them nothing changes."""
        self._truth.change()  # a change, so that cached answers are out of date
        if strategy == "scalar":
            self._truth.hold_still()
        interval = Interval(self._truth)
        try:
            yield interval
        finally:
            interval.close()
            if strategy == "scalar":
                self._truth.go_on()

    def _list(self, strategy: Strategy, kind: Kind, held: bool) -> list[tuple[str, Entry]]:
        linux = self._readers[strategy]
        if not held:
            return list(LISTINGS[kind](linux))
        with pause(linux.vmi):
            first = list(LISTINGS[kind](linux))
            if strategy == "batch":
                self._truth.change()
            again = list(LISTINGS[kind](linux))
        # The scalar strategy caches nothing, so a hold has no effect on it.
        if strategy == "batch" and first != again:
            self._wrong([f"{kind}: one hold shows {first} and then {again}"])
        return again

    def _wrong(self, said: list[str]) -> None:
        self.figures.wrong += len(said)
        self.figures.wrong_answers += said[: SHOWN - len(self.figures.wrong_answers)]
        for each in said:
            say(f"soak: WRONG: {each}")

    # ---- figures -----------------------------------------------------------------------------------------------------

    def _size(self, side: str) -> Size:
        """The resources of a side while both of its connections are up."""
        for strategy in ("batch", "scalar"):
            if strategy not in self._guests:
                self._open(strategy)
            self._guests[strategy].flush()
            next(iter(LISTINGS["process"](self._readers[strategy])))
        if side == "host":
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return Size(os.getpid(), pages * resource.getpagesize() >> 10, len(os.listdir("/proc/self/fd")))
        pid = self._vm.run("systemctl", "show", "-P", "MainPID", SERVICE).stdout.decode().strip()
        status = self._vm.read(f"/proc/{pid}/status").decode()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        return Size(int(pid), kib, len(self._vm.run("ls", f"/proc/{pid}/fd").stdout.split()))

    def _tell(self, seconds: float, outages: Outages) -> None:
        figures = self.figures
        longest = max((outage.recovery or 0 for outage in outages.all), default=0)
        say(
            f"soak: {seconds:.0f} s of {self._seconds:.0f}: {sum(figures.listings.values())} listings, "
            f"{len(outages.all)} outages, longest recovery {longest:.1f} s, {figures.wrong} wrong"
        )

    def _sum_up(self, outages: Outages) -> None:
        figures = self.figures
        figures.requests, figures.handshakes = self._counts()
        figures.came_and_went = {str(kind): count for kind, count in self._truth.changes.items()}
        for kind in OUTAGES:
            recoveries = [outage.recovery for outage in outages.all if outage.kind == kind]
            longest = max((each for each in recoveries if each is not None), default=0.0)
            figures.outages[kind] = {"count": len(recoveries), "longest_recovery": round(longest, 2)}
        failures = figures.failures
        failures += [f"{figures.wrong} wrong answers"] if figures.wrong else []
        failures += [f"no recovery: {outages.error}"] if outages.error else []
        failures += [f"no {kind} came and went" for kind, count in figures.came_and_went.items() if not count]
        failures += [f"{kind} never happened" for kind, of in figures.outages.items() if not of["count"]]
        failures += [
            f"no {strategy} listing" for strategy in ("batch", "scalar") if not _some(figures.listings, strategy)
        ]
        for side, growth in (("host", HOST_GROWTH), ("agent", AGENT_GROWTH)):
            if len(figures.sizes[side]) != 2:
                continue  # the missing recovery is reported above
            first, last = figures.sizes[side]
            if first.pid != last.pid:
                failures.append(f"the {side} process was replaced, though the soak did not end it")
            if last.kib > first.kib + growth or last.descriptors > first.descriptors + DESCRIPTORS_GROWTH:
                failures.append(f"the {side} process grew from {first} to {last}")


def _some(listings: dict[str, int], strategy: Strategy) -> bool:
    return any(count for name, count in listings.items() if name.startswith(strategy))


def show(figures: Figures) -> None:
    """Print it."""
    for name, value in asdict(figures).items():
        if isinstance(value, dict):
            value = "; ".join(f"{key}: {entry}" for key, entry in value.items())
        print(f"{name.replace('_', ' '):<16}{value}")


def main(arguments: list[str] | None = None) -> int:
    """Boot, soak, print, write. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trials.soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the soak (%(default)g)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="seed of all random choices")
    parser.add_argument("--kernel", help="a name of ci/kernels.toml (its default)")
    parser.add_argument("--output", type=Path, default=Path("build/soak.json"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    say(f"soak: {options.minutes:g} minutes, --seed {options.seed}")
    try:
        with LabVM.boot(options.kernel) as vm:
            figures = Soak(vm, install(vm), options.minutes, options.seed).run()
    except (ImageError, LabError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    show(figures)
    return 1 if figures.failures else 0


if __name__ == "__main__":
    sys.exit(main())
