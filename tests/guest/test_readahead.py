"""Reading ahead: whatever an IDS follows is learned, is exact, and is never older than promised (docs/freshness.md)."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.guest.ids import Ids
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import Libvmi
from vmishim.memory.lifetimes import STALE
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.messages import More

LISTEN = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=200)
kept = []
for _ in range(int(sys.argv[2])):
    kept += [socket.create_connection(server.getsockname()), server.accept()[0]]
print("there", flush=True)
time.sleep(10**6)
"""


@pytest.fixture
def scalar(agent: InstalledAgent) -> Iterator[Ids]:
    target = agent.connect(strategy="scalar")
    yield Ids(Libvmi.over(target))
    target.close()


def requests(guest: AgentGuest, listing: Callable[[], Any]) -> int:
    before = guest.link.requests
    listing()
    return guest.link.requests - before


def learned(guest: AgentGuest, listing: Callable[[], Any], most: int) -> None:
    """After a few passes a listing costs at most ``most`` requests."""
    costs = []
    for _ in range(6):
        costs.append(requests(guest, listing))
        if costs[-1] <= most:
            return
    raise AssertionError(f"it cost {costs} requests, {most} were due")


def same(listing: Callable[[], Any], truth: Callable[[], Any]) -> Any:
    """What ``listing`` says at an instant at which ``truth`` stands still."""
    for _ in range(20):
        before = truth()
        listed = listing()
        if truth() == before:
            assert listed == before
            return listed
    raise AssertionError("the guest does not stand still")


def test_executables_and_parents_are_learned(lab: LabVM, guest: AgentGuest, ids: Ids, scalar: Ids) -> None:
    planted = lab.spawn("sleep", "infinity", count=5)
    learned(guest, ids.executables, 1)
    listed = ids.executables()
    for pid in planted:
        status = lab.read(f"/proc/{pid}/status").decode()
        words = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
        path = lab.run("readlink", f"/proc/{pid}/exe").stdout.decode().strip()
        assert listed[pid] == (int(words["Uid"]), int(words["PPid"]), path.rpartition("/")[2])
    lab.kill(planted)


