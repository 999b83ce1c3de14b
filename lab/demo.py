"""``make demo``: boot the lab VM, list its processes with an unchanged LibVMI script, and compare the strategies.

The genuine LibVMI bindings come last, on the VM's memory file; if they can't be installed, the demo says why.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from lab.agent import InstalledAgent, install
from lab.enrolled import PLANTED, plant
from lab.environment import MissingError, genuine
from lab.launch import LabError
from lab.steps import ImageError, say
from lab.vm import LabVM
from vmishim import isolated
from vmishim.commands import enrolment
from vmishim.compare.backends import NATIVE, Missing, find
from vmishim.compare.report import TIMES_NATIVE, ratio
from vmishim.compare.verdict import Run
from vmishim.errors import LibvmiError
from vmishim.guests.agent import Strategy
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver
from vmishim.guests.target import Target
from vmishim.script import execute
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[1]
SCRIPT = "compat/examples/process_list.py"
STRATEGIES: dict[Strategy, tuple[str, ...]] = {
    "scalar": ("each read is a request",),
    "page": ("each page is a request",),
    "batch": ("the list is a request", "the same, once more"),
}
"""What is measured, in this order; more than one: by the same connection, which has learned from the run before."""
RUNS = 5
"""Times each strategy is measured; the table has medians."""


def main() -> int:
    """Run the demo; return the exit status."""
    os.chdir(ROOT)
    try:
        with LabVM.boot() as vm:
            agent = install(vm)
            say(f"demo: the agent runs in the VM, outside its container, and listens at {agent.endpoint}")
            planted = plant(vm)
            say(f"demo: {len(planted)} processes started in the container: {', '.join(PLANTED)}")
            with _enrolled(agent):
                return _show(vm, agent, planted)
    except (ImageError, LabError, LibvmiError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _enrolled(agent: InstalledAgent) -> Iterator[None]:
    """The VM as domain "lab", for this process and its children."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VMISHIM_CONFIG"] = f"{folder}/domains.toml"
        save_private(f"{folder}/key", agent.private)
        entry = {"agent": agent.endpoint, "agent_key": agent.public.text, "key": f"{folder}/key"}
        enrolment.write("lab", entry)
        yield


def _show(vm: LabVM, agent: InstalledAgent, planted: dict[int, str]) -> int:
    command = ["vmishim", "run", SCRIPT, "lab"]
    print(f"\n$ {' '.join(command)}", flush=True)
    if subprocess.run(isolated.script_runner("vmishim.cli", *command[1:]), check=False).returncode:
        return 1
    rows = list(_measure(agent))
    native = _native(vm)
    if isinstance(native, Run):
        rows.append(((NATIVE, "the genuine LibVMI, cold"), native))
    first = rows[0][1]
    outputs = {run.output for _, run in rows}
    listed = {int(line[1:6]): line[8:].split(" (")[0] for line in first.output.splitlines()}
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100, highlight=False)
    console.print(f"\n[bold]The same script, unchanged, by each strategy; {len(listed)} processes[/bold]\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("strategy", "", "requests", "bytes", "time", *([TIMES_NATIVE] if isinstance(native, Run) else [])):
        table.add_column(column, justify="left" if column in ("strategy", "") else "right", no_wrap=True)
    for (strategy, about), run in rows:
        figures = ["-" if figure is None else f"{figure:,}" for figure in (run.requests, run.carried)]
        compared = [ratio(run.seconds / native.seconds)] if isinstance(native, Run) else []
        table.add_row(strategy, about, *figures, f"{run.seconds * 1000:,.1f} ms", *compared)
    console.print(table)
    accelerator = "software emulation (TCG)" if _emulated(vm) else "KVM"
    console.print(
        f"\nMedians of {RUNS} runs; Linux {vm.image.release} under {accelerator}, {os.cpu_count()} CPUs here."
    )
    if isinstance(native, Run):
        console.print("Native first looks up its symbols in a file; for warm runs see docs/benchmark.md.")
    else:
        console.print(f"Not compared with genuine LibVMI: {native}", markup=False)
    if len(outputs) != 1:
        console.print("[red]The listings differ.[/red]")
        return 1
    missing = planted.items() - listed.items()
    if missing:
        console.print(f"[red]Not listed: {sorted(missing)}[/red]")
        return 1
    console.print(f"All listings are the same, and all {len(planted)} processes of the container are in them.")
    return 0


def _measure(agent: InstalledAgent) -> Iterator[tuple[tuple[str, str], Run]]:
    for strategy, names in STRATEGIES.items():
        runs: list[list[Run]] = []
        for _ in range(RUNS):
            guest = agent.connect(strategy=strategy)
            try:
                runs.append([_run(guest) for _ in names])
            finally:
                guest.close()
        for name, of_name in zip(names, zip(*runs, strict=True), strict=True):
            yield (strategy, name), sorted(of_name, key=lambda run: run.seconds)[RUNS // 2]


def _native(vm: LabVM) -> Run | str:
    """The genuine bindings on the VM's memory, which is paused meanwhile; or why they can't be used."""
    try:
        python = str(genuine())
    except (MissingError, OSError) as error:
        return str(error)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backends = find(Domain("lab", ramfile=str(vm.ram)), folder, python)
        backend = next(backend for backend in backends if backend.name == NATIVE)
        if isinstance(backend, Missing):
            return f"{backend.why}; {backend.remedy}"
        vm.pause()
        try:
            done = [backend.run(SCRIPT, ["lab"], folder, record=False, timeout=60.0) for _ in range(RUNS)]
        finally:
            vm.resume()
    for run in done:
        if run.failed or run.status:
            return (run.failed or run.errors).strip().splitlines()[-1]
    listed = [replace(run, seconds=run.seconds - run.connecting) for run in done]  # as with the others
    return sorted(listed, key=lambda run: run.seconds)[RUNS // 2]


def _run(guest: Any) -> Run:
    link = guest.link
    before = link.requests, link.bytes_sent + link.bytes_received
    output = io.StringIO()
    begun = time.perf_counter()
    with contextlib.redirect_stdout(output):
        execute(SCRIPT, ["lab"], Resolver(reach=lambda domain: cast(Target, _Kept(guest))))
    taken = time.perf_counter() - begun
    requests, carried = link.requests - before[0], link.bytes_sent + link.bytes_received - before[1]
    return Run(output=output.getvalue(), seconds=taken, requests=requests, carried=carried)


class _Kept:
    """A guest that outlives the script that opens it, so that one connection serves several runs."""

    def __init__(self, guest: Any) -> None:
        self._guest = guest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)

    def close(self) -> None:
        self._guest.flush()


def _emulated(vm: LabVM) -> bool:
    return not vm.monitor("query-kvm")["enabled"]


if __name__ == "__main__":
    sys.exit(main())
