# This file runs Volatility and reads its results. It is also licensed under the Volatility Software License 1.0,
# https://www.volatilityfoundation.org/license/vsl-v1.0
"""An independent oracle: volatility3, which shares no code with us, sees in a stopped guest's memory what we see.

It wants symbols with types; ours are made of the guest's BTF and kallsyms (isf.py). With these all of its plugins that
are asked here run: BTF has the types of the kernel itself, and none of a module's is needed.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.volatility import SHOWN, Volatility, arguments, finds, planted, plugins, short
from lab.agent import InstalledAgent
from lab.environment import interpreter
from lab.vm import LabVM
from tests.guest import isf
from vmishim.guests.ramfile import RamFile
from vmishim.inspection import objects
from vmishim.libvmi import Libvmi

ROOT = Path(__file__).parents[2]
VERSION = "2.28.2"
ADDRESS = (1 << 48) - 1
"""volatility3 shows addresses without the bits that page tables do not translate."""
BANNER_SIZE = 512

PROGRAM = """
import socket, time
servers = [socket.create_server(("127.0.0.1", 4444)), socket.create_server(("::1", 4446), family=socket.AF_INET6)]
kept = []
for server in servers:
    near = socket.create_connection(server.getsockname()[:2])
    kept += [near, server.accept()[0]]
kept[1].shutdown(socket.SHUT_WR)
kept += [open("/etc/hostname"), open("/tmp/planted", "w"), *servers]
time.sleep(10**6)
"""

Rows = list[dict[str, Any]]
Plugin = Callable[[str], Rows]


@pytest.fixture
def still(lab: LabVM) -> Iterator[LabVM]:
    """The lab VM with processes, files and sockets planted, its CPUs stopped."""
    planted = lab.spawn("sleep", "infinity", count=5, comm="two words")
    planted |= lab.spawn("python3", "-c", PROGRAM)
    (pid,) = (pid for pid, comm in lab.processes().items() if pid in planted and comm == "python3")
    lab.wait_until(lambda: b"/tmp/planted" in lab.run("ls", "-l", f"/proc/{pid}/fd").stdout, "the planted files")
    lab.pause()
    try:
        yield lab
    finally:
        lab.resume()
        lab.kill(planted)


@pytest.fixture
def volatility(lab: LabVM, tmp_path: Path, request: pytest.FixtureRequest) -> Plugin:
    """Runs a plugin on the lab VM's memory, and gives the rows of its table."""
    symbols, cache = tmp_path / "symbols" / "linux", tmp_path / "cache"
    symbols.mkdir(parents=True)
    cache.mkdir()
    with Libvmi.over(RamFile("lab", lab.ram)) as vmi:
        moved = vmi.vmi.profile.kaslr_offset
        banner = vmi.read_va(vmi.translate_ksym2v("linux_banner"), 0, BANNER_SIZE)[0].split(b"\0")[0] + b"\0"
    made = isf.make(lab.run("cat", "/sys/kernel/btf/vmlinux").stdout, lab.kallsyms(), moved, banner)
    (symbols / "kernel.json").write_text(json.dumps(made))
    program = interpreter("volatility3", VERSION).with_name("vol")
    request.getfixturevalue("still")  # the guest has answered its last question

    def run(plugin: str) -> Rows:
        places = ["-s", str(symbols.parent), "--cache-path", str(cache), "-f", str(lab.ram)]
        command = [str(program), "-q", "--offline", *places, "-r", "json", plugin]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        rows: Rows = json.loads(done.stdout)
        return rows

    return run


