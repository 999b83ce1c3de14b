"""What a walk costs as its list grows: planted lists of 100 to 100,000 nodes, walked through agent and encrypted link.

    python -m bench.scale --local --kernel 6.1 --kernel 6.12

Of each node 64 bytes are collected; time runs from the request until the last record is unpacked here. Each length is
walked by an agent that walks the next chunk ahead while the network carries the one before, and by one beside it that
does not, in turns. Writes docs/scale.json and docs/scale.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import plot, variants
from lab import planter
from lab.agent import InstalledAgent, install
from lab.kernels import kernels
from lab.launch import find_accelerator
from lab.planter import Layout, Planter
from lab.vm import LabVM
from vmishim.errors import LibvmiError
from vmishim.guests.agent import AgentGuest
from vmishim.wire.plan import Plan, Step, Take

ROOT = Path(__file__).parents[1]
LENGTHS = (100, 1_000, 10_000, 100_000)
COLLECTED = 64
"""Bytes of each node."""
NODE = 80
"""Bytes of a node: what is collected, and its link behind that."""
RUNS = {100: 60, 1_000: 60, 10_000: 30, 100_000: 15}
"""Walks of each length by each agent, after one that does not count."""


@dataclass(frozen=True)
class Agent:
    """An agent that runs, and a guest connected to it."""

    guest: AgentGuest
    status: Callable[[], str]
    """Its ``/proc/PID/status``."""
    forget_peak: Callable[[], object]
    """Make the kernel reset its peak memory (proc(5), clear_refs)."""

    def kib(self, field: str) -> int:
        """``VmRSS``, or ``VmHWM``, the peak."""
        return int(self.status().split(f"{field}:")[1].split()[0])


Agents = dict[bool, Agent]
"""Two agents of one kernel, by whether they walk ahead."""


@dataclass(frozen=True)
class Point:
    """What walking one length cost: medians, and the fastest walk, which a busy machine disturbs least."""

    nodes: int
    requests: int
    received: int
    """Bytes of the reply frames."""
    ms: float
    fastest_ms: float
    ms_without: float
    """By the agent that does not walk ahead."""
    fastest_ms_without: float
    gain: float
    """Median of how many times longer that took than the walk next to it."""

    @property
    def per_node(self) -> float:
        """Nanoseconds."""
        return self.ms * 1e6 / self.nodes


@dataclass(frozen=True)
class Curve:
    """The measurements of one kernel."""

    kernel: str
    where: str
    load: float
    """Processes that wanted a CPU in the minute before (proc(5), loadavg)."""
    points: list[Point]
    resting_kib: int
    """The agent's memory before its first walk ..."""
    peak_kib: int
    """... and at most during all of them."""


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--local", action="store_true", help="this machine's own kernel, as root")
    parser.add_argument("--kernel", action="append", default=[], choices=list(kernels()), help="one in a lab VM")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "docs", help="folder for scale.json and scale.svg (%(default)s)"
    )
    options = parser.parse_args()
    curves = []
    try:
        if options.local or not options.kernel:
            with planter.here() as ground, _local(True) as ahead, _local(False) as idle:
                release = os.uname().release.split("-")[0]
                curves.append(_measure(release, "this machine", ground, {True: ahead, False: idle}))
                _show(curves[-1])
        for name in options.kernel:
            with LabVM.boot(name) as vm:
                with _in_vm(vm) as agents, planter.inside(vm) as ground:
                    where = f"lab VM ({find_accelerator(vm.image)})"
                    curves.append(_measure(vm.image.release, where, ground, agents))
                _show(curves[-1])
    except (LibvmiError, RuntimeError) as error:
        print(f"scale: {error}", file=sys.stderr)
        return 1
    options.to.mkdir(exist_ok=True)
    record = {"machine": _machine(), "collected_bytes": COLLECTED, "curves": [_as_json(curve) for curve in curves]}
    (options.to / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.to / "scale.svg").write_text(drawn(curves))
    return 0


def _measure(kernel: str, where: str, ground: Planter, agents: Agents) -> Curve:
    points, ahead = [], agents[True]
    load = os.getloadavg()[0]
    resting = ahead.kib("VmRSS")
    ahead.forget_peak()
    for length in LENGTHS:
        plan, expected = _plant(ground, length)
        for agent in agents.values():
            if _walk(agent.guest, plan)[1] != expected:
                raise RuntimeError(f"a walk of {length} nodes did not bring what was planted")
        link = ahead.guest.link
        before = link.requests, link.bytes_received
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for run in range(RUNS[length]):
            for way in (True, False) if run % 2 else (False, True):
                seconds[way].append(_walk(agents[way].guest, plan)[0])
        requests, received = link.requests - before[0], link.bytes_received - before[1]
        points.append(
            Point(
                length,
                requests // RUNS[length],
                received // RUNS[length],
                1e3 * median(seconds[True]),
                1e3 * min(seconds[True]),
                1e3 * median(seconds[False]),
                1e3 * min(seconds[False]),
                median(without / with_ for with_, without in zip(seconds[True], seconds[False], strict=True)),
            )
        )
    return Curve(kernel, where, round(load, 2), points, resting, ahead.kib("VmHWM"))


