"""The IDS suite (compat/ids) finds exactly what was planted by the rootkit of lab/rootkit, whatever reads the guest.

The genuine bindings are one of the readers. Their file driver can't find a moved kernel, so the guest has no KASLR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lab.agent import install
from lab.environment import genuine, symbol_map
from lab.rootkit import Rootkit
from lab.vm import LabVM
from tests.guest.ids import FEW_BUCKETS
from trials.damage.__main__ import trial
from trials.damage.programs import programs
from trials.detection.scenes import FILELESS
from vmishim.guests.ramfile import RamFile
from vmishim.libvmi import Libvmi
from vmishim.libvmi.config import MEMBERS
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[2]
IDS = ROOT / "compat" / "ids"
PROGRAMS = (
    "process_tree",
    "hidden_processes",
    "hidden_modules",
    "tcp_sockets",
    "syscall_table",
    "credentials",
    "open_files",
)
BACKENDS = ("agent", "scalar", "ramfile", "genuine")

LISTENERS = """
import socket, time
kept = [socket.create_server(("127.0.0.1", port)) for port in (4444, 4445)]
time.sleep(10**6)
"""
VISITOR = """
import os
os.setuid(1000)
if os.fork() == 0:
    os.execlp("sleep", "visitor", "infinity")
os.wait()
"""
READLINKS = """
import os, sys
os.chdir(f"/proc/{sys.argv[1]}/fd")
for number in os.listdir():
    sys.stdout.buffer.write(b"%s %s\\0" % (number.encode(), os.readlink(number.encode())))
"""
EVERY = (ROOT / "tests" / "ground" / "every_file.py").read_text()
USTAT, SYSFS, OVERFLOW = 136, 139, 4
"""Two system calls and an exception that nobody makes: a program that did would lead into the rootkit."""
SHOW = 3 * 8
"""Offset of ``show`` in ``struct seq_operations``."""

Findings = set[tuple[Any, ...]]
KEYS = {
    "parent not listed": ("pid", "parent"),
    "hidden process": ("pid", "comm", "lacking"),
    "hidden thread": ("pid", "comm"),
    "hidden module": ("name", "lacking"),
    "hidden socket": ("local", "state", "owners"),
    "hook": ("table", "entry", "address"),
    "outside the kernel's code": ("table", "entry", "address"),
    "changed": ("table", "entry", "address"),
    "kernel's credentials": ("pid", "comm"),
    "shared credentials": ("pid", "comm"),
    "raised": ("pid", "comm"),
    "deleted program": ("pid", "path"),
}
"""What of each kind of finding is compared: all that does not depend on chance."""


@dataclass(frozen=True)
class Suite:
    """The programs, and the ways to run them on one guest."""

    vm: LabVM
    folder: Path
    """With all that the bindings of either side look for in a home."""
    genuine: Path
    """Interpreter that has the genuine bindings."""

    def run(self, program: str, backend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program as a user of that backend would."""
        script = str(IDS / f"{program}.py")
        ram = str(self.vm.ram)
        environment = {**os.environ, "HOME": str(self.folder), "VMISHIM_CONFIG": str(self.folder / "domains.toml")}
        vmishim = [str(Path(sys.executable).with_name("vmishim")), "run"]
        command = {
            "agent": [*vmishim, script, "agent"],
            "scalar": [*vmishim, "--strategy", "scalar", script, "agent"],
            "ramfile": [*vmishim, script, "ram"],
            "genuine": [str(self.genuine), script, ram, "--offsets", str(self.folder / "offsets.json")],
        }[backend]
        with self._still(backend):
            return subprocess.run(
                [*command, *arguments],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )

    def findings(self, program: str, backend: str) -> Findings:
        """What a program finds, as tuples that begin with the kind."""
        baseline = str(self.folder / "baseline.json")
        # Nothing is found in a listing of files; the guest's 300 are hundreds of seconds of scalar reads.
        arguments = {"syscall_table": ["--baseline", baseline], "open_files": ["--programs"]}.get(program, [])
        done = self.run(program, backend, "--json", *arguments)
        assert done.returncode in (0, 1), done.stderr
        found = json.loads(done.stdout)["findings"]
        assert done.returncode == bool(found)
        as_tuples = {(finding["kind"], *(_frozen(finding[key]) for key in KEYS[finding["kind"]])) for finding in found}
        assert len(as_tuples) == len(found)
        return as_tuples

    @contextmanager
    def _still(self, backend: str) -> Iterator[None]:
        """An agent answers in a running guest; for those that read from outside its CPUs are stopped."""
        if backend in ("agent", "scalar"):
            yield
            return
        self.vm.pause()
        try:
            yield
        finally:
            self.vm.resume()


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    """The guest, with nothing planted. Its slabs have two pages, as with 16 CPUs: so some names cross from one page to
    the next."""
    with LabVM.boot(request.param, nokaslr=True, append=f"slub_min_order=1 {FEW_BUCKETS}") as booted:
        yield booted


