# This file runs Volatility and reads its results. It is also licensed under the Volatility Software License 1.0,
# https://www.volatilityfoundation.org/license/vsl-v1.0
"""Every Linux plugin of Volatility 3 on a lab VM's agent: does it work, what does it cost, are its rows those that
Volatility reads from the VM's memory itself, and does it find what was planted for it.

    python -m bench.volatility [--kernel 6.1] [--plugins linux.pslist ...] [--delay MS] [--sealed]

Results go to ``docs/volatility.json``; ``python -m bench.volatility --page`` writes the table of docs/volatility.md.

Truth about rows comes from two copies of the VM's memory, taken with its CPUs stopped, before and after: every row that
both have must come from the agent, and every row that the agent gives must be in one of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # the child, which gets the folder of this checkout
    sys.path.insert(0, sys.argv[1])

from bench.delay import delayed
from lab import kernels as lab_kernels
from lab.agent import InstalledAgent, install, precompile
from lab.rootkit import Rootkit
from lab.vm import LabVM
from vmishim.guests.ramfile import RamFile
from vmishim.libvmi import Libvmi
from vmishim.volatility.guest import Guest
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs" / "volatility.json", ROOT / "docs" / "volatility.md"
BEGIN, END = "<!-- plugins -->\n", "<!-- end of plugins -->\n"
ADDRESS = (1 << 48) - 1
TIMEOUT = 400
"""Seconds for one plugin."""
FEW = 500
"""Requests beyond which a plugin's row needs a reason."""
UNUSED_CALL, UNUSED_GATE, FUNCTION, SHOW = 136, 4, "__x64_sys_sysfs", 3 * 8
"""A system call and an exception that nobody makes, a function that nobody calls; ``show`` of ``seq_operations``."""

Row = dict[str, Any]

RWX = """
import mmap, time
area = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
area.write(b"\\x90" * 64 + b"\\xc3")
time.sleep(10**6)
"""
PERF = """
import ctypes, struct, time
libc = ctypes.CDLL(None, use_errno=True)
def done(number):
    if number < 0:
        raise OSError(ctypes.get_errno(), "no counter with a program")
    return number
attributes = ctypes.create_string_buffer(struct.pack("<IIQQ", 1, 112, 0, 10**9), 112)
counter = done(libc.syscall(298, attributes, 0, -1, -1, 0))
# BPF_PROG_LOAD of a BPF_PROG_TYPE_PERF_EVENT that returns 0, then PERF_EVENT_IOC_SET_BPF.
code = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xb7, 0, 0, 0, 0x95, 0, 0, 0))
licence = ctypes.create_string_buffer(b"GPL")
places = ctypes.addressof(code), ctypes.addressof(licence)
load = struct.pack("<IIQQIIQII16s", 7, 2, *places, 0, 0, 0, 0, 0, b"planted")
program = done(libc.syscall(321, 5, ctypes.create_string_buffer(load, 128), 128))
done(libc.ioctl(counter, 0x40042408, program))
time.sleep(10**6)
"""
TRACER = """
import ctypes, os, time
child = os.fork()
if child == 0:
    time.sleep(10**6)
if ctypes.CDLL(None, use_errno=True).ptrace(0x4206, child, None, None) < 0:
    raise OSError(ctypes.get_errno(), "ptrace")
time.sleep(10**6)
"""
BASH = """
import os, pty
child, terminal = pty.fork()
if child == 0:
    os.execvp("bash", ["bash", "--norc", "-i"])
os.write(terminal, b"echo typed by the intruder\\n")
while os.read(terminal, 4096):
    pass
"""
SPOOFED = """
import ctypes, time
ctypes.CDLL(None).prctl(15, b"kworker/9:9", 0, 0, 0)
time.sleep(10**6)
"""
TERMINAL = """
import os, time
kept = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
time.sleep(10**6)
"""
LISTENER = """
import socket, time
server = socket.create_server(("127.0.0.1", 4444))
near = socket.create_connection(("127.0.0.1", 4444))
far = server.accept()
time.sleep(10**6)
"""

