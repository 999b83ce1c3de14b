"""Agents that differ from ours in one thing, to compare with ours: on this machine, or in a lab VM beside it.

Each is a Python program whose first argument is where to import ``guest_agent`` from; those behind it are the agent's.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import sequential
from lab.agent import AGENT, InstalledAgent
from lab.vm import GUEST_PORT, LabVM
from vmishim.wire.keys import generate, save_private

ROOT = Path(__file__).parents[1]
PLAIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from guest_agent.__main__ import main; sys.exit(main())"
"""The agent as it is."""
IDLE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from guest_agent import __main__, agent; "
    "agent.Agent.walk_ahead = lambda self: None; sys.exit(__main__.main())"
)
"""Does nothing between two requests."""
SEQUENTIAL = Path(sequential.__file__).read_text()
"""Copies objects one by one."""


@dataclass(frozen=True)
class RunningAgent(InstalledAgent):
    """A running agent and its process."""

    pid: int


@contextlib.contextmanager
def here(program: str, endpoint: str = "", *, kernel: bool = False) -> Iterator[RunningAgent]:
    """One on this machine, until the block ends.

    :param endpoint: where it listens; a socket in the file system unless given
    :param kernel: let the kernel encrypt what is read of it
    :raises RuntimeError: it does not start; the text says why
    """
    ours, theirs, kernels = generate(), generate(), generate()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # as in vmishim.guests.local
        save_private(Path(folder, "key"), theirs)
        save_private(Path(folder, "kernel.key"), kernels)
        Path(folder, "permitted").write_text(f"{ours.public.text}\n")
        endpoint = endpoint or f"ipc://{folder}/socket"
        command = [sys.executable, "-I", "-c", program, str(ROOT), "serve", "--until-eof", "--listen", endpoint]
        command += ["--key", f"{folder}/key", "--permitted", f"{folder}/permitted"]
        command += ["--kernel-key", f"{folder}/kernel.key"] if kernel else []
        with subprocess.Popen(
            command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            if child.stdout.readline() != b"ready\n":
                raise RuntimeError(f"no agent here: {child.stderr.read().decode().strip()}")
            yield RunningAgent(endpoint, ours, theirs.public, kernels.public, child.pid)


def beside(vm: LabVM, installed: InstalledAgent, program: str) -> RunningAgent:
    """One in a lab VM, with the keys of the agent that is installed there, for as long as the VM runs."""
    unit = ("systemd-run", "--quiet", "--unit=vmishim-variant", "--collect", "--property=Type=notify", "--")
    port = GUEST_PORT + 1
    vm.run(*unit, "python3", "-c", program, AGENT, "serve", "--listen", f"tcp://0.0.0.0:{port}")
    endpoint = f"tcp://127.0.0.1:{vm.forward(port)}"
    keys = installed.private, installed.public, installed.kernel
    return RunningAgent(endpoint, *keys, main_pid(vm, "vmishim-variant"))


def main_pid(vm: LabVM, unit: str) -> int:
    """The process of a service in a lab VM."""
    return int(vm.run("systemctl", "show", "-P", "MainPID", unit).stdout)
