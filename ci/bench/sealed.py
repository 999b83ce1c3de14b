"""What it costs that the kernel encrypts what is read: an agent for which it does beside one that encrypts by itself.

    python -m ci.bench.sealed --local --kernel 6.12

Reads of planted memory and a listing of tasks, by both agents in turns, timed where the IDS is. What the kernel sealed
goes through the session's own encryption too, so the difference is what sealing adds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from statistics import median
from time import perf_counter

from rich import box
from rich.console import Console
from rich.table import Table

from ci.bench.variants import RunningAgent
from ci.machine import Machine, here, inside
from ci.vm import image
from ci.vm.lab import LabVM, find_accelerator
from vmishim import lists
from vmishim.errors import LibvmiError
from vmishim.libvmi import Libvmi

SIZES = (8, 4 << 10, 64 << 10, 1 << 20)
"""Bytes of a read."""
TASKS = 300
RUNS = 30
"""Of each, by each agent, after three that do not count."""


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ci.bench.sealed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--local", action="store_true", help="this machine's own kernel, as root")
    parser.add_argument("--kernel", action="append", default=[], choices=list(image.kernels()), help="one in a lab VM")
    options = parser.parse_args()
    try:
        if options.local or not options.kernel:
            with here() as machine, _sleepers(TASKS - len(_tasks(machine.plain))):
                _measure(f"Linux {os.uname().release}, this machine", machine)
        for name in options.kernel:
            with LabVM.boot(name) as vm, inside(vm) as machine:
                vm.spawn("sleep", "infinity", count=max(TASKS - len(_tasks(machine.plain)), 1), timeout=300)
                _measure(f"Linux {vm.image.release}, lab VM ({find_accelerator(vm.image)})", machine)
    except (LibvmiError, RuntimeError) as error:
        print(f"sealed: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _sleepers(count: int) -> Iterator[None]:
    started = [subprocess.Popen(["sleep", "infinity"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _tasks(agent: RunningAgent) -> list[lists.Task]:
    with Libvmi.over(agent.connect()) as vmi:
        return _list(vmi)


def _list(vmi: Libvmi) -> list[lists.Task]:
    return list(lists.tasks(vmi))


def _measure(where: str, machine: Machine) -> None:
    columns = "", "by the agent, us", "by the kernel, us", "ratio", "more, ns a KiB"
    table = Table(box=box.SIMPLE, title=f"{where}, load {os.getloadavg()[0]:.1f}: who encrypts; medians of {RUNS}")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    with closing(machine.plain.connect()) as plain, closing(machine.sealing.connect()) as sealing:
        guests = plain, sealing
        for size in SIZES:
            agents, kernels = _times([partial(guest.remote.read, machine.ground.address, size) for guest in guests])
            more = f"{(kernels - agents) * 1e9 / (size / 1024):,.0f}" if size >= 1024 else ""
            table.add_row(f"a read of {size:,} bytes", *_cells(agents, kernels), more)
        vmis = [Libvmi.over(guest) for guest in guests]
        agents, kernels = _times([partial(_list, vmi) for vmi in vmis])
        table.add_row(f"a list of {len(_list(vmis[0])):,} tasks", *_cells(agents, kernels), "")
    Console().print(table)


def _times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, made in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(-3, RUNS):
        for call, taken in zip(calls, seconds, strict=True):
            begun = perf_counter()
            call()
            if run >= 0:
                taken.append(perf_counter() - begun)
    return [median(taken) for taken in seconds]


def _cells(agents: float, kernels: float) -> tuple[str, str, str]:
    return f"{agents * 1e6:,.0f}", f"{kernels * 1e6:,.0f}", f"{kernels / agents:.2f}x"


if __name__ == "__main__":
    sys.exit(main())
