"""What it costs to stop the monitored container and to let it go on, by the number of its processes.

    python -m bench.freeze --kernel 6.1 --kernel 6.12

Prints medians of one run: of the agent's freezer by itself, in the guest, and of ``pause_vm`` and ``resume_vm`` as an
IDS sees them, beside a request that reads eight bytes. The processes sleep; a tenth of them wakes every 20 ms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from lab.agent import AGENT, install
from lab.kernels import default_kernel, kernels
from lab.vm import CONTAINERS_SLICE, LabVM
from vmishim.libvmi import Libvmi

WAKING = "import time\nwhile True: time.sleep(0.02)"
INSIDE = f"""\
import json, sys, time
sys.path.insert(0, {AGENT!r})
from pathlib import Path
from guest_agent.freezer import Freezer
rounds, took = int(sys.argv[1]), {{"freeze": [], "thaw": []}}
freezer, session, cgroup = Freezer(Path({CONTAINERS_SLICE!r})), bytes(8), Path({CONTAINERS_SLICE!r})
for _ in range(rounds):
    begun = time.perf_counter()
    freezer.freeze(session, 60_000)
    took["freeze"].append(time.perf_counter() - begun)
    begun = time.perf_counter()
    freezer.thaw(session)
    while "frozen 1" in (cgroup / "cgroup.events").read_text():
        pass
    took["thaw"].append(time.perf_counter() - begun)
print(json.dumps(took))
"""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.freeze", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", action="append", choices=list(kernels()), help="may be given again")
    parser.add_argument("--processes", type=int, nargs="+", default=[10, 100], metavar="N")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    columns = ("kernel", "processes", "freeze", "longest", "thaw", "longest", "pause_vm", "resume_vm", "one request")
    table = Table(*columns, title="milliseconds, medians")
    for kernel in options.kernel or [default_kernel()]:
        with LabVM.boot(kernel) as vm:
            for count in options.processes:
                planted = vm.spawn("sleep", "infinity", count=count - count // 10)
                planted |= vm.spawn("python3", "-IS", "-c", WAKING, count=count // 10)
                table.add_row(kernel, f"{count:,}", *(f"{each * 1000:.2f}" for each in measured(vm, options.rounds)))
                vm.kill(planted)
    Console(width=120).print(table)


def measured(vm: LabVM, rounds: int) -> list[float]:
    """Seconds, in the order of the table's columns."""
    agent = install(vm, "--freeze", CONTAINERS_SLICE)
    took = json.loads(vm.run("python3", "-IS", "-c", INSIDE, str(rounds), timeout=300).stdout)
    found = [statistic(took[what]) for what in ("freeze", "thaw") for statistic in (median, max)]
    guest = agent.connect(strategy="scalar", freeze=30.0)
    with Libvmi.over(guest) as vmi:
        address = vmi.translate_ksym2v("init_task")
        asked: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            asked.append((timed(vmi.pause_vm), timed(vmi.resume_vm), timed(lambda: vmi.read_addr_va(address, 0))))
    return [*found, *(median(each) for each in zip(*asked, strict=True))]


def timed(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


if __name__ == "__main__":
    main()
