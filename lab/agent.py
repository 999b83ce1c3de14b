"""Install the agent in a lab VM as an administrator would: its file, its keys and its unit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from lab.vm import LabVM
from vmishim.bundle import bundle, unit
from vmishim.guests.agent import AgentGuest, Strategy, connect
from vmishim.guests.domains import Domain
from vmishim.wire.keys import PrivateKey, PublicKey, generate, save_private

AGENT = "/usr/lib/vmishim/agent.pyz"
KEYS = "/etc/vmishim"
UNIT = "/etc/systemd/system/vmishim-agent.service"

COMPILE = """\
import compileall, pathlib, py_compile, sys, tempfile, zipfile
with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(sys.argv[1], "a") as archive:
    archive.extractall(folder)
    names, mode = {"stripdir": folder, "prependdir": sys.argv[1]}, py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder, quiet=1, legacy=True, invalidation_mode=mode, **names)
    for path in pathlib.Path(folder).rglob("*.pyc"):
        archive.write(path, path.relative_to(folder))
"""


@dataclass(frozen=True)
class InstalledAgent:
    """An agent that runs in a lab VM, and the keys to reach it."""

    endpoint: str
    private: PrivateKey
    """Our private key, which the agent permits."""
    public: PublicKey
    """The agent's public key."""
    kernel: PublicKey
    """The kernel's public key, used if the agent is started with ``--kernel-key /etc/vmishim/kernel.key``."""

    def connect(
        self,
        name: str = "lab",
        strategy: Strategy = "batch",
        timeout: float = 30.0,
        kernel_key: PublicKey | None = None,
        freeze: float = 0.0,
    ) -> AgentGuest:
        """Connect to the VM as a guest. The timeout is long because software emulation is slow."""
        domain = replace(self.domain(name, timeout), kernel_key=kernel_key.text if kernel_key else "", freeze=freeze)
        return connect(domain, strategy, self.private)

    def domain(self, name: str = "lab", timeout: float = 30.0) -> Domain:
        """Its entry in domains.toml, without our key, which is in no file."""
        return Domain(name, agent=self.endpoint, agent_key=self.public.text, timeout=timeout)


def install(vm: LabVM, *arguments: str) -> InstalledAgent:
    """Copy the agent into the VM and start its service; returns once it listens.

    :param arguments: more options of ``agent.pyz serve``
    :raises lab.vm.CommandError: it did not start; the error carries its journal
    """
    ours, theirs, kernel = generate(), generate(), generate()
    service = unit().replace(b" serve ", " ".join([" serve", *arguments, ""]).encode())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_private(folder / "agent.key", theirs)
        save_private(folder / "kernel.key", kernel)
        files = {
            AGENT: (bundle(folder / "agent.pyz").read_bytes(), 0o755),
            f"{KEYS}/agent.key": ((folder / "agent.key").read_bytes(), 0o600),
            f"{KEYS}/kernel.key": ((folder / "kernel.key").read_bytes(), 0o600),
            f"{KEYS}/permitted": (f"{ours.public.text}\n".encode(), 0o644),
            UNIT: (service, 0o644),
        }
    # systemd finds a unit by itself that was not there; one that has changed, it must be told of.
    changed = vm.run("test", "-e", UNIT, check=False).returncode == 0
    vm.unpack(files)
    if changed:
        vm.run("systemctl", "daemon-reload")
    # Type=notify: this returns when the agent has sent READY=1, or has failed.
    script = "systemctl restart vmishim-agent || { journalctl -u vmishim-agent -n 30 --no-pager >&2; exit 1; }"
    vm.run("sh", "-c", script, timeout=120)  # systemd itself gives up after 90 s
    return InstalledAgent(vm.endpoint, ours, theirs.public, kernel.public)


def precompile(vm: LabVM) -> None:
    """Put bytecode beside the sources in the installed agent's file, as Python itself does where there is no archive.

    Then each later start is seconds shorter under emulation.
    """
    vm.run("python3", "-c", COMPILE, AGENT)
