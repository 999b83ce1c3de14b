"""TCP sockets of a booted guest, held to its ``/proc/net/tcp`` and ``tcp6`` in every network namespace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from lab.agent import InstalledAgent
from lab.vm import LabVM
from vmishim import cli
from vmishim.guests.ramfile import RamFile
from vmishim.inspection import lists, objects
from vmishim.inspection.objects import Socket
from vmishim.libvmi import Libvmi, pause
from vmishim.wire.keys import save_private

THREAD_GROUP = Path(__file__).parents[1] / "ground" / "thread_group.py"
FAR = 2_000_000
"""A descriptor's number, above what the kernel permits by default."""
REQUESTS_MAX = 16
"""Requests of a look that was learned: one for each table, ring and array."""
# What ``/proc/net/tcp`` says about a socket: version, both ends, state, uid (or none), inode.
Line = tuple[int, str, int, str, int, str, int | None, int | None]

PLANTED = """\
import fcntl, os, socket, struct, time

def up():
    # A namespace of one's own begins with its loopback down (netdevice(7): SIOCSIFFLAGS, IFF_UP).
    with socket.socket() as any:
        fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 1))

def listen(family, address, *options):
    made = socket.socket(family)
    for level, name, value in options:
        made.setsockopt(level, name, value)
    made.bind((address, 0))
    made.listen()
    return made

def connect(to, family=socket.AF_INET, address="127.0.0.1"):
    made = socket.socket(family)
    made.connect((address, to.getsockname()[1]))
    return made

if os.environ.get("OWN"):
    up()
four = listen(socket.AF_INET, "127.0.0.1")
six = listen(socket.AF_INET6, "::")
# A connection on which nothing is sent stays a request.
later = listen(socket.AF_INET, "127.0.0.1", (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60))
kept = [(connect(four), four.accept()) for _ in range(3)]
kept += [(connect(six, socket.AF_INET6, "::1"), six.accept()), (connect(six), six.accept())]
kept += [connect(later) for _ in range(2)]
left = [(connect(four), four.accept()[0]) for _ in range(2)]
for near, far in left:
    near.close()
half, other = connect(four), four.accept()[0]
far.close()
half.shutdown(socket.SHUT_WR)
open(os.environ["READY"], "w").close()
time.sleep(1000)
"""


def proc(lab: LabVM, path: str) -> set[Line]:
    """The lines of ``net/tcp`` and ``net/tcp6`` below a folder of ``/proc``."""
    found: set[Line] = set()
    for version, name in ((4, "tcp"), (6, "tcp6")):
        for line in lab.read(f"{path}/net/{name}").decode().splitlines()[1:]:
            words = line.split()
            (local, local_port), (remote, remote_port) = (_end(words[place], version) for place in (1, 2))
            state = objects.TCP_STATES[int(words[3], 16)]
            inode = int(words[9])
            found.add((version, local, local_port, remote, remote_port, state, int(words[7]), inode))
    return found


