"""The backends for one guest on this machine; for each that is missing, why and what to do about it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from json import dumps, loads
from pathlib import Path
from typing import Any

from vmishim import isolated
from vmishim.compare import ours, recorder
from vmishim.compare.verdict import Run
from vmishim.errors import LibvmiError
from vmishim.guests.agent import STRATEGIES
from vmishim.guests.domains import Domain
from vmishim.guests.ramfile import Kernel, Ram
from vmishim.guests.resolver import reach
from vmishim.libvmi import Libvmi
from vmishim.libvmi.config import export_entry

NATIVE, RAMFILE = "native", "ramfile"
NAMES = (*(f"agent-{strategy}" for strategy in reversed(STRATEGIES)), RAMFILE, NATIVE)
"""Every backend."""
ENTRY = "guest"
"""The guest's name in LibVMI's configuration."""


@dataclass(frozen=True)
class Missing:
    """A backend that cannot be used."""

    name: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Backend:
    """One way to run a script on the guest.

    :ivar command: the command that runs a task, without the task's file
    :ivar task: the task's entries besides the script
    """

    name: str
    command: Sequence[str]
    task: dict[str, Any] = field(default_factory=dict)

    @property
    def stands_still(self) -> bool:
        """Whether it can read a stopped guest. An agent in a stopped guest cannot answer."""
        return not self.name.startswith("agent")

    def run(self, script: str, arguments: Sequence[str], folder: Path, *, record: bool, timeout: float) -> Run:
        """Run the script in a separate process, and wait for its end.

        :param folder: for files that the two processes exchange
        :param record: record every call, which costs time
        """
        written = folder / "run"
        written.unlink(missing_ok=True)
        task = {"script": script, "arguments": list(arguments), "record": record, "output": str(written)}
        (folder / "task").write_text(dumps(task | self.task), encoding="utf-8")
        try:
            done = subprocess.run(
                [*self.command, str(folder / "task")],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Run(failed=f"the script did not finish within {timeout:g} s (raise --timeout)")
        errors = done.stderr.decode(errors="backslashreplace")
        if not written.exists():
            return Run(errors=errors, status=done.returncode, failed=_ended(done.returncode, errors))
        head, *calls = written.read_text(encoding="utf-8").splitlines()
        output = done.stdout.decode(errors="backslashreplace")
        return Run([tuple(loads(line)) for line in calls], output, errors, done.returncode, **loads(head))


def _ended(status: int, errors: str) -> str:
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return f"the script ended with {how}: {last}"


def find(domain: Domain, folder: Path, genuine: str = "", local: bool = False) -> Iterator[Backend | Missing]:
    """Try every backend of a guest; give each as it can be used, or why it cannot.

    :param folder: for LibVMI's configuration
    :param genuine: an interpreter that can import LibVMI's genuine bindings
    :param local: the guest is this machine
    """
    by_agent = replace(domain, ramfile="", symbols="")
    agent = _agent_problem(domain, by_agent)
    for strategy in reversed(STRATEGIES):
        name = f"agent-{strategy}"
        yield agent(name) if agent else Backend(name, _ours(), {"entry": asdict(by_agent), "strategy": strategy})
    if not domain.ramfile:
        if local:
            why, remedy = "this machine has no file with its own memory", "compare on a VM with a RAM file"
        else:
            why = f"the entry {domain.name} has no ramfile"
            remedy = "start QEMU with memory-backend-file,share=on and set ramfile in the entry (an ordinary VM only)"
        yield Missing(RAMFILE, why, remedy)
        yield Missing(NATIVE, why, remedy)
        return
    by_file = replace(domain, agent="", agent_key="", key="")
    try:
        target = reach(by_file)
    except LibvmiError as error:
        for name in (RAMFILE, NATIVE):
            yield Missing(name, _line(error), f"vmishim doctor {domain.name}")
        return
    with Libvmi.over(target) as vmi:
        yield Backend(RAMFILE, _ours(), {"entry": asdict(by_file), "strategy": "batch"})
        yield _native(vmi, Path(domain.ramfile).expanduser(), folder, genuine)


def _ours() -> list[str]:
    return isolated.script_runner(ours.__name__)


def _agent_problem(domain: Domain, by_agent: Domain) -> Any:
    """None if the agent answers; otherwise a function from a backend's name to its `Missing`."""
    if not domain.agent:
        remedy = "install an agent in the guest (vmishim bundle), and put its endpoint and key into the entry"
        return lambda name: Missing(name, f"the entry {domain.name} has no agent", remedy)
    try:
        reach(by_agent, strategy="scalar").close()
    except LibvmiError as error:
        why = _line(error)
        return lambda name: Missing(name, why, f"vmishim doctor {domain.name}")
    return None