SHOWN = {
    "linux.malware.hidden_modules": "a module out of the list",
    "linux.malware.check_modules": "a module out of the list",
    "linux.malware.modxview": "a module out of the list",
    "linux.malware.check_syscall": "a system call that leads into a module",
    "linux.malware.check_idt": "a gate that leads into a module",
    "linux.malware.tty_check": "n_tty's receive_buf that leads into a module",
    "linux.malware.keyboard_notifiers": "a module's notifier",
    "linux.malware.check_afinfo": "tcp4_seq_ops.show that leads into a module",
    "linux.malware.check_creds": "two processes with one set of credentials",
    "linux.malware.netfilter": "a module's hook",
    "linux.malware.malfind": "a writable and executable area",
    "linux.malware.process_spoofing": "a process that calls itself kworker/9:9",
    "linux.tracing.ftrace": "a module's tracer of a function",
    "linux.tracing.tracepoints": "a module's probe of sched_process_fork",
    "linux.tracing.perf_events": "a process with a counter that runs an eBPF program",
    "linux.ptrace": "a process that traces another",
    "linux.bash": "a command typed in bash",
    "linux.sockstat": "a listener on port 4444",
    "linux.psscan": "a process out of the list of tasks",
    "linux.pidhashtable": "a process out of the list of tasks",
    "linux.ebpf": "the agent's programs",
}
"""What is planted for a plugin, in words."""

WHY = {
    "linux.sockstat": "rows that are in neither copy are the agent's own connection, which the run made",
    "linux.library_list": "reads the ELF headers and link map in each process's own memory, a page at a time",
    "linux.malware.keyboard_notifiers": "Volatility shows where the notifier is, not what it calls",
    "linux.kallsyms": "Volatility's own error (kernel_symbol.get_name), on the RAM file too",
    "linux.psscan": "scans all of the guest's memory, 1 MiB a request",
    "linux.sockscan": "scans all of the guest's memory, 1 MiB a request",
    "linux.pagecache.RecoverFs": "copies every file in the page cache",
    "linux.pagecache.Files": "walks every inode of every file system",
    "linux.graphics.fbdev": "needs Pillow, and a framebuffer that the lab's kernels do not have",
}
"""Reasons, for the table."""


@dataclass(frozen=True)
class Plants:
    """What was planted: for a plugin, the values of which one of its rows must have all."""

    expected: dict[str, tuple[Any, ...]]
    pid: int
    """A process of our own."""


