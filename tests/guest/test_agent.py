"""The whole path on a booted kernel: what the shim lists is what ``/proc`` says and what was planted."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from lab.agent import AGENT, KEYS, InstalledAgent
from lab.vm import CommandError, LabVM
from tests.guest.ids import Ids
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests.agent import STRATEGIES, AgentGuest, Strategy, connect
from vmishim.libvmi import Libvmi, pause
from vmishim.memory.reader import MemoryReader
from vmishim.wire.keys import generate


def over(agent: InstalledAgent, strategy: Strategy) -> Ids:
    return Ids(Libvmi.over(agent.connect(strategy=strategy)))


def stable(lab: LabVM, ids: Ids) -> tuple[dict[int, str], dict[int, str]]:
    """A listing and ``/proc``'s word, of an instant at which nothing came or went."""
    for _ in range(20):
        before = lab.processes()
        listed = ids.processes()
        if before.keys() == lab.processes().keys():
            return listed, before
    raise AssertionError("processes come and go too fast to compare")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_list_is_exactly_proc(lab: LabVM, agent: InstalledAgent, strategy: Strategy) -> None:
    listed, proc = stable(lab, over(agent, strategy))
    assert listed.keys() == proc.keys()
    # Of kernel threads /proc tells more than task_struct.comm's 15 bytes: whole names, and what a worker works on.
    assert {pid: comm for pid, comm in listed.items() if not proc[pid][:15].startswith(comm)} == {}


def test_planted_processes_are_listed(lab: LabVM, ids: Ids) -> None:
    before = ids.processes().keys()
    planted = lab.spawn("sleep", "infinity", count=7, comm="planted")
    try:
        listed = ids.processes()
        assert {pid for pid, comm in listed.items() if comm == "planted"} == planted
        assert not planted & before
    finally:
        lab.kill(planted)
    assert not planted & ids.processes().keys()


def test_scalar_and_batch_return_the_same_bytes(lab: LabVM, agent: InstalledAgent, guest: AgentGuest) -> None:
    """Every word and cell a listing brought is what a scalar read gives, on planted processes that stand still.

    No other may come or go, which changes its neighbours' links.
    """
    planted = lab.spawn("sleep", "infinity", count=20)
    ids, scalar = Ids(Libvmi.over(guest)), agent.connect(strategy="scalar").reader
    try:
        for _ in range(20):
            before = lab.processes().keys()
            guest.hold()
            differing = compared(ids, guest, scalar, planted)
            guest.release()
            if before == lab.processes().keys():
                break
        else:
            raise AssertionError("processes come and go too fast to compare")
        assert differing == []
    finally:
        lab.kill(planted)


def compared(ids: Ids, guest: AgentGuest, scalar: MemoryReader, planted: set[int]) -> list[str]:
    """Where the words and cells that a listing brought of these processes are not what a scalar read gives."""
    ids.executables()
    ids.executables()
    addresses: dict[int, int] = {}
    for task in ids.tasks():
        if ids.pid(task) in planted:
            addresses |= {at: 8 for at in guest.words if task <= at < task + guest.profile.size("task_struct")}
            addresses |= {at: len(c) for at, c in guest.cells.items() if task <= at < task + 9000}
    assert len(addresses) >= 20 * 6
    fields = ids.at("task_struct tasks"), ids.at("task_struct pid"), ids.at("task_struct comm")
    tasks = set(ids.tasks())
    assert all(any(at - offset in tasks for at in addresses) for offset in fields)
    return [hex(at) for at, count in addresses.items() if guest.reader.read(at, count) != scalar.read(at, count)]


def test_a_listing_is_one_request(lab: LabVM, agent: InstalledAgent) -> None:
    guest = agent.connect()
    ids = Ids(Libvmi.over(guest))
    ids.processes()
    ids.modules()
    for listing in (ids.processes, ids.modules):
        before = guest.link.requests
        assert listing()
        assert guest.link.requests == before + 1


def test_modules_are_those_of_proc(lab: LabVM, ids: Ids) -> None:
    assert ids.modules() == {line.split()[0] for line in lab.read("/proc/modules").decode().splitlines()}


def test_symbols_are_those_of_kallsyms(lab: LabVM, ids: Ids) -> None:
    named: dict[str, int] = {}
    for line in lab.kallsyms().decode().splitlines():
        address, _, name = line.split()[:3]
        named.setdefault(name, int(address, 16))
    for name in ("init_task", "linux_banner", "_text", "sys_call_table", "tcp_hashinfo"):
        assert ids.vmi.translate_ksym2v(name) == named[name]
    version = lab.run("uname", "-r").stdout.decode().strip()
    assert ids.vmi.read_ksym("linux_banner", 200)[0].startswith(f"Linux version {version} ".encode())


def test_an_unknown_symbol_is_libvmis_error(ids: Ids) -> None:
    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
        ids.vmi.translate_ksym2v("no_such_symbol")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("address", [0, 8, 0x7FFF_FFFF_F000, 0xDEAD_0000_0000_0000, 0xFFFF_FFFF_FFFF_FFF8])
def test_an_unmapped_address_is_libvmis_error(agent: InstalledAgent, strategy: Strategy, address: int) -> None:
    ids = over(agent, strategy)
    assert ids.unreadable(address)
    assert ids.processes()  # and nothing is the worse for it


def test_a_wrong_key_is_refused(agent: InstalledAgent) -> None:
    with pytest.raises(LinkError, match="not permitted"):
        connect(agent.domain(), private=generate())
    with pytest.raises(LinkError):
        connect(replace(agent.domain(timeout=2), agent_key=generate().public.text), private=agent.private)