def _native(vmi: Libvmi, ram: Path, folder: Path, genuine: str) -> Backend | Missing:
    """The genuine bindings on the guest's RAM file, with LibVMI's file driver."""
    if not vmi.vmi.is_flat:
        why = f"LibVMI takes offsets of the file for addresses, and this {vmi.vmi.format.name} has its memory elsewhere"
        return Missing(NATIVE, why, "compare on a VM with a RAM file and no hole in its memory, such as one of 1 GiB")
    if not genuine:
        remedy = (
            "python3.11 -m venv genuine && genuine/bin/pip install libvmi==3.7.1, then --genuine genuine/bin/python "
            "(or set VMISHIM_GENUINE_PYTHON)"
        )
        return Missing(NATIVE, "no interpreter with LibVMI's genuine bindings was given", remedy)
    if os.sep not in genuine:
        genuine = isolated.tool(genuine) or genuine
    # Isolated mode, so that it imports nothing from this folder.
    asked = [genuine, "-I", "-c", "import libvmi.event, libvmi; assert not hasattr(libvmi.Libvmi, 'over')"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
        problem = (done.stderr.strip().splitlines() or ["it fails"])[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        why = f"{genuine} cannot import the genuine bindings: {problem}"
        return Missing(NATIVE, why, f"{genuine} -m pip install libvmi==3.7.1 (CPython 3.11; apt install libglib2.0-0)")
    if vmi.vmi.profile.levels != 4:
        return Missing(NATIVE, "LibVMI supports page tables of four levels only", "boot the guest with no5lvl")
    try:
        home = _configure(vmi, ram, folder)
    except (ValueError, KeyError, LibvmiError) as error:
        return Missing(NATIVE, f"LibVMI cannot be configured for this kernel: {error.args[0]}", "")
    task = {"memory": str(folder / ENTRY), "home": str(home), "domain": vmi.get_name()}
    return Backend(NATIVE, [genuine, recorder.__file__], task)


def _configure(vmi: Libvmi, ram: Path, folder: Path) -> Path:
    """Write LibVMI's configuration for the guest; returns the home folder that holds it.

    LibVMI finds an entry by the last part of the RAM file's path, so it gets a link.
    """
    (folder / ENTRY).unlink(missing_ok=True)
    (folder / ENTRY).symlink_to(ram.absolute())
    sysmap, home = folder / "sysmap", folder / "home"
    symbols = running_symbols(vmi, ram)
    # LibVMI computes the kernel's physical address from the difference of these two symbols.
    symbols["phys_startup_64"] = vmi.translate_kv2p(symbols["startup_64"])
    # LibVMI needs a System.map sorted by address, with columns of fixed width.
    lines = [f"{address:016x} T {name}\n" for name, address in sorted(symbols.items(), key=lambda pair: pair[1])]
    sysmap.write_text("".join(lines))
    entry = export_entry(vmi.vmi.profile, ENTRY)
    boot = f"/boot/System.map-{vmi.vmi.profile.release}"
    (home / "etc").mkdir(parents=True, exist_ok=True)
    (home / "etc" / "libvmi.conf").write_text(entry.replace(f'"{boot}"', f'"{sysmap}"'))
    return home


def running_symbols(vmi: Libvmi, ram: Path) -> dict[str, int]:
    """Every symbol of the guest's kernel with KASLR applied, from the kernel's own table in its memory.

    :raises LibvmiError: no table in memory matches the running kernel
    """
    known = ("init_task", "linux_banner", "_text")
    memory = Ram(ram)
    try:
        kernel = Kernel(memory)
        if all(kernel.symbol(name) == vmi.translate_ksym2v(name) for name in known):
            return kernel.symbols()
    finally:
        memory.close()
    raise LibvmiError("no symbol table in the guest's memory matches its running kernel")


def _line(error: Exception) -> str:
    # What to do is `Missing.remedy`.
    text = str(getattr(error, "fact", error))
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
