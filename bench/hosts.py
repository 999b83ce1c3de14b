"""The machines to measure, and how to plant objects in them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, cast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "compat"))  # the measured script imports vmishim as "libvmi"

from bench import inside, plant_sockets, workloads  # noqa: E402
from lab.agent import AGENT, InstalledAgent, install  # noqa: E402
from lab.environment import genuine, symbol_map  # noqa: E402
from lab.launch import find_accelerator  # noqa: E402
from lab.steps import say  # noqa: E402
from lab.vm import LabVM  # noqa: E402
from vmishim.guests.agent import AgentGuest, Strategy  # noqa: E402
from vmishim.kernel.profile import Profile  # noqa: E402
from vmishim.libvmi import Libvmi  # noqa: E402
from vmishim.libvmi.config import MEMBERS as CONFIGURED  # noqa: E402

MODULES = (
    "dummy",
    "veth",
    "bridge",
    "tun",
    "loop",
    "8021q",
    "vxlan",
    "macvlan",
    "ip_tables",
    "nf_tables",
    "xfs",
    "btrfs",
)
"""Loaded into the VM so that there is a list to speak of; those it has."""


class Host(Protocol):
    """A machine that is measured."""

    kernel: str
    where: str
    network: str
    emulated: bool

    def connect(self, strategy: Strategy) -> AgentGuest:
        """A fresh connection to its agent."""

    def plant_processes(self, count: int) -> set[int]:
        """Start processes that sleep; their pids."""

    def plant_sockets(self, pairs: int) -> int:
        """Connect pairs of sockets; the port they share."""

    def inside(self, request: bytes, runs: int) -> inside.Share:
        """What the agent's side of a request costs."""

    def native(
        self, vmi: Libvmi, at: workloads.Offsets, name: str, runs: int, *, flushed: int = 0, cached: bool = False
    ) -> workloads.Result | None:
        """Run the genuine bindings on its memory; None where they can't read it.

        :param vmi: the same guest, which knows the offsets that they are given
        """


class Lab:
    """A lab VM."""

    def __init__(self, vm: LabVM, agent: InstalledAgent, folder: Path) -> None:
        self.vm, self.agent = vm, agent
        self._sysmap = folder / "sysmap"
        self._sysmap.write_text(symbol_map(vm))
        accelerator = find_accelerator(vm.image)
        self.kernel = vm.image.release
        self.where = f"lab VM ({accelerator}, 1 CPU)"
        self.emulated = accelerator == "tcg"
        self.network = "between agent and IDS TCP through QEMU's user-mode network stack"
        self._python = genuine()

    def connect(self, strategy: Strategy) -> AgentGuest:
        """See `Host`."""
        return self.agent.connect(strategy=strategy)

    def plant_processes(self, count: int) -> set[int]:
        """See `Host`; in the monitored container."""
        return self.vm.spawn("sleep", "infinity", count=count, timeout=300.0)

    def plant_sockets(self, pairs: int) -> int:
        """See `Host`."""
        source = Path(plant_sockets.__file__).read_text()
        return int(self.vm.run("python3", "-c", source, str(pairs), timeout=300.0).stdout.split()[1])

    def inside(self, request: bytes, runs: int) -> inside.Share:
        """See `Host`."""
        source = Path(inside.__file__).read_text()
        words = ("python3", "-c", source, AGENT, str(runs))
        return cast(inside.Share, json.loads(self.vm.run(*words, input=request.hex().encode(), timeout=300.0).stdout))

    def native(
        self, vmi: Libvmi, at: workloads.Offsets, name: str, runs: int, *, flushed: int = 0, cached: bool = False
    ) -> workloads.Result:
        """See `Host`; the VM stands still meanwhile."""
        say(f"bench: {name}, native")
        offsets = {member: vmi.get_offset(member) for member in CONFIGURED}
        task = workloads.Task(
            domain=str(self.vm.ram),
            config={"ostype": "Linux", "sysmap": str(self._sysmap), **offsets},
            at=at,
            name=name,
            runs=runs,
            flushed=flushed,
            cached=cached,
        )
        self.vm.pause()
        try:
            done = subprocess.run(
                [self._python, workloads.__file__], input=json.dumps(task), capture_output=True, text=True, check=False
            )
        finally:
            self.vm.resume()
        if done.returncode:
            raise RuntimeError(f"the genuine bindings ended with status {done.returncode}: {done.stderr[-2000:]}")
        return cast(workloads.Result, json.loads(done.stdout))