@pytest.fixture(scope="module")
def suite(vm: LabVM, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The programs, with an agent in the guest, and a baseline of its tables."""
    folder = tmp_path_factory.mktemp("ids")
    agent = install(vm)
    save_private(folder / "key", agent.private)
    (folder / "domains.toml").write_text(
        f'[ram]\nramfile = "{vm.ram}"\n'
        f'[agent]\nagent = "{agent.endpoint}"\nagent_key = "{agent.public.text}"\n'
        f'key = "{folder / "key"}"\ntimeout = 30\n'
    )
    (folder / "sysmap").write_text(symbol_map(vm))
    with Libvmi.over(RamFile("ram", vm.ram)) as vmi:
        offsets = "; ".join(f"{name} = {vmi.get_offset(name)}" for name in MEMBERS)
    (folder / "libvmi.conf").write_text(f'ram {{ ostype = "Linux"; sysmap = "{folder / "sysmap"}"; {offsets}; }}\n')
    made = Suite(vm, folder, genuine())
    done = made.run("layout", "ramfile")
    assert done.returncode == 0, done.stderr
    (folder / "offsets.json").write_text(done.stdout)
    done = made.run("syscall_table", "ramfile", "--record", str(folder / "baseline.json"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return made


@dataclass(frozen=True)
class Attacks:
    """What was planted."""

    rootkit: Rootkit
    listening: int
    """Pid of who has the listeners."""
    unhashed: int
    fileless: int
    expected: dict[str, Findings]


@pytest.fixture(scope="module")
def attacks(suite: Suite, vm: LabVM) -> Attacks:
    """Every attack, all at a time."""
    unlinked, unhashed, both, raised, thief, robbed = sorted(vm.spawn("sleep", "infinity", count=6))
    (listening,) = vm.spawn("python3", "-c", LISTENERS)
    vm.wait_until(lambda: b":4445" in vm.container("ss", "-Hltn").stdout, "the listeners")
    visitor, fileless = _service(vm, "visitor", VISITOR), _service(vm, "fileless", FILELESS)
    vm.wait_until(lambda: vm.run("pgrep", "-P", str(visitor), "-x", "sleep", check=False).stdout, "the visitor's child")
    child = int(vm.run("pgrep", "-P", str(visitor), "-x", "sleep").stdout)
    vm.wait_until(lambda: b"memfd" in vm.run("readlink", f"/proc/{fileless}/exe").stdout, "the program without a file")

    rootkit = Rootkit(vm)
    at, hook, getpid = rootkit.symbols, rootkit.symbols["hooked"], rootkit.symbols["__x64_sys_getpid"]
    for pid in (unlinked, both, visitor):
        rootkit.do("unlink-task", pid)
    for pid in (unhashed, both):
        rootkit.do("unhash-pid", pid)
    rootkit.do("share-cred", raised, 0)
    rootkit.do("share-cred", thief, robbed)
    rootkit.do("zero-uid", child)
    rootkit.do("unlink-listener", 4445)
    rootkit.do("hide-port", 4444, at["tcp4_seq_ops"] + SHOW)
    rootkit.do("patch", at["sys_call_table"] + 8 * USTAT, hook)
    rootkit.do("patch", at["sys_call_table"] + 8 * SYSFS, getpid)
    _lead_gate(rootkit, at["idt_table"] + 16 * OVERFLOW, hook)
    rootkit.do("hide-module")
    tasks, pids = "the list of tasks", "the table of pids"
    expected: dict[str, Findings] = {
        "process_tree": {("parent not listed", child, visitor)},
        "hidden_processes": {
            ("hidden process", unlinked, "sleep", (tasks,)),
            ("hidden process", unhashed, "sleep", (pids,)),
            ("hidden process", both, "sleep", (tasks, pids)),
            ("hidden process", visitor, "python3", (tasks,)),
        },
        "hidden_modules": {("hidden module", "rootkit", ("the list of modules",))},
        "tcp_sockets": {
            ("hidden socket", "127.0.0.1:4445", "LISTEN", ((listening, "python3", 4),)),
            ("hook", "tcp4_seq_ops", "show", at["hooked_show"]),
        },
        "syscall_table": {
            ("outside the kernel's code", "sys_call_table", USTAT, hook),
            ("changed", "sys_call_table", SYSFS, getpid),
            ("outside the kernel's code", "idt_table", OVERFLOW, hook),
        },
        "credentials": {
            ("kernel's credentials", raised, "sleep"),
            ("shared credentials", thief, "sleep"),
            ("shared credentials", robbed, "sleep"),
            ("raised", child, "sleep"),
        },
        "open_files": {("deleted program", fileless, "/memfd:fileless")},
    }
    return Attacks(rootkit, listening, unhashed, fileless, expected)


def _service(vm: LabVM, name: str, program: str, *arguments: str) -> int:
    """Run a Python program outside the container, which may not change its uid; its pid."""
    vm.run("systemd-run", "--quiet", "--collect", f"--unit={name}", "python3", "-IS", "-c", program, *arguments)
    return int(vm.run("systemctl", "show", "-P", "MainPID", name).stdout)


def _lead_gate(rootkit: Rootkit, gate: int, target: int) -> None:
    """Make an entry of the interrupt table lead elsewhere (Intel SDM volume 3, 6.14.1)."""
    with Libvmi.over(RamFile("ram", rootkit.vm.ram)) as vmi:
        low = vmi.read_64_va(gate, 0) & 0x0000_FFFF_FFFF_0000
    rootkit.do("patch", gate, low | target & 0xFFFF | (target & 0xFFFF_0000) << 32)
    rootkit.do("patch", gate + 8, target >> 32)


# One read a request takes minutes for all of them: a clean guest is read so by the two that need fewest.
CLEAN = [
    (program, backend)
    for program in PROGRAMS
    for backend in BACKENDS
    if backend != "scalar" or program in ("hidden_modules", "syscall_table")
]


@pytest.mark.parametrize(("program", "backend"), CLEAN)
def test_a_clean_guest_has_no_findings(suite: Suite, program: str, backend: str) -> None:
    assert suite.findings(program, backend) == set()


@pytest.fixture(scope="module")
def still(vm: LabVM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RamFile]:
    """The guest's memory at one instant, with nothing planted."""
    copy = tmp_path_factory.mktemp("ram") / "ram"
    vm.pause()
    try:
        subprocess.run(["cp", "--sparse=always", vm.ram, copy], check=True)
    finally:
        vm.resume()
    with closing(RamFile("still", copy)) as ram:
        yield ram
    copy.unlink()


@pytest.mark.parametrize("program", programs())
def test_a_wrong_pointer_is_said_soon_and_without_a_traceback(still: RamFile, program: str) -> None:
    """``python -m trials.damage`` tries more."""
    most = 6 if program == "scan" else 20  # it looks at everything that the others look at, and more
    runs = list(trial(program, programs()[program], still, Random(program), each=1, most=most))
    assert [run for run in runs if run.fault] == []
    assert not runs or "marked" in {run.outcome for run in runs}


def test_the_attacks_deceive_the_guest_itself(vm: LabVM, attacks: Attacks) -> None:
    assert b"rootkit" not in vm.read("/proc/modules")
    assert vm.run("sh", "-c", f"kill -0 {attacks.unhashed}", check=False).returncode == 1
    assert attacks.unhashed not in vm.processes()
    # What /proc/net/tcp shows: a line for the table's head, none for either listener.
    assert len(vm.read(f"/proc/{attacks.listening}/net/tcp").splitlines()) == 1


PLANTED = [
    # Read by read: that takes few reads of the same two programs; of the others it is long.
    pytest.param(program, backend, marks=() if (program, backend) in CLEAN else pytest.mark.long)
    for program in PROGRAMS
    for backend in BACKENDS
]


@pytest.mark.parametrize(("program", "backend"), PLANTED)
def test_planted_attacks_are_found(suite: Suite, attacks: Attacks, program: str, backend: str) -> None:
    assert suite.findings(program, backend) == attacks.expected[program]


@pytest.fixture(scope="module")
def every(vm: LabVM) -> int:
    """The pid of a process that has a file of every kind open."""
    vm.run("mkdir", "/root/every")
    pid = _service(vm, "every", EVERY, "/root/every")
    vm.wait_until(lambda: not vm.run("test", "-e", "/root/every/open", check=False).returncode, "the files are open")
    return pid


@pytest.mark.parametrize(
    "backend", ["agent", *(pytest.param(backend, marks=pytest.mark.long) for backend in ("ramfile", "genuine"))]
)
def test_open_files_are_those_of_proc(vm: LabVM, suite: Suite, attacks: Attacks, every: int, backend: str) -> None:
    done = suite.run("open_files", backend, "--json")
    listing = json.loads(done.stdout)["listing"]
    for pid in (1, attacks.listening, attacks.fileless, every):
        lines = vm.run("python3", "-IS", "-c", READLINKS, str(pid)).stdout.split(b"\0")[:-1]
        names = [line.removesuffix(b" (deleted)").decode(errors="backslashreplace") for line in lines]
        expected = {(int(number), path) for number, path in (name.split(" ", 1) for name in names)}
        assert {(entry["fd"], entry["path"]) for entry in listing if entry["pid"] == pid} == expected
        assert pid != every or {"anon_inode:[pidfd]", "anon_inode:[io_uring]"} <= {path for _, path in expected}


def test_names_that_are_not_text_make_no_lines_and_no_findings(suite: Suite, attacks: Attacks, every: int) -> None:
    done = suite.run("open_files", "ramfile")
    lines = done.stdout.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("FINDING")] == lines[-1:]
    assert any(f"{every:>7} python3" in line and r"/memfd:x\nFINDING: 1 y\x1b[2J" in line for line in lines)


