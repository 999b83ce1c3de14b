"""What it costs that the kernel encrypts what is read: an agent for which it does beside one that encrypts by itself.

    python -m bench.sealed --local --kernel 6.12

Reads of planted memory and a listing of tasks, by both agents in turns, timed where the IDS is. What the kernel sealed
goes through the session's own encryption too, so the difference is what sealing adds. Writes docs/security.md's table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

from bench import report
from bench.machine import Machine, here, inside
from bench.variants import RunningAgent
from lab.kernels import kernels
from lab.launch import find_accelerator
from lab.vm import LabVM
from vmishim.errors import LibvmiError
from vmishim.inspection import objects
from vmishim.libvmi import Libvmi

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
SIZES = (8, 4 << 10, 64 << 10, 1 << 20)
"""Bytes of a read."""
TASKS = 300
RUNS = 30
"""Listings of each kind by each agent, after three that do not count."""


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.sealed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--local", action="store_true", help="this machine's own kernel, as root")
    parser.add_argument("--kernel", action="append", default=[], choices=list(kernels()), help="one in a lab VM")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, by each agent (%(default)s)")
    parser.add_argument("--to", type=Path, default=PAGE, help="page whose table to write (%(default)s)")
    options = parser.parse_args()
    tables = []
    try:
        if options.local or not options.kernel:
            with here() as machine, _sleepers(TASKS - len(_tasks(machine.plain))):
                tables.append(_measure(f"Linux {os.uname().release}, this machine", machine, options.runs))
        for name in options.kernel:
            with LabVM.boot(name) as vm, inside(vm) as machine:
                vm.spawn("sleep", "infinity", count=max(TASKS - len(_tasks(machine.plain)), 1), timeout=300)
                where = f"Linux {vm.image.release}, lab VM ({find_accelerator(vm.image)})"
                tables.append(_measure(where, machine, options.runs))
    except (LibvmiError, RuntimeError) as error:
        print(f"sealed: {error}", file=sys.stderr)
        return 1
    text = "\n\n".join(tables)
    print(text)
    options.to.write_text(report.marked(options.to.read_text(), "sealed", text))
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


def _tasks(agent: RunningAgent) -> list[objects.Task]:
    with Libvmi.over(agent.connect()) as vmi:
        return _list(vmi)


def _list(vmi: Libvmi) -> list[objects.Task]:
    return list(objects.tasks(vmi))


def _measure(where: str, machine: Machine, runs: int) -> str:
    """A table in Markdown."""
    rows = []
    with closing(machine.plain.connect()) as plain, closing(machine.sealing.connect()) as sealing:
        guests = plain, sealing
        for size in SIZES:
            times = _times([partial(guest.remote.read, machine.ground.address, size) for guest in guests], runs)
            rows.append(_row(f"a read of {size:,} bytes", *times, size))
        vmis = [Libvmi.over(guest) for guest in guests]
        times = _times([partial(_list, vmi) for vmi in vmis], runs)
        rows.append(_row(f"a list of {len(_list(vmis[0])):,} tasks", *times))
    head = ("", "the agent encrypts, us", "the kernel, us", "ratio", "more, ns a KiB")
    lines = (head, ("---", *["---:"] * 4), *rows)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{where}; medians of {runs}, load {os.getloadavg()[0]:.1f}:\n\n{table}"


def _row(what: str, agents: float, kernels: float, size: int = 0) -> tuple[str, ...]:
    more = f"{(kernels - agents) * 1e9 / (size / 1024):,.0f}" if size >= 1024 else ""
    return what, f"{agents * 1e6:,.0f}", f"{kernels * 1e6:,.0f}", f"{kernels / agents:.2f}x", more


def _times(calls: Sequence[Callable[[], object]], runs: int) -> tuple[float, float]:
    """Median seconds of each of two calls, made in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(-3, runs):
        for call, taken in zip(calls, seconds, strict=True):
            begun = perf_counter()
            call()
            if run >= 0:
                taken.append(perf_counter() - begun)
    one, other = map(median, seconds)
    return one, other


if __name__ == "__main__":
    sys.exit(main())
