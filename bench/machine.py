"""A kernel with two agents side by side, one for which it encrypts what is read: for tests and benchmarks of that."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import variants
from bench.variants import PLAIN, RunningAgent
from lab import planter
from lab.agent import KEYS, install
from lab.planter import Planter
from lab.vm import LabVM


@dataclass(frozen=True)
class Machine:
    """A kernel, an agent for which it encrypts, and one that encrypts by itself.

    :ivar run: runs a command there as root, and returns its output
    :ivar ground: memory of that kernel to plant in
    """

    run: Callable[..., str]
    ground: Planter
    sealing: RunningAgent
    plain: RunningAgent


@contextmanager
def here() -> Iterator[Machine]:
    """This machine. :raises RuntimeError: it can't be read, or planted in (no root, no eBPF, no clang)"""

    def run(*argv: str) -> str:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    with (
        planter.here() as ground,
        variants.here(PLAIN, kernel=True) as sealing,
        variants.here(PLAIN) as plain,
    ):
        yield Machine(run, ground, sealing, plain)


@contextmanager
def inside(vm: LabVM) -> Iterator[Machine]:
    """A lab VM: the kernel encrypts for the installed agent."""

    def run(*argv: str) -> str:
        return vm.run(*argv, timeout=120).stdout.decode()

    installed = install(vm, "--kernel-key", f"{KEYS}/kernel.key")
    keys = installed.private, installed.public, installed.kernel
    sealing = RunningAgent(installed.endpoint, *keys, variants.main_pid(vm, "vmishim-agent"))
    plain = variants.beside(vm, installed, PLAIN)
    try:
        with planter.inside(vm) as ground:
            yield Machine(run, ground, sealing, plain)
    finally:
        vm.run("systemctl", "stop", "vmishim-variant", check=False)