def test_a_process_tree_by_children_lists_is_one_listing(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    """Each task has a list head of its own, ``children``: reading it begins no snapshot of its own."""

    def tree() -> dict[int, set[int]]:
        children, sibling = ids.at("task_struct children"), ids.at("task_struct sibling")
        return {ids.pid(task): {ids.pid(link - sibling) for link in ids.ring(task + children)} for task in ids.tasks()}

    planted = lab.spawn("sleep", "infinity", count=4)
    learned(guest, tree, 1)
    listed = tree()
    (init,) = {int(lab.read(f"/proc/{pid}/stat").decode().rsplit(")", 1)[1].split()[1]) for pid in planted}
    assert planted <= listed[init]
    assert set().union(*listed.values()) == listed.keys() - {0}
    lab.kill(planted)


def test_threads_are_those_of_proc(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    program = "import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(10**6,)).start()"
    planted = lab.spawn("python3", "-c", program)
    (pid,) = planted
    tasks = f"/proc/{pid}/task"
    lab.wait_until(lambda: len(lab.run("ls", tasks).stdout.split()) == 10, "ten threads")

    def truth() -> dict[int, int]:
        listed = lab.run("sh", "-c", "ls -d /proc/[0-9]*/task/*").stdout.decode().split()
        own = {int(path.split("/")[2]) for path in listed} - lab.processes().keys()  # the listing's own shell
        pairs = {int(path.split("/")[4]): int(path.split("/")[2]) for path in listed}
        return {tid: process for tid, process in pairs.items() if process not in own}

    learned(guest, ids.threads, 2)
    listed = same(lambda: {tid: pid for tid, pid in ids.threads().items() if tid}, truth)
    assert sorted(tid for tid, process in listed.items() if process == pid) == sorted(
        int(tid) for tid in lab.run("ls", tasks).stdout.split()
    )
    lab.kill(planted)


def test_open_files_are_those_of_proc(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    program = "import time\nkept = [open('/etc/hostname') for _ in range(100)]\ntime.sleep(10**6)"
    planted = lab.spawn("python3", "-c", program)
    (pid,) = planted
    lab.wait_until(lambda: len(lab.run("ls", f"/proc/{pid}/fd").stdout.split()) >= 103, "a hundred open files")
    learned(guest, ids.files, 5)
    listed = {number: name for (owner, number), name in ids.files().items() if owner == pid}
    shown = lab.run("ls", "-l", f"/proc/{pid}/fd").stdout.decode().splitlines()[1:]
    named = {int(line.split()[-3]): line.split()[-1] for line in shown}
    assert listed.keys() == named.keys()
    hosts = {number for number, target in named.items() if target.endswith("/hostname")}
    assert len(hosts) == 100
    assert {listed[number] for number in hosts} == {"hostname"}
    lab.kill(planted)


def test_mappings_are_those_of_proc(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    planted = lab.spawn("python3", "-c", "import json, ssl, time\ntime.sleep(10**6)")
    (pid,) = planted
    lab.wait_until(
        lambda: b"S (sleeping)" in lab.read(f"/proc/{pid}/status") and b"ssl" in lab.read(f"/proc/{pid}/maps"),
        "it sleeps",
    )

    def maps() -> set[tuple[int, ...]]:
        lines = lab.read(f"/proc/{pid}/maps").decode().splitlines()
        return {tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines if "[vsyscall]" not in line}

    truth = same(lambda: ids.mappings(pid), maps)
    assert len(truth) > 30
    assert [ids.mappings(pid) == truth for _ in range(5)] == [True] * 5
    learned(guest, lambda: ids.mappings(pid), 10)
    lab.kill(planted)


def proc_sockets(lab: LabVM) -> list[tuple[int, int, int]]:
    """(local port, remote port, state) by /proc/net/tcp and tcp6, of the guest's own and the container's namespace."""
    found = []
    for run in (lab.run, lab.container):
        text = run("sh", "-c", "cat /proc/net/tcp /proc/net/tcp6").stdout.decode()
        for line in text.splitlines():
            fields = line.split()
            if fields and fields[0].endswith(":"):
                local, remote = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
                found.append((local, remote, int(fields[3], 16)))
    return sorted(found)


def test_sockets_are_those_of_proc_in_every_namespace(lab: LabVM, guest: AgentGuest, ids: Ids, scalar: Ids) -> None:
    planted = lab.spawn("python3", "-c", LISTEN, "4711", "20")
    lab.wait_until(lambda: sum(local == 4711 for local, _, _ in proc_sockets(lab)) == 21, "forty connected sockets")

    def ours(listing: Callable[[], list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
        return [each for each in listing() if 4711 in each[:2]]

    # Our own connection to the agent, and whatever else comes and goes, must stand still for a moment.
    listed = same(ids.sockets, lambda: proc_sockets(lab))
    assert sum(local == 4711 and state == 10 for local, _, state in listed) == 1
    assert sum(4711 in (local, remote) and state == 1 for local, remote, state in listed) == 40
    learned(guest, ids.sockets, 2)
    # Read by read it takes seconds, in which no other connection stands still.
    assert ours(ids.sockets) == ours(scalar.sockets) == ours(lambda: listed)
    lab.kill(planted)


def test_time_wait_sockets_are_there(lab: LabVM, ids: Ids) -> None:
    program = (
        "import socket, time\n"
        "server = socket.create_server(('127.0.0.1', 4712))\n"
        "for _ in range(5):\n"
        "    ours = socket.create_connection(server.getsockname()); theirs = server.accept()[0]\n"
        "    ours.close(); theirs.recv(1); theirs.close()\n"
        "time.sleep(10**6)\n"
    )
    planted = lab.spawn("python3", "-c", program)

    def waiting(listed: list[tuple[int, int, int]]) -> int:
        return sum(4712 in (local, remote) and state == 6 for local, remote, state in listed)

    lab.wait_until(lambda: waiting(proc_sockets(lab)) == 5, "five sockets in TIME_WAIT")
    assert waiting(ids.sockets()) == 5
    lab.kill(planted)


def test_whole_structures_are_learned(guest: AgentGuest, ids: Ids, scalar: Ids) -> None:
    """An IDS that copies each ``task_struct`` whole and takes it apart on its own side."""
    size = guest.profile.size("task_struct")
    pid, comm = ids.at("task_struct pid"), ids.at("task_struct comm")

    def copies() -> dict[int, bytes]:
        found = {}
        for task in ids.tasks():
            data, _ = ids.vmi.read_va(task, 0, size)
            assert len(data) == size
            found[int.from_bytes(data[pid : pid + 4], "little")] = data[comm : comm + 16].split(b"\0")[0]
        return found

    learned(guest, copies, 2)  # the first copy has the list's head in it: a look at it, and another follows
    assert same(copies, lambda: {scalar.pid(task): scalar.comm(task).encode() for task in scalar.tasks()})


def test_an_array_is_read_in_few_requests(guest: AgentGuest, ids: Ids, scalar: Ids) -> None:
    """The system call table, entry by entry, as a detector of hooks reads it."""
    table = ids.vmi.translate_ksym2v("sys_call_table")
    before = guest.link.requests
    ours = [ids.pointer(table + 8 * number) for number in range(440)]
    assert guest.link.requests - before <= 8
    truth = struct.unpack("<440Q", scalar.vmi.read_va(table, 0, 440 * 8)[0])
    assert tuple(ours) == truth


def test_an_undeclared_list_is_learned(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    """Mounted file systems: a chain of reads from ``super_blocks`` that nobody declared."""
    head = ids.vmi.translate_ksym2v("super_blocks")

    def types() -> list[str]:
        blocks = [link - ids.at("super_block s_list") for link in ids.ring(head)]
        kinds = [ids.pointer(block + ids.at("super_block s_type")) for block in blocks]
        return [ids.vmi.read_str_va(ids.pointer(kind + ids.at("file_system_type name")), 0) for kind in kinds]

    first = types()
    assert {"proc", "sysfs", "ext4", "tmpfs"} <= set(first)
    assert requests(guest, types) < 4 * len(first)
    assert types() == first


# ---- freshness -------------------------------------------------------------------------------------------------------


def test_a_process_started_between_two_listings_is_in_the_second(lab: LabVM, ids: Ids) -> None:
    for _ in range(3):
        before = ids.processes().keys()
        planted = lab.spawn("sleep", "infinity", count=1)
        after = ids.processes().keys()
        lab.kill(planted)
        gone = ids.processes().keys()
        assert not planted & before
        assert planted <= after
        assert not planted & gone


def test_looking_twice_at_the_head_is_one_walk(guest: AgentGuest, ids: Ids) -> None:
    """And one small request, once it is known how this script goes."""
    head = ids.vmi.translate_ksym2v("init_task") + ids.at("task_struct tasks")
    assert isinstance(guest.reader, ReadAhead)
    tasks = guest.reader.listings[head]

    def listing() -> None:
        ids.pointer(head)
        assert ids.processes()

    listing()
    walks = tasks.walks
    assert requests(guest, listing) == 2
    assert tasks.walks == walks + 1


def test_within_a_pause_all_is_of_one_hold(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    vmi = ids.vmi
    jiffies = vmi.translate_ksym2v("jiffies")
    vmi.pause_vm()
    try:
        first, time_first = ids.processes(), vmi.read_64_va(jiffies, 0)
        planted = lab.spawn("sleep", "infinity", count=2)
        vmi.pause_vm()  # holds nest
        assert ids.processes() == first
        vmi.resume_vm()
        assert ids.processes() == first
        assert vmi.read_64_va(jiffies, 0) == time_first
    finally:
        vmi.resume_vm()
    assert planted <= ids.processes().keys()
    assert vmi.read_64_va(jiffies, 0) > time_first
    lab.kill(planted)


def test_nothing_is_older_than_promised(lab: LabVM, agent: InstalledAgent, guest: AgentGuest, ids: Ids) -> None:
    """A field read again and again, and no head between: it changes at most ``STALE`` seconds late."""
    program = (
        "import time\nwhile True:\n    open('/proc/self/comm', 'w').write(f'{time.monotonic():.3f}'); time.sleep(0.02)"
    )
    planted = lab.spawn("python3", "-c", program)
    (pid,) = planted
    task = next(task for task in ids.tasks() if ids.pid(task) == pid)
    lab.wait_until(lambda: lab.read(f"/proc/{pid}/comm")[:1].isdigit(), "it names itself by the time")
    ids.processes()
    shown: dict[str, float] = {}
    deadline = time.monotonic() + 5
    while len(shown) < 4:
        assert time.monotonic() < deadline, f"only {shown} were seen within 5 s"
        shown.setdefault(ids.comm(task), time.monotonic())
    seen = list(shown.values())[1:]
    assert max(later - earlier for earlier, later in pairwise(seen)) < STALE + 0.5
    lab.kill(planted)


def test_a_listing_slower_than_the_promise_goes_on(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    """An IDS that thinks for a second in the middle: the rest of its listing is not read one by one."""
    ids.processes()
    tasks = ids.tasks()
    for _ in range(3):
        ids.pid(next(tasks))
    before = guest.link.requests
    deadline = time.monotonic() + 10
    while guest.words:
        assert time.monotonic() < deadline, "the snapshot is not forgotten"
    rest = [ids.pid(task) for task in tasks]
    assert len(rest) > 20
    assert guest.link.requests - before <= 4


def listed_by_a_child(ids: Ids) -> tuple[int, int]:
    """Fork; the child lists and says what it found. Its pid, and where to read that."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(theirs, "w") as pipe:
                json.dump(sorted(ids.processes()), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    return child, ours


def test_forked_children_and_their_parent_share_one_agent(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    """Each child has the parent's connected object, and its own connection to the agent."""
    planted = lab.spawn("sleep", "infinity", count=3)
    ids.processes()
    children = [listed_by_a_child(ids) for _ in range(4)]
    listed = [ids.processes().keys() for _ in range(5)]
    for child, pipe in children:
        with os.fdopen(pipe) as answer:
            listed.append(json.load(answer))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(planted <= set(pids) for pids in listed)
    lab.kill(planted)


def test_an_agent_restarted_in_the_middle_of_a_walk(
    lab: LabVM, agent: InstalledAgent, guest: AgentGuest, ids: Ids
) -> None:
    """Whole task_structs, more than one reply carries: the walk begins again with the new agent."""
    planted = lab.spawn("sleep", "infinity", count=120)
    size = guest.profile.size("task_struct")

    def copies() -> dict[int, bytes]:
        return {ids.pid(task): ids.vmi.read_va(task, 0, size)[0] for task in ids.tasks()}

    learned(guest, copies, 3)
    exchange = guest.link.exchange
    restarts: list[Any] = []

    def restarting(message: bytes) -> bytes:
        if message[0] == More.KIND and not restarts:
            restarts.append(lab.run("systemctl", "restart", "vmishim-agent"))
        return exchange(message)

    guest.remote._exchange = restarting
    handshakes = guest.link.handshakes
    try:
        assert planted <= copies().keys()
    finally:
        lab.kill(planted)
    assert restarts
    assert guest.link.handshakes == handshakes + 1


def test_several_objects_share_one_agent(agent: InstalledAgent) -> None:
    others = [Ids(Libvmi.over(agent.connect())) for _ in range(5)]
    assert len({frozenset(other.processes().keys() & set(range(1, 10))) for other in others}) == 1


def test_the_endpoint_is_this_machines_only(agent: InstalledAgent) -> None:
    host = agent.endpoint.removeprefix("tcp://").rpartition(":")[0]
    assert socket.gethostbyname(host).startswith("127.")