@contextmanager
def planted(vm: LabVM) -> Iterator[Plants]:
    """Plant something for each plugin that detects something.

    :raises lab.vm.CommandError: the VM does not let us
    """
    rwx, perf, tracer, bash, spoofed, listener, terminal = (
        _service(vm, name, program)
        for name, program in (
            ("rwx", RWX),
            ("perf", PERF),
            ("tracer", TRACER),
            ("bash", BASH),
            ("spoofed", SPOOFED),
            ("listener", LISTENER),
            ("terminal", TERMINAL),
        )
    )
    thief, robbed, unlinked = sorted(vm.spawn("sleep", "infinity", count=3))
    vm.wait_until(lambda: b":4444" in vm.run("ss", "-Hltn").stdout, "the listener")
    vm.wait_until(lambda: b"kworker/9:9" in vm.run("cat", f"/proc/{spoofed}/comm").stdout, "the spoofed name")
    vm.wait_until(lambda: b"perf_event" in vm.run("ls", "-l", f"/proc/{perf}/fd").stdout, "the counter")
    vm.wait_until(lambda: b"ttyS0" in vm.run("ls", "-l", f"/proc/{terminal}/fd").stdout, "the terminal")
    vm.wait_until(lambda: b"rwxp" in vm.run("cat", f"/proc/{rwx}/maps").stdout, "the area")
    vm.wait_until(
        lambda: vm.run("pgrep", "-P", str(tracer), check=False).stdout,
        "the tracee",
    )
    tracee = int(vm.run("pgrep", "-P", str(tracer)).stdout)
    vm.wait_until(
        lambda: f"TracerPid:\t{tracer}\n" in vm.run("cat", f"/proc/{tracee}/status").stdout.decode(), "the tracer"
    )
    vm.wait_until(lambda: vm.run("pgrep", "-P", str(bash), "-x", "bash", check=False).stdout, "bash")
    shell = int(vm.run("pgrep", "-P", str(bash), "-x", "bash").stdout)
    rootkit = Rootkit(vm)
    at = rootkit.symbols
    hook = at["hooked"]
    rootkit.do("share-cred", thief, robbed)
    rootkit.do("unlink-task", unlinked)
    rootkit.do("hide-port", 4444, at["tcp4_seq_ops"] + SHOW)
    rootkit.do("patch", at["sys_call_table"] + 8 * UNUSED_CALL, hook)
    lead_gate(rootkit, at["idt_table"] + 16 * UNUSED_GATE, hook)
    with Libvmi.over(RamFile("ram", vm.ram)) as vmi:
        receive = vmi.vmi.profile.member("tty_ldisc_ops", "receive_buf").offset
    rootkit.do("patch", at["n_tty_ops"] + receive, hook)  # receive_buf2 is called in its place
    rootkit.do("notify-keys")
    rootkit.do("trace-function", at[FUNCTION])
    rootkit.do("hook-packets")
    rootkit.do("probe-forks")
    rootkit.do("hide-module")
    try:
        yield Plants(
            {
                "linux.malware.hidden_modules": ("rootkit",),
                "linux.malware.check_modules": ("rootkit",),
                "linux.malware.modxview": ("rootkit",),
                "linux.malware.check_syscall": (hook, UNUSED_CALL),
                "linux.malware.check_idt": (hook, UNUSED_GATE),
                "linux.malware.tty_check": (hook,),
                "linux.malware.keyboard_notifiers": ("rootkit",),
                "linux.malware.check_afinfo": (at["hooked_show"],),
                "linux.malware.check_creds": (str(thief), str(robbed)),
                "linux.malware.netfilter": (at["packet_came"],),
                "linux.malware.malfind": (rwx, "rwx"),
                "linux.malware.process_spoofing": (spoofed, ("Comm_Spoofed", True)),
                "linux.tracing.ftrace": (at["traced"],),
                "linux.tracing.tracepoints": (at["forked"], "sched_process_fork"),
                "linux.tracing.perf_events": (perf, "planted"),
                "linux.ptrace": (tracer, ("Tracee TID", tracee)),
                "linux.bash": (shell, "echo typed by the intruder"),
                "linux.sockstat": (listener, "4444"),
                "linux.psscan": (unlinked,),
                "linux.pidhashtable": (unlinked,),
                "linux.ebpf": ("walk",),
            },
            rwx,
        )
    finally:
        rootkit.unload()
        vm.kill({thief, robbed, unlinked})
        vm.run("systemctl", "stop", "rwx", "perf", "tracer", "bash", "spoofed", "listener", "terminal", check=False)


def _service(vm: LabVM, name: str, program: str) -> int:
    vm.run("systemd-run", "--quiet", "--collect", f"--unit={name}", "python3", "-IS", "-c", program)
    return int(vm.run("systemctl", "show", "-P", "MainPID", name).stdout)


def lead_gate(rootkit: Rootkit, gate: int, target: int) -> None:
    """Make an entry of the interrupt table lead elsewhere (Intel SDM volume 3, 6.14.1)."""
    with Libvmi.over(RamFile("ram", rootkit.vm.ram)) as vmi:
        low = vmi.read_64_va(gate, 0) & 0x0000_FFFF_FFFF_0000
    rootkit.do("patch", gate, low | target & 0xFFFF | (target & 0xFFFF_0000) << 32)
    rootkit.do("patch", gate + 8, target >> 32)


def finds(rows: Sequence[Row], values: tuple[Any, ...]) -> bool:
    """Whether some row has all the values: numbers (addresses without the bits that are not translated), texts within
    others, or a column and what is in it."""

    def within(row: Row, value: Any) -> bool:
        cells = [cell for cell in row.values() if not isinstance(cell, list)]
        if isinstance(value, tuple):
            return bool(row.get(value[0]) == value[1])
        if isinstance(value, str):
            return any(value in str(cell) for cell in cells)
        return any(type(cell) is int and cell & ADDRESS == value & ADDRESS for cell in cells)

    return any(all(within(row, value) for value in values) for row in flat(rows))