def _end(words: str, version: int) -> tuple[str, int]:
    address, _, port = words.partition(":")
    # Written as words of the machine's own order, little-endian.
    data = b"".join(int(address[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(address), 8))
    if version == 4:
        return str(IPv4Address(data)), int(port, 16)
    six = IPv6Address(data)
    return f"::ffff:{six.ipv4_mapped}" if six.ipv4_mapped else str(six), int(port, 16)


def line(found: Socket) -> Line:
    ends = found.local, found.local_port, found.remote, found.remote_port
    return (found.version, *ends, found.state, found.uid, found.inode)


def whole(told: set[Line]) -> set[Line]:
    """Without the owners of closed sockets, which kernels before 6.17 don't name."""
    return {each if each[7] else (*each[:6], 0, 0) for each in told}


@pytest.fixture
def planted(lab: LabVM) -> Iterator[dict[int, int]]:
    """Sockets of every kind, in the first network namespace and in two others, one of them with a table of its own:
    pid -> number of its namespace."""
    found = {}
    pids = []
    try:
        for number, (wrap, table) in enumerate((("env", "0"), ("unshare -n", "0"), ("unshare -n", "256"))):
            ready = f"/run/planted-{number}"
            lab.write("/run/planted.py", PLANTED.encode())
            lab.run("sysctl", "-qw", f"net.ipv4.tcp_child_ehash_entries={table}")
            settings = f"READY={ready} OWN={number or ''}"
            script = f"rm -f {ready}; {settings} {wrap} python3 /run/planted.py >/dev/null 2>&1 & echo $!"
            pid = int(lab.run("sh", "-c", script).stdout)
            pids.append(pid)
            lab.wait_until(lambda ready=ready: not lab.run("test", "-e", ready, check=False).returncode, "sockets")  # type: ignore[misc]
            told = lab.run("readlink", f"/proc/{pid}/ns/net").stdout.decode()
            found[pid] = int(told.strip().removeprefix("net:[").removesuffix("]"))
        yield found
    finally:
        lab.kill(pids)
        lab.run("sysctl", "-qw", "net.ipv4.tcp_child_ehash_entries=0")


def exact(lab: LabVM, planted: dict[int, int], listed: Callable[[], list[Socket]]) -> list[Socket]:
    """What ``listed`` gives, which is what ``/proc`` has before and after that."""
    found: list[Socket] = []

    def told() -> set[tuple[int, Line]]:
        return {(space, each) for pid, space in planted.items() for each in whole(proc(lab, f"/proc/{pid}"))}

    def same() -> bool:
        before = told()
        found[:] = listed()
        return before == told()

    lab.wait_until(same, "sockets to stand still")
    assert {(each.namespace, next(iter(whole({line(each)})))) for each in found} == told()
    return found


@pytest.mark.parametrize("strategy", ["batch", "page"])
def test_sockets_are_those_of_proc(lab: LabVM, agent: InstalledAgent, planted: dict[int, int], strategy: str) -> None:
    assert len(set(planted.values())) == 3
    with Libvmi.over(agent.connect(strategy=strategy)) as vmi:  # type: ignore[arg-type]

        def listed() -> list[Socket]:
            with pause(vmi):
                return list(objects.sockets(vmi))

        for _ in range(3 if strategy == "batch" else 1):  # also by what was learned
            found = exact(lab, planted, listed)
    for pid, space in planted.items():
        own = [each for each in found if each.pid == pid]
        assert {each.namespace for each in own} == {space}
        assert {each.comm for each in own} == {"python3"}
        assert [each.state for each in own if each.state != "established"].count("listen") == 3
        here = [each for each in found if each.namespace == space]
        states = [each.state for each in here]
        # The client's end of a request is established; its server's end is the request.
        assert states.count("syn-recv") == 2
        assert states.count("fin-wait-2") == 2
        assert states.count("close-wait") == 2
        assert "time-wait" in states
        assert {each.pid for each in here if each.state in ("syn-recv", "time-wait")} == {0}
        assert {each.version for each in own} == {4, 6}
        assert any(each.remote == "::ffff:127.0.0.1" for each in own)


def test_a_ram_file_has_the_same_sockets(lab: LabVM, agent: InstalledAgent, planted: dict[int, int]) -> None:
    with Libvmi.over(RamFile("lab", lab.ram)) as vmi:
        exact(lab, planted, lambda: list(objects.sockets(vmi)))


@pytest.fixture
def escaped(lab: LabVM) -> Iterator[tuple[int, set[int]]]:
    """A process whose main thread has exited, with a descriptor far above all others; its pid, and its ports."""
    before = lab.run("sysctl", "-n", "fs.nr_open").stdout.decode().strip()
    lab.run("sysctl", "-qw", f"fs.nr_open={FAR + 64}")
    lab.write("/run/thread_group.py", THREAD_GROUP.read_bytes())
    program = f"python3 /run/thread_group.py {FAR} >/run/thread_group.json 2>&1"
    script = f"tail -f /dev/null 2>/dev/null | {program} & echo $!"
    pid = int(lab.run("sh", "-c", script).stdout)
    try:
        lab.wait_until(lambda: b"State:\tZ" in lab.run("cat", f"/proc/{pid}/status").stdout, "its main thread to exit")
        yield pid, set(json.loads(lab.read("/run/thread_group.json")).values())
    finally:
        lab.kill([pid])
        lab.run("sysctl", "-qw", f"fs.nr_open={before}")


def owners(vmi: Libvmi, ports: set[int]) -> dict[int, int | None]:
    """The owner of each listener on these ports."""
    found, damage = lists.whole(vmi, objects.sockets)
    assert damage == []
    return {each.local_port: each.pid for each in found if each.local_port in ports and each.state == "listen"}


def test_no_thread_and_no_descriptor_is_too_far_for_an_owner(
    lab: LabVM, agent: InstalledAgent, escaped: tuple[int, set[int]]
) -> None:
    pid, ports = escaped
    with closing(agent.connect()) as guest:
        vmi = Libvmi.over(guest)
        for _ in range(6):
            asked = guest.link.requests
            assert owners(vmi, ports) == dict.fromkeys(ports, pid)
        assert guest.link.requests - asked <= REQUESTS_MAX
    lab.pause()
    try:
        with Libvmi.over(RamFile("lab", lab.ram)) as vmi:
            assert owners(vmi, ports) == dict.fromkeys(ports, pid)
    finally:
        lab.resume()


def test_the_command_lists_them(
    lab: LabVM,
    agent: InstalledAgent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    save_private(tmp_path / "key", agent.private)
    assert cli.main(["enroll", "lab", agent.endpoint, agent.public.text, "--key", str(tmp_path / "key")]) == 0
    pid = int(lab.run("systemctl", "show", "-P", "MainPID", "vmishim-agent").stdout)
    capsys.readouterr()
    assert cli.main(["ss", "lab", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (listener,) = [each for each in found if each["state"] == "listen" and each["pid"] == pid]
    assert (listener["local_port"], listener["remote_port"]) == (5555, 0)
    assert cli.main(["ss", "lab"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["STATE", "LOCAL", "REMOTE", "UID", "INODE", "NETNS", "OWNER"]
    assert any(row.startswith("listen ") and row.rstrip().endswith(f"({pid})") for row in rows)
