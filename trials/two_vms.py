"""Two lab VMs: the IDS in one, the monitored system and its agent in the other. The host only forwards, and meddles.

The IDS's VM gets vmishim as a wheel that is built here, and of its dependencies what Debian has not as wheels too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.agent import InstalledAgent, install
from lab.kernels import default_kernel, kernels
from lab.launch import LabError
from lab.steps import say
from lab.vm import HOST_ADDRESS, LabVM
from trials.hostile.relay import Meddle, Relay, honest
from trials.hostile.sockets import Meddler
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[1]
PACKAGES = "/usr/lib/python3/dist-packages"
SCRIPT = f"{PACKAGES}/vmishim/compat/examples/process_list.py"
"""The demo's script, as the wheel carries it."""
CONFIG = "/root/.config/vmishim"
WHEELS = ("rich>=13", "shtab>=1.6")
"""Dependencies that the image has not: Debian 12's rich is older, and it has no shtab."""
ATTEMPTS = 30
"""Listings that are tried through a hostile relay, until one came through and one did not."""


@dataclass(frozen=True)
class Two:
    """Both VMs, running; the IDS in one, the agent in the other."""

    ids: LabVM
    monitored: LabVM
    agent: InstalledAgent

    def listing(self, meddle: Meddle = honest) -> subprocess.CompletedProcess[bytes]:
        """The demo's listing in the IDS's VM, through a relay on the host; ended in time, well or not."""
        with Relay(self.agent.endpoint, meddle) as relay:
            port = relay.endpoint.rpartition(":")[2]
            domain = f'[monitored]\nagent = "tcp://{HOST_ADDRESS}:{port}"\nagent_key = "{self.agent.public.text}"\n'
            self.ids.write(f"{CONFIG}/domains.toml", f'{domain}key = "{CONFIG}/key"\ntimeout = 10.0\n'.encode())
            command = ("env", "HOME=/root", "python3", "-m", "vmishim.cli", "run", SCRIPT, "monitored")
            done = self.ids.run(*command, check=False)
            if relay.failed is not None:
                raise LabError(f"the agent does not answer any more: {relay.failed!r}")
            return done

    def is_true(self, output: bytes) -> bool:
        """Whether a listing is what the monitored guest's ``/proc`` says: the same processes, by the same names."""
        listed = {int(line[1:6]): line[8:].rpartition(" (")[0] for line in output.decode().splitlines()}
        proc = self.monitored.processes()
        # Of kernel threads /proc tells more than the 15 bytes of task_struct.comm; the idle task is not in it.
        return listed.keys() - {0} == proc.keys() and all(proc[pid][:15].startswith(listed[pid]) for pid in proc)


@contextmanager
def booted(kernel: str | None = None) -> Iterator[Two]:
    """Both VMs, booted at the same time. :raises lab.launch.LabError: one does not boot"""
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        packed = pool.submit(wheels, stack)
        booting = [pool.submit(LabVM.boot, kernel) for _ in range(2)]
        ids, monitored = (stack.enter_context(each.result()) for each in booting)
        agent = install(monitored)
        for wheel in sorted(packed.result().glob("*.whl")):
            ids.write(f"/tmp/{wheel.name}", wheel.read_bytes())
            ids.run("python3", "-m", "zipfile", "-e", f"/tmp/{wheel.name}", PACKAGES)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        save_private(Path(folder, "key"), agent.private)
        ids.write(f"{CONFIG}/key", Path(folder, "key").read_bytes(), 0o600)
        yield Two(ids, monitored, agent)


def wheels(stack: ExitStack) -> Path:
    """A folder, for as long as ``stack`` lasts, with a wheel of vmishim and those of its dependencies."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    pip = [sys.executable, "-I", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pip += ["wheel", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
    subprocess.run([*pip, *WHEELS], check=True)
    return folder


def show(kernel: str | None = None) -> int:
    """List from VM to VM, by an honest host and by a hostile one; returns the exit status."""
    with booted(kernel) as two:
        done = two.listing()
        lines = done.stdout.count(b"\n")
        passive = done.returncode == 0 and two.is_true(done.stdout)
        verdict = "as /proc has them there" if passive else "NOT as /proc has them there"
        say(f"two: {lines} processes from VM to VM, {verdict}")
        right, errors, wrong = hostile(two)
        say(f"two: by a hostile host {right} listings were right, {errors} failed with an error, {wrong} were wrong")
        return 0 if passive and right and not wrong else 1


def hostile(two: Two) -> tuple[int, int, int]:
    """Listings by a hostile host, until one was right and one failed: (right, failed with an error, wrong)."""
    meddler = Meddler(1, alone=0.85)
    right = errors = wrong = 0
    for _ in range(ATTEMPTS):
        done = two.listing(meddler)
        if done.returncode:
            errors += done.stderr.startswith((b"monitored: ", b"vmishim: ")) and b"Traceback" not in done.stderr
            wrong += b"Traceback" in done.stderr
        else:
            listed = two.is_true(done.stdout)
            right, wrong = right + listed, wrong + (not listed)
        if right and errors:
            break
    say(f"two: {meddler.tally}")
    return right, errors, wrong


def main() -> int:
    """Parse the command line, boot both VMs, show; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trials.two_vms",
        description="The IDS in one VM, the monitored system in another, a hostile host between.",
    )
    parser.add_argument("--kernel", choices=list(kernels()), default=default_kernel(), help="which kernel")
    return show(parser.parse_args().kernel)


if __name__ == "__main__":
    sys.exit(main())