def ids(lab: LabVM, folder: Path, program: str) -> Rows:
    """The listing of a program of our IDS suite."""
    (folder / "domains.toml").write_text(f'[lab]\nramfile = "{lab.ram}"\n')
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vmishim")), "run", f"{ROOT}/compat/ids/{program}.py", "lab", "--json"],
        env={**os.environ, "VMISHIM_CONFIG": str(folder / "domains.toml")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listing: Rows = json.loads(done.stdout)["listing"]
    return listing


def endpoint(text: str) -> tuple[Any, int]:
    """ "[::1]:80" as address and port."""
    address, _, port = text.rpartition(":")
    return ipaddress.ip_address(address.strip("[]")), int(port)


def place(path: str) -> str:
    """A path without the mark that it is deleted, which volatility3 shows of memfds; of files in no folder only that:
    where we have a name, it has the inode's number."""
    return "anon_inode" if path.startswith("anon_inode:") else path.removesuffix(" (deleted)")


@pytest.mark.long
def test_volatility_sees_the_same(lab: LabVM, agent: InstalledAgent, volatility: Plugin, tmp_path: Path) -> None:
    """Tasks, modules, sockets and files, in one test: each start of volatility3 reads its symbols again."""
    with Libvmi.over(RamFile("lab", lab.ram)) as vmi:
        tasks, modules = list(objects.tasks(vmi)), list(objects.modules(vmi))

    # volatility3 leaves out the idle task, where the list begins.
    ours = {(task.pid, task.ppid, task.uid, task.comm, task.address & ADDRESS) for task in tasks if task.pid}
    theirs = volatility("linux.pslist")
    assert {(row["PID"], row["PPID"], row["UID"], row["COMM"], row["OFFSET (V)"]) for row in theirs} == ours
    assert len(theirs) == len(ours)

    theirs = volatility("linux.lsmod")
    assert [(row["Module Name"], row["Code Size"], row["Offset"]) for row in theirs] == [
        (module.name, module.size, module.address & ADDRESS) for module in modules
    ]

    sockets = {
        (pid, number, entry["state"].replace("-", ""), *endpoint(entry["local"]), *endpoint(entry["remote"]))
        for entry in ids(lab, tmp_path, "tcp_sockets")
        for pid, _, number in entry["owners"]
    }
    assert {
        (
            row["PID"],
            row["FD"],
            row["State"].replace("_", ""),
            ipaddress.ip_address(row["Source Addr"]),
            int(row["Source Port"]),
            ipaddress.ip_address(row["Destination Addr"]),
            int(row["Destination Port"]),
        )
        for row in volatility("linux.sockstat")
        if row["Proto"] == "TCP"
    } == sockets
    assert {state for _, _, state, *_ in sockets} >= {"LISTEN", "ESTABLISHED", "FINWAIT2", "CLOSEWAIT"}

    files = {(entry["pid"], entry["fd"], place(entry["path"])) for entry in ids(lab, tmp_path, "open_files")}
    # volatility3 takes a table of files for none if its first entry is empty (files_struct.get_fds).
    shown = {pid for pid, number, _ in files if number == 0}
    assert {(row["PID"], row["FD"], place(row["Path"])) for row in volatility("linux.lsof")} == {
        file for file in files if file[0] in shown
    }
    assert {path for *_, path in files} >= {"/tmp/planted", "/etc/hostname"}


# The same plugins on the agent.


@pytest.fixture(scope="module")
def on_agent(lab: LabVM, agent: InstalledAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volatility]:
    """Runs plugins on the lab VM's agent."""
    with closing(Volatility(tmp_path_factory.mktemp("volatility"), lab, agent)) as made:
        made.agent("linux.boottime.Boottime")  # makes the symbols
        yield made


def test_vmishim_vol_lists_every_process_in_few_requests(lab: LabVM, on_agent: Volatility) -> None:
    sleepers = lab.spawn("sleep", "infinity", count=5, comm="for pslist")
    try:
        found = on_agent.agent("linux.pslist.PsList")
        assert {row["PID"] for row in found.rows or [] if row["COMM"] == "for pslist"} == sleepers
        assert found.requests <= 15
    finally:
        lab.kill(sleepers)


def test_a_guest_that_has_no_agent_is_one_clear_error(on_agent: Volatility) -> None:
    command = [str(Path(sys.executable).with_name("vmishim")), "vol", "no-such-guest", "linux.pslist"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vmishim: no domain 'no-such-guest'")


@pytest.mark.long
def test_each_detector_finds_what_was_planted_for_it(lab: LabVM, on_agent: Volatility) -> None:
    wanted = {name: plugin for plugin in plugins() if (name := short(plugin)) in SHOWN and name != "linux.psscan"}
    with planted(lab) as plants:
        missed = [
            name
            for name, plugin in wanted.items()
            if not finds(on_agent.agent(plugin, *arguments(plugin, plants)).rows or [], plants.expected[name])
        ]
    assert missed == []