def _plant(ground: Planter, length: int) -> tuple[Plan, list[tuple[int, int]]]:
    """A ring in kernel memory: the plan that walks it, and (node, its number) in order."""
    layout = Layout(ground)
    head = layout.room(16)
    nodes = layout.nodes(length, NODE)
    layout.ring([head, *(node + COLLECTED for node in nodes)])
    layout.plant()
    plan = Plan(head, Step.RING, (Take(0, 0, COLLECTED),), link=COLLECTED)
    return plan, [(node, number) for number, node in enumerate(nodes)]


def _walk(guest: AgentGuest, plan: Plan) -> tuple[float, list[tuple[int, int]]]:
    """Seconds of a walk, and (node, its first word) of what it brought."""
    begun = perf_counter()
    rows = [row for chunk in guest.remote.walk(plan) for row in plan.records(chunk.bulk)]
    ended = perf_counter()
    return ended - begun, [(row[0], int.from_bytes(row[4][:8], "little")) for row in rows]


# ---- agents ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _local(ahead: bool) -> Iterator[Agent]:
    with variants.here(variants.PLAIN if ahead else variants.IDLE) as agent, _connected(agent) as guest:
        process = Path(f"/proc/{agent.pid}")
        yield Agent(guest, (process / "status").read_text, lambda: (process / "clear_refs").write_text("5"))


@contextlib.contextmanager
def _in_vm(vm: LabVM) -> Iterator[Agents]:
    """The installed agent, and the idle one beside it."""
    installed = install(vm)
    idle = variants.beside(vm, installed, variants.IDLE)
    with contextlib.ExitStack() as ends:
        agents = {}
        for ahead, agent, pid in (
            (True, installed, variants.main_pid(vm, "vmishim-agent")),
            (False, idle, idle.pid),
        ):
            agents[ahead] = Agent(
                ends.enter_context(_connected(agent)),
                lambda pid=pid: vm.read(f"/proc/{pid}/status").decode(),  # type: ignore[misc]
                lambda pid=pid: vm.run("sh", "-c", f"echo 5 >/proc/{pid}/clear_refs"),  # type: ignore[misc]
            )
        yield agents


@contextlib.contextmanager
def _connected(agent: InstalledAgent) -> Iterator[AgentGuest]:
    with contextlib.closing(agent.connect("scale", "scalar", 60.0)) as guest:
        yield guest


# ---- results ---------------------------------------------------------------------------------------------------------


def _show(curve: Curve) -> None:
    title = f"Linux {curve.kernel}, {curve.where}, load {curve.load}: {COLLECTED} bytes of each node"
    table = Table(box=box.SIMPLE, title=title)
    for column in ("nodes", "requests", "bytes", "ns/node", "ms", "fastest", "not ahead: ms", "fastest", "gain"):
        table.add_column(column, justify="right")
    for point in curve.points:
        times = (point.ms, point.fastest_ms, point.ms_without, point.fastest_ms_without)
        cells = (f"{point.nodes:,}", str(point.requests), f"{point.received:,}", f"{point.per_node:,.0f}")
        table.add_row(*cells, *(f"{time:.2f}" for time in times), f"{point.gain:.2f}x")
    console = Console()
    console.print(table)
    growth = curve.peak_kib - curve.resting_kib
    console.print(
        f"agent's memory: {curve.resting_kib / 1024:.1f} MiB before the first walk, at most "
        f"{curve.peak_kib / 1024:.1f} MiB during all of them ({growth / 1024:+.1f}); a walk of {LENGTHS[-1]:,} nodes "
        f"brings {curve.points[-1].received / (1 << 20):.1f} MiB\n"
    )


def _as_json(curve: Curve) -> dict[str, Any]:
    points = [asdict(point) | {"ns_per_node": round(point.per_node, 1)} for point in curve.points]
    rounded = [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in point.items()}
        for point in points
    ]
    return asdict(curve) | {"points": rounded}


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown processor")
    return f"{model}, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}"


def drawn(curves: Sequence[Curve]) -> str:
    """docs/scale.svg: the cost of a node over the length of its list."""
    lines = [
        plot.Curve(
            _label(curve),
            [(point.nodes, point.per_node / 1e6, True) for point in curve.points],
            [(point.nodes, point.per_node / 1e6) for point in curve.points],
        )
        for curve in curves
    ]
    title = f"Walking a list through the agent, {COLLECTED} bytes of each node"
    side = "median time of a node, from request to record, logarithmic scale"
    return plot.curves([(title, "nodes in the list, logarithmic scale", lines)], side, lambda nodes: f"{nodes:,.0f}")


def from_json(record: dict[str, Any]) -> list[Curve]:
    """The curves of docs/scale.json."""
    return [Curve(**each | {"points": list(map(_point, each["points"]))}) for each in record["curves"]]


def _point(record: dict[str, Any]) -> Point:
    return Point(**{name: value for name, value in record.items() if name in Point.__dataclass_fields__})


def _label(curve: Curve) -> str:
    return f"Linux {'.'.join(curve.kernel.split('-')[0].split('.')[:2])}, {curve.where}"


if __name__ == "__main__":
    sys.exit(main())
