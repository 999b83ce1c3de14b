"""drgn on a booted guest: what its helpers and commands find there is what the guest's ``/proc`` has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest

from lab.agent import InstalledAgent
from lab.vm import LabVM
from vmishim import cli
from vmishim.errors import LinkError
from vmishim.guests.agent import AgentGuest
from vmishim.guests.ramfile import RamFile
from vmishim.wire.keys import save_private

pytest.importorskip("drgn", reason="pip install 'vmishim[drgn]', or run ci/setup again")

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.fs import d_path, for_each_file, for_each_mount, mount_dst
from drgn.helpers.linux.mm import access_process_vm, cmdline, environ, for_each_vma
from drgn.helpers.linux.module import for_each_module
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.pid import find_task, for_each_task
from drgn.helpers.linux.slab import for_each_slab_cache

from vmishim.drgn.guest import Guest

T = TypeVar("T")
U = TypeVar("U")
PLANTED = """\
import os, socket, sys, time
kept = [open(f"/tmp/planted-{number}", "w") for number in range(20)]
os.environ["PLANTED"] = "yes"
sys.stdout.write(f"{os.getpid()}\\n")
sys.stdout.flush()
time.sleep(1000)
"""


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are kept in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def opened(agent: InstalledAgent) -> Iterator[Guest]:
    """The guest in drgn, by its agent."""
    with closing(agent.connect()) as target:
        yield Guest(target)


@pytest.fixture
def guest(opened: Guest) -> Guest:
    """The same, with nothing known of its memory."""
    opened.refresh()
    return opened


def counted(guest: Guest, of: Callable[[], object]) -> int:
    """Requests that something took."""
    assert isinstance(guest.target, AgentGuest)
    before = guest.target.link.requests
    of()
    return guest.target.link.requests - before


def stable(look: Callable[[], T], truth: Callable[[], U]) -> tuple[T, U]:
    """What drgn finds, and what the guest says, once that is the same before and after."""
    before = truth()
    for _ in range(20):
        found = look()
        after = truth()
        if after == before:
            return found, before
        before = after
    raise AssertionError(f"{before} did not stand still")


def threads(lab: LabVM) -> set[int]:
    """All threads, from ``/proc``, without the shell that lists them."""
    own, *paths = lab.run("sh", "-c", "echo $$ /proc/[0-9]*/task/*").stdout.decode().split()
    return {int(path.rsplit("/", 1)[1]) for path in paths} - {int(own)}


def tasks(prog: drgn.Program) -> dict[int, str]:
    return {task.pid.value_(): task.comm.string_().decode() for task in for_each_task(prog)}


def test_tasks_are_those_of_proc(lab: LabVM, guest: Guest) -> None:
    planted = lab.spawn("sleep", "infinity", count=7, comm="planted")
    try:
        found, told = stable(lambda: tasks(guest.prog), lambda: threads(lab))
        assert found.keys() == told
        assert {pid for pid, comm in found.items() if comm == "planted"} == planted
        assert found[1] == "systemd"
    finally:
        lab.kill(planted)


def test_tasks_take_15_requests_and_then_3(lab: LabVM, guest: Guest) -> None:
    planted = lab.spawn("sleep", "infinity", count=60)
    try:
        assert counted(guest, lambda: tasks(guest.prog)) <= 15
        assert len(tasks(guest.prog)) >= 110
        assert counted(guest, lambda: tasks(guest.prog)) <= 15  # all of it in less than a second, or some again
        for _ in range(2):
            guest.refresh()
            assert counted(guest, lambda: tasks(guest.prog)) <= 3
    finally:
        lab.kill(planted)


def test_modules_are_those_of_proc_in_one_request(lab: LabVM, guest: Guest) -> None:
    found: list[str] = []

    def look() -> None:
        for module in for_each_module(guest.prog):
            found.append(module.name.string_().decode())

    assert counted(guest, look) == 1
    told = [line.split()[0] for line in lab.read("/proc/modules").decode().splitlines()]
    assert found == told
    assert len(told) > 5


def test_open_files_of_a_process_are_those_of_proc(lab: LabVM, guest: Guest) -> None:
    script = f"python3 -c '{PLANTED}' </dev/null >/run/planted.out 2>&1 & echo $!"
    pid = int(lab.run("sh", "-c", script).stdout)
    try:
        lab.wait_until(lambda: lab.run("cat", "/run/planted.out").stdout.strip(), "the planted process")
        links = lab.run(
            "sh", "-c", f"cd /proc/{pid}/fd; for at in *; do echo $at $(readlink $at); done"
        ).stdout.decode()
        told = {int(fd): path for fd, path in (line.split(" ", 1) for line in links.splitlines())}
        task = find_task(guest.prog, pid)
        found = {fd: d_path(file.f_path).decode() for fd, file in for_each_file(task)}
        assert found == told
        assert len(found) == 23
    finally:
        lab.kill({pid})


def test_mounts_are_those_of_proc(lab: LabVM, guest: Guest) -> None:
    lines = [line.split() for line in lab.read("/proc/1/mountinfo").decode().splitlines()]
    told = {(int(words[0]), words[4]) for words in lines}
    found = {(mount.mnt_id.value_(), mount_dst(mount).decode()) for mount in for_each_mount(guest.prog)}
    # In /proc a mount above the root's own is left out.
    assert found >= told
    assert {path for _, path in found - told} <= {"/"}


def test_slab_caches_are_those_of_proc_in_few_requests(lab: LabVM, guest: Guest) -> None:
    found: set[str] = set()

    def look() -> None:
        found.update(cache.name.string_().decode() for cache in for_each_slab_cache(guest.prog))

    assert counted(guest, look) <= 3
    told = {line.split()[0] for line in lab.read("/proc/slabinfo").decode().splitlines()[2:]}
    assert told <= found  # caches whose objects have the same size are one in /proc


def test_memory_of_a_process_is_its_own(lab: LabVM, guest: Guest) -> None:
    (pid,) = lab.spawn("sleep", "infinity", count=1)
    try:
        task = find_task(guest.prog, pid)
        assert cmdline(task) == [b"sleep", b"infinity"]
        told = lab.read(f"/proc/{pid}/environ").split(b"\0")[:-1]
        assert environ(task) == told
        maps = [line.split() for line in lab.read(f"/proc/{pid}/maps").decode().splitlines()]
        ranges = [tuple(int(word, 16) for word in words[0].split("-")) for words in maps if words[-1] != "[vsyscall]"]
        assert [(vma.vm_start.value_(), vma.vm_end.value_()) for vma in for_each_vma(task.mm)] == ranges
        start = ranges[0][0]
        assert access_process_vm(task, start, 4) == b"\x7fELF"
    finally:
        lab.kill({pid})


def test_globals_have_their_types_and_symbols_their_names(lab: LabVM, guest: Guest) -> None:
    prog = guest.prog
    assert prog["UTS_RELEASE"].string_().decode() == lab.run("uname", "-r").stdout.decode().strip()
    assert prog["init_task"].comm.string_().startswith(b"swapper")
    assert prog["linux_banner"].string_() == lab.read("/proc/version")
    assert list(for_each_online_cpu(prog)) == [0]
    assert per_cpu(prog["runqueues"], 0).cpu == 0
    lines = [line.split() for line in lab.kallsyms().decode().splitlines()]
    of_kernel = {words[2]: int(words[0], 16) for words in reversed(lines) if len(words) == 3}
    of_modules = [(words[2], int(words[0], 16)) for words in lines if len(words) == 4 and words[3] == "[virtio_net]"]
    for name in ("init_task", "do_exit", "tcp_hashinfo", "linux_banner"):
        assert prog.symbol(name).address == of_kernel[name]
    assert prog.symbol(of_kernel["do_exit"] + 5).name == "do_exit"
    name, address = next(each for each in of_modules if each[0] == "virtnet_poll")
    assert prog.symbol(address + 3).name == name
    with pytest.raises(LookupError):
        prog.symbol("no_such_symbol")
    with pytest.raises(KeyError):
        prog["no_such_variable"]
    with pytest.raises(LookupError):
        prog.type("struct no_such_structure")


@pytest.mark.parametrize("address", [0, 0x7000_0000_0000, 0xFFFF_C8FF_FFFF_F000, 0xFFFF_FFFF_FFFF_FFF0])
def test_unreadable_memory_is_drgns_fault_with_our_words(guest: Guest, address: int) -> None:
    with pytest.raises(drgn.FaultError, match="the guest has no readable memory at this address") as caught:
        guest.prog.read(address, 8)
    assert caught.value.address == address
    with pytest.raises(drgn.FaultError, match="the guest has no memory at this physical address"):
        guest.prog.read(1 << 45, 8, physical=True)


@pytest.mark.long
def test_an_agent_that_dies_in_the_middle_is_an_error_and_no_fault(lab: LabVM, agent: InstalledAgent) -> None:
    with closing(agent.connect(timeout=2.0)) as target:
        guest = Guest(target)
        found = iter(for_each_task(guest.prog))
        next(found)
        lab.run("systemctl", "stop", "vmishim-agent")
        try:
            guest.refresh()
            with pytest.raises(LinkError, match="agent"):
                list(found)
        finally:
            lab.run("systemctl", "start", "vmishim-agent", timeout=120)
        assert 1 in tasks(guest.prog)


def test_a_ram_file_gives_what_the_agent_gives(lab: LabVM, guest: Guest) -> None:
    """And so does physical memory, which the agent reads by the direct map."""
    planted = lab.spawn("sleep", "infinity", count=5, comm="planted")
    with closing(RamFile("ram", lab.ram)) as ram:
        other = Guest(ram)
        lab.pause()
        try:
            found = tasks(other.prog)
        finally:
            lab.resume()
        assert {pid for pid, comm in found.items() if comm == "planted"} == planted
        assert {pid for pid, comm in tasks(guest.prog).items() if comm == "planted"} == planted
        lab.kill(planted)
        banner = guest.prog["linux_banner"].address_
        for each in (guest, other):
            base = each.prog["phys_base"].value_()
            at = (banner - 0xFFFF_FFFF_8000_0000 + base) % 2**64
            assert each.prog.read(at, 14, physical=True) == b"Linux version "


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vmishim(
    agent: InstalledAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """``vmishim drgn`` with the guest enrolled as "lab": arguments -> (exit status, output, errors)."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    save_private(tmp_path / "key", agent.private)
    assert cli.main(["enroll", "lab", agent.endpoint, agent.public.text]) == 0

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.main(["drgn", *arguments]), *capfd.readouterr()

    return run