def flat(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows, and those below them."""
    for row in rows:
        yield row
        yield from flat(row.get("__children", []))


@dataclass(frozen=True)
class Result:
    """One plugin's run."""

    status: int
    rows: list[Row] | None
    error: str
    seconds: float
    requests: int


class Volatility:
    """Runs plugins on one VM's agent, and on copies of its memory: one after the other in one process, each with a
    connection and a cache of its own.

    :param folder: for keys, symbols, copies and what plugins write
    """

    def __init__(
        self, folder: Path, vm: LabVM, agent: InstalledAgent, endpoint: str = "", sealed: bool = False
    ) -> None:
        self.folder, self.vm = folder, vm
        save_private(folder / "key", agent.private)
        domain = agent.domain("lab", timeout=60)
        lines = [
            "[lab]",
            f'agent = "{endpoint or domain.agent}"',
            f'agent_key = "{domain.agent_key}"',
            f'key = "{folder / "key"}"',
            "timeout = 60",
        ]
        if sealed:
            lines.append(f'kernel_key = "{agent.kernel.text}"')
        (folder / "domains.toml").write_text("\n".join(lines) + "\n")
        for name in ("out", "cache"):
            (folder / name).mkdir(exist_ok=True)
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__)), str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "VMISHIM_CONFIG": str(folder / "domains.toml"),
                "XDG_CACHE_HOME": str(folder / "kept"),
            },
        )

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()

    def agent(self, plugin: str, *arguments: str) -> Result:
        """A plugin on the agent."""
        return self._run(["-f", "vmishim://lab", plugin, *arguments])

    def copy(self, name: str) -> Path:
        """The VM's memory at one instant."""
        path = self.folder / name
        self.vm.pause()
        try:
            subprocess.run(["cp", "--sparse=always", self.vm.ram, path], check=True)
        finally:
            self.vm.resume()
        return path

    def stock(self, ram: Path, plugin: str, *arguments: str) -> Result:
        """A plugin on a copy of memory: Volatility's own reading of it, with the symbols that the guest's own are."""
        symbols = self.folder / "symbols" / "linux"
        if not symbols.exists():
            symbols.mkdir(parents=True)
            with closing(RamFile("ram", ram)) as target:
                made = Guest(target, self.folder / "kept" / "vmishim" / "kernels").symbols()
            (symbols / "kernel.json").write_bytes(made.read_bytes())
        return self._run(["-s", str(symbols.parent), "-f", str(ram), plugin, *arguments])

    def _run(self, words: list[str]) -> Result:
        options = ["-q", "--offline", "--cache-path", str(self.folder / "cache"), "-o", str(self.folder / "out")]
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([*options, "-r", "json", *words]) + "\n")
        self._child.stdin.flush()
        return Result(**json.loads(self._child.stdout.readline()))