class Here:
    """This machine. Without the genuine bindings, which need a VM's memory from outside."""

    def __init__(self, agent: InstalledAgent, ends: contextlib.ExitStack) -> None:
        self.agent, self._ends = agent, ends
        self.kernel = os.uname().release.split("-")[0]
        self.where = "this machine"
        self.network = "between agent and IDS a local socket"
        self.emulated = False

    def connect(self, strategy: Strategy) -> AgentGuest:
        """See `Host`."""
        return self.agent.connect("local", strategy)

    def plant_processes(self, count: int) -> set[int]:
        """See `Host`."""
        started = [subprocess.Popen(["sleep", "infinity"]) for _ in range(count)]
        for process in started:
            self._ends.callback(process.wait)
            self._ends.callback(process.kill)
        return {process.pid for process in started}

    def plant_sockets(self, pairs: int) -> int:
        """See `Host`."""
        words = [sys.executable, "-I", plant_sockets.__file__, str(pairs)]
        pid, port = map(int, subprocess.run(words, capture_output=True, check=True).stdout.split())
        self._ends.callback(os.kill, pid, 15)
        return port

    def inside(self, request: bytes, runs: int) -> inside.Share:
        """See `Host`."""
        words = [sys.executable, "-I", inside.__file__, str(ROOT), str(runs)]
        done = subprocess.run(words, input=request.hex().encode(), capture_output=True, check=True)
        return cast(inside.Share, json.loads(done.stdout))

    def native(
        self, vmi: Libvmi, at: workloads.Offsets, name: str, runs: int, *, flushed: int = 0, cached: bool = False
    ) -> None:
        """See `Host`."""


@contextlib.contextmanager
def lab(name: str | None, append: str = "") -> Iterator[Lab]:
    """A lab VM with modules to list, and the agent in it."""
    with LabVM.boot(name, nokaslr=True, append=append) as vm, tempfile.TemporaryDirectory() as folder:
        for module in MODULES:
            vm.run("modprobe", module, check=False)
        yield Lab(vm, install(vm), Path(folder))


def find(profile: Profile) -> workloads.Offsets:
    """The offsets and symbols that the script needs, of those that this kernel has."""
    at = {}
    for names, find in (
        (workloads.SYMBOLS, profile.symbol),
        (workloads.MEMBERS, lambda name: profile.member(*name.split(" ")).offset),
        (workloads.SIZES, profile.size),
    ):
        for name in names:
            with contextlib.suppress(KeyError):
                at[name] = find(name)
    return at


class Counting:
    """A ``Libvmi`` that counts calls, and ends a listing that takes too many or too long.

    :param most: calls from which on the listing has lost its way: what it walks changed under it
    :param seconds: how long it may take
    """

    def __init__(self, vmi: Libvmi, most: float = inf, seconds: float = inf) -> None:
        self._vmi = vmi
        self._most, self._until = most, monotonic() + seconds
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._vmi, name)

        def call(*args: Any) -> Any:
            if self.calls >= self._most:
                raise LostError
            if monotonic() > self._until:
                raise TooLongError
            self.calls += 1
            return method(*args)

        return call


class LostError(Exception):
    """A listing made more calls than a correct one can."""


class TooLongError(Exception):
    """A listing exceeded its time limit."""