def test_a_script_has_prog_and_its_arguments(lab: LabVM, vmishim: Command, tmp_path: Path) -> None:
    script = tmp_path / "list.py"
    script.write_text(
        "import sys\n"
        "from drgn.helpers.linux import find_task, for_each_module\n"
        "print(sys.argv[1:], find_task(prog, 1).comm.string_().decode())\n"
        "print(*(module.name.string_().decode() for module in for_each_module()))\n"
    )
    status, out, err = vmishim("lab", "--stats", str(script), "-x", "y")
    told = [line.split()[0] for line in lab.read("/proc/modules").decode().splitlines()]
    assert (status, out) == (0, f"['-x', 'y'] systemd\n{' '.join(told)}\n")
    assert re.fullmatch(r"vmishim: batch: \d+ requests, .*\n", err)


def test_an_expression_has_the_helpers(vmishim: Command) -> None:
    assert vmishim("lab", "-e", "print(find_task(prog, 1).comm.string_())") == (0, "b'systemd'\n", "")
    status, out, err = vmishim("lab", "-e", "1/0")
    assert (status, out) == (1, "")
    assert "ZeroDivisionError" in err


def test_crash_style_commands_run(lab: LabVM, vmishim: Command) -> None:
    status, out, err = vmishim("lab", "--crash", "ps", "1")
    assert (status, err) == (0, "")
    assert re.search(r"(?m)^ +1 +0 +\d+ +[0-9a-f]{16} .* systemd$", out)
    status, out, err = vmishim("lab", "--crash", "mod | wc -l")
    assert (status, int(out), err) == (0, lab.read("/proc/modules").count(b"\n") + 1, "")
    assert vmishim("lab", "--crash", "frobnicate") == (1, "", "crash: frobnicate: command not found\n")


def test_what_you_named_wrong_is_one_line(vmishim: Command) -> None:
    status, out, err = vmishim("web-9", "-e", "1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no domain 'web-9'" in err