def test_an_agent_killed_in_the_middle_comes_back(lab: LabVM, agent: InstalledAgent, guest: AgentGuest) -> None:
    """Killed while two threads ask: each listing is whole or one LinkError; the next agent is found by itself."""
    ids = Ids(Libvmi.over(guest))
    truth = ids.processes().keys()
    stop = threading.Event()
    wrong: list[object] = []

    def list_on() -> None:
        while not stop.is_set():
            try:
                guest.flush()
                listed = ids.processes().keys()
                if not {1, 2} <= listed:
                    wrong.append(listed)
            except LinkError:
                pass
            except LibvmiError as error:  # another thread's flush came between: a task may be gone by then, memory not
                wrong.append(error)

    threads = [threading.Thread(target=list_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        lab.run("systemctl", "kill", "--signal=KILL", "vmishim-agent")
        agent.connect(timeout=120).close()  # each look at systemd's state would delay the next agent's start
    finally:
        stop.set()  # or the threads, and with them the test run, go on after a failure
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a read hangs"
    assert wrong == []
    handshakes = guest.link.handshakes
    assert ids.processes().keys() & truth == truth & lab.processes().keys()
    assert handshakes >= 1


def test_no_agent_is_one_clear_error(lab: LabVM, agent: InstalledAgent) -> None:
    guest = agent.connect(timeout=3)
    lab.run("systemctl", "stop", "vmishim-agent")
    try:
        with pytest.raises(LinkError, match=r"tcp://127\.0\.0\.1"):
            Ids(Libvmi.over(guest)).processes()
    finally:
        lab.run("systemctl", "start", "vmishim-agent")
    assert Ids(Libvmi.over(guest)).processes()


def test_the_agent_exits_cleanly_and_logs_to_the_journal(lab: LabVM, agent: InstalledAgent) -> None:
    lab.run("systemctl", "stop", "vmishim-agent")
    shown = lab.run("systemctl", "show", "vmishim-agent", "-p", "Result,ExecMainStatus").stdout.decode()
    lab.run("systemctl", "start", "vmishim-agent")
    assert "Result=success" in shown
    assert "ExecMainStatus=0" in shown
    journal = lab.run("journalctl", "-u", "vmishim-agent", "--no-pager", "-o", "cat").stdout.decode()
    assert "stopped" in journal
    assert "listening on tcp://" in journal
    assert agent.public.fingerprint in journal


def test_the_container_is_outside_the_agents_cgroup(lab: LabVM, agent: InstalledAgent) -> None:
    pid = lab.run("systemctl", "show", "vmishim-agent", "-p", "MainPID", "--value").stdout.decode().strip()
    assert b"monitored" not in lab.read(f"/proc/{pid}/cgroup")
    inside = lab.container("ps", "-o", "pid,args").stdout.decode()
    assert "agent.pyz" not in inside


def test_pause_holds_still(lab: LabVM, ids: Ids) -> None:
    with pause(ids.vmi):
        before = ids.processes()
        planted = lab.spawn("sleep", "infinity", count=3)
        assert ids.processes() == before
    listed = ids.processes()
    lab.kill(planted)
    assert planted <= listed.keys()


def test_symbols_by_address_are_the_first_of_kallsyms(lab: LabVM, guest: AgentGuest) -> None:
    """The first name of each address: the kernel's own, and those of a module loaded after the agent, and unloaded."""
    first: dict[int, str] = {}
    for line in lab.kallsyms().decode().splitlines():
        first.setdefault(int(line.split()[0], 16), line.split()[2])
    some = dict([*first.items()][:: len(first) // 900])
    assert guest.remote.names([*some]) == [*some.values()]
    others = [address for address in (each + 1 for each in some) if address not in first][:900]
    assert guest.remote.names(others) == [None] * len(others)

    lab.run("modprobe", "dummy")
    try:
        lines = [line.split() for line in lab.kallsyms().decode().splitlines()]
        own = {line[2] for line in lines if len(line) == 3}  # some of a module's names are the kernel's, too
        of_module = {
            line[2]: int(line[0], 16) for line in reversed(lines) if line[3:] == ["[dummy]"] and line[2] not in own
        }
        assert guest.remote.symbols([*of_module]) == [*of_module.values()]
        names = {line[2] for line in lines if line[3:] == ["[dummy]"]}
        assert names >= set(guest.remote.names([*of_module.values()]))
    finally:
        lab.run("rmmod", "dummy")
    assert guest.remote.symbols(["dummy_setup"]) == [None]
    assert guest.remote.names([of_module["dummy_setup"]]) == [None]


def test_an_agent_that_can_not_do_it_does_not_start(lab: LabVM, agent: InstalledAgent) -> None:
    """A kernel that can't is told before the key is looked for."""
    # What encrypts there, by the kernel's own list.
    can = b" bpf_crypto_encrypt\n" in lab.kallsyms()
    told = lab.run("python3", AGENT, "check").stdout.decode()
    assert f"encryption by the kernel: {'yes' if can else f'Linux {lab.image.release} '}" in told
    for option, why in (
        (
            ("--kernel-key", "/nowhere"),
            "cannot read /nowhere" if can else r"use Linux 6\.10 or newer",
        ),
        (("--kernel-key", f"{KEYS}/kernel.key", "--allow-injection"), "--allow-injection or --kernel-key"),
    ):
        with pytest.raises(CommandError, match=why):
            lab.run("python3", AGENT, "serve", "--listen", "tcp://127.0.0.1:5999", *option)