def test_findings_are_printed_one_a_line(suite: Suite, attacks: Attacks) -> None:
    done = suite.run("hidden_processes", "ramfile")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(attacks.expected["hidden_processes"])
    assert all(line.startswith("FINDING: hidden process ") for line in done.stdout.splitlines())


def test_without_a_baseline_only_what_leads_out_is_found(suite: Suite, attacks: Attacks) -> None:
    done = suite.run("syscall_table", "ramfile", "--json")
    assert {(finding["table"], finding["entry"]) for finding in json.loads(done.stdout)["findings"]} == {
        ("sys_call_table", USTAT),
        ("idt_table", OVERFLOW),
    }


def test_a_module_without_its_kobject_is_found(suite: Suite, attacks: Attacks) -> None:
    attacks.rootkit.do("hide-kobject")
    lacking = ("the list of modules", "the set of kobjects")
    assert suite.findings("hidden_modules", "ramfile") == {("hidden module", "rootkit", lacking)}


def test_a_guest_that_cannot_be_read_is_no_clean_guest(suite: Suite) -> None:
    done = suite.run("hidden_modules", "genuine", "--offsets", os.devnull)
    assert done.returncode == 2
    assert done.stdout == ""


def test_nothing_is_found_when_all_is_undone(suite: Suite, vm: LabVM, attacks: Attacks, every: int) -> None:
    attacks.rootkit.unload()
    vm.run("systemctl", "stop", "visitor", "fileless", "every")
    for program in PROGRAMS:
        assert suite.findings(program, "ramfile") == set()
    trouble = [line for line in vm.run("dmesg").stdout.splitlines() if b"BUG" in line or b"WARNING" in line]
    assert trouble == []