def serve() -> None:
    """The process that runs plugins: a line of words for each, answered by a line with its result. Each runs in a fork,
    because some plugins keep what they have seen."""
    import volatility3.plugins
    from volatility3 import cli, framework

    framework.constants.PLUGINS_PATH.append(str(ROOT / "compat" / "volatility"))
    framework.require_interface_version(2, 0, 0)
    framework.import_files(volatility3.plugins, True)  # once for all forks
    assert cli
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print(json.dumps(asdict(_run(json.loads(line)))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps(asdict(Result(1, None, f"it ended with status {status}", 0.0, 0))), flush=True)


def _run(words: list[str]) -> Result:
    """Run Volatility as its own command does."""
    from volatility3 import cli

    from vmishim.volatility import guest as guests

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {TIMEOUT} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(TIMEOUT)
    begun, out, err, status, error = time.perf_counter(), io.StringIO(), io.StringIO(), 0, ""
    sys.argv = ["vol", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.CommandLine().run()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except Exception as failed:
        status, error = 1, f"{type(failed).__name__}: {failed}"
    signal.alarm(0)
    seconds = time.perf_counter() - begun
    try:
        rows = json.loads(out.getvalue())
    except ValueError:
        rows = None
    requests = 0
    for each in guests.opened():
        if each.target.agent is not None:
            requests += each.target.agent.link.requests
        error = error or (str(each.lost) if each.lost else "")
    lines = [line.strip() for line in err.getvalue().splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|vmishim: |[A-Z].*requirement", line)]
    return Result(status, rows, error or (said[-1] if said else ""), seconds, requests)


def plugins() -> list[str]:
    """Every Linux plugin that can be loaded, by the names that Volatility's own are not deprecated under."""
    code = (
        "import volatility3.plugins, volatility3.framework as f\n"
        "f.require_interface_version(2, 0, 0)\n"
        "f.import_files(volatility3.plugins, True)\n"
        "print(*(name for name in f.list_plugins() if name.startswith('linux.')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    names = sorted(done.stdout.split())
    moved = {name.split(".")[2] for name in names if name.startswith("linux.malware.")}
    return [name for name in names if not (name.count(".") == 2 and name.split(".")[1] in moved)]


def short(plugin: str) -> str:
    """``linux.pslist`` of ``linux.pslist.PsList``; where a module has several, the whole name."""
    module = plugin.rpartition(".")[0]
    return plugin if module in ("linux.pagecache", "linux.ip") else module


def arguments(plugin: str, plants: Plants) -> list[str]:
    """What a plugin cannot do without."""
    return {
        "linux.vmaregexscan": ["--pid", str(plants.pid), "--pattern", "python3"],
        "linux.pagecache.InodePages": ["--find", "/etc/hostname"],
        "linux.module_extract": ["--base", "0xffffffffc0000000"],
    }.get(short(plugin), [])


def compared(before: Result, ours: Result, after: Result) -> str:
    """Whether the agent's rows are those of the memory: empty if they are, else how many are not."""
    if ours.rows is None or before.rows is None or after.rows is None:
        return "" if (ours.rows is None) == (after.rows is None) else "only one of the two fails"
    first, mine, last = ({_key(row) for row in flat(each.rows or [])} for each in (before, ours, after))
    missing, more = (first & last) - mine, mine - (first | last)
    return f"{len(missing)} rows missing, {len(more)} more" if missing or more else ""


def _key(row: Row) -> str:
    return json.dumps({name: cell for name, cell in row.items() if name != "__children"}, sort_keys=True)


def measure(
    kernel: str, chosen: Sequence[str], delay: float, sealed: bool, compare: bool = True
) -> Iterator[list[Row]]:
    """All chosen plugins on one kernel: what each did on the agent, then again and again with one more compared."""
    found: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        vm = stack.enter_context(LabVM.boot(kernel))
        agent = install(vm, *(["--kernel-key", "/etc/vmishim/kernel.key"] if sealed else []))
        precompile(vm)
        endpoint = ""
        if delay:
            endpoint = stack.enter_context(delayed(int(agent.endpoint.rpartition(":")[2]), delay / 2))
        plants = stack.enter_context(planted(vm))
        volatility = stack.enter_context(closing(Volatility(folder, vm, agent, endpoint, sealed)))
        before = volatility.copy("before") if compare else None
        ours: dict[str, Result] = {}
        for plugin in chosen:
            ours[plugin] = result = volatility.agent(plugin, *arguments(plugin, plants))
            count = None if result.rows is None else len(list(flat(result.rows)))
            values = plants.expected.get(short(plugin))
            seen = None if values is None else finds(result.rows or [], values)
            said = f"{count} rows, {result.requests} requests, {result.seconds:.1f} s {result.error}"
            print(f"{kernel} {plugin}: {said}{'' if seen in (None, True) else f', not found: {values}'}", flush=True)
            one = {
                "kernel": kernel,
                "plugin": plugin,
                "rows": count,
                "requests": result.requests,
                "seconds": round(result.seconds, 1),
                "error": result.error if result.rows is None or result.status else "",
                "differs": None,
                "found": seen,
            }
            found.append(one)
            yield found
        if before is None:
            return
        after = volatility.copy("after")
        for one in found:
            plugin = str(one["plugin"])
            first = last = volatility.stock(after, plugin, *arguments(plugin, plants))
            if compared(last, ours[plugin], last):
                first = volatility.stock(before, plugin, *arguments(plugin, plants))
            one["differs"] = compared(first, ours[plugin], last)
            print(f"{kernel} {plugin}: {one['differs'] or 'the same'}, {last.seconds:.1f} s {last.error}", flush=True)
            yield found


def page(record: dict[str, Any]) -> str:
    """The table."""
    kernels = record["kernels"]
    by = {(each["kernel"], each["plugin"]): each for each in record["results"]}
    lines = [
        "| plugin | "
        + " | ".join(f"{kernel}: works, rows, requests, seconds" for kernel in kernels)
        + " | planted | notes |",
        "|---|" + "---|" * (len(kernels) + 2),
    ]
    for plugin in dict.fromkeys(each["plugin"] for each in record["results"]):
        cells, notes = [], [WHY[short(plugin)]] if short(plugin) in WHY else []
        for kernel in kernels:
            one = by.get((kernel, plugin))
            if one is None:
                cells.append("")
                continue
            same = "works, not compared" if one["differs"] is None else "differs" if one["differs"] else "works"
            works = "fails" if one["rows"] is None else same
            rows = "" if one["rows"] is None else f"{one['rows']:,}"
            cells.append(f"{works}, {rows}, {one['requests']:,}, {one['seconds']:.1f}")
            if one["error"] and short(plugin) not in WHY:
                notes.append(f"{kernel}: {one['error'][:120]}")
            if one["differs"]:
                notes.append(f"{kernel}: {one['differs']}")
        seen = [one["found"] for kernel in kernels if (one := by.get((kernel, plugin)))]
        what = SHOWN.get(short(plugin), "")
        if what:
            planted_cell = f"{what}: " + ("found" if all(seen) else "**unproven**")
        elif any((by.get((kernel, plugin)) or {}).get("rows") for kernel in kernels):
            planted_cell = ""
        else:
            planted_cell = "**unproven**"
        lines.append(
            f"| `{plugin}` | " + " | ".join(cells) + f" | {planted_cell} | {'; '.join(dict.fromkeys(notes))} |"
        )
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """Write the table into the page. :raises ValueError: the page has no place for it"""
    text = PAGE.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the table")
    PAGE.write_text(before + begin + "\n" + page(json.loads(RECORD.read_text())) + "\n" + end + after)


def record(kernel: str, results: list[Row]) -> None:
    """Take the results of one kernel into the record."""
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"kernels": [], "results": []}
    again = {each["plugin"] for each in results}
    kept = [each for each in old["results"] if each["kernel"] != kernel or each["plugin"] not in again]
    kernels = sorted({*old["kernels"], kernel}, key=list(lab_kernels.kernels()).index)
    RECORD.write_text(
        json.dumps(
            {"kernels": kernels, "results": sorted(kept + results, key=lambda each: str(each["plugin"]))}, indent=1
        )
        + "\n"
    )


def main() -> int:
    """Measure, record, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.volatility", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kernel", action="append", choices=list(lab_kernels.kernels()), help="(default: 6.1)")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="NAME", help="only these, in this order")
    parser.add_argument("--compare", action="store_true", help="with the rows of Volatility's own reading of the RAM")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="round-trip delay; nothing is recorded")
    parser.add_argument("--sealed", action="store_true", help="the guest's kernel encrypts; nothing is recorded")
    parser.add_argument("--page", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.page:
        write_page()
        return 0

    known = plugins()
    chosen = [each for name in options.plugins for each in known if name in (short(each), each)] or known
    measured_as_usual = not (options.delay or options.sealed)
    for kernel in options.kernel or [lab_kernels.default_kernel()]:
        for results in measure(kernel, chosen, options.delay / 1000, options.sealed, options.compare):
            if measured_as_usual:
                record(kernel, results)
    return 0


if __name__ == "__main__":
    if __package__:
        sys.exit(main())
    serve()
