"""The monitored container's root can't see, signal, read or reach the agent. Each try is made outside as well, where it
succeeds: so a try that fails inside does so because of where it is made, and by the error that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.agent import InstalledAgent
from lab.vm import CONTAINER_CGROUP, GUEST_PORT, HOST_ADDRESS, LabVM
from tests.guest.ids import Ids

INTRUDER = Path(__file__).with_name("intruder.py")
OUTCOMES = {
    # Its own pid namespace: however the process is named, there is no such one.
    "list_processes": "ESRCH",
    "signal_by_pid": "ESRCH",
    "signal_by_pidfd": "ESRCH",
    "signal_by_proc": "ENOENT",
    "read_its_memory": "ENOENT",
    "read_its_root": "ENOENT",
    "read_its_environment": "ENOENT",
    "read_its_descriptors": "ENOENT",
    "trace_it": "ESRCH",
    "enter_the_namespaces_of_the_agent": "ESRCH",
    "enter_the_namespaces_of_the_first_process": "EPERM",  # that is the container's own; and no CAP_SYS_ADMIN
    # Its own mount namespace: there are no such files.
    "read_its_key": "ENOENT",
    "read_whom_it_permits": "ENOENT",
    "permit_somebody": "ENOENT",
    "read_its_program": "ENOENT",
    "connect_by_path": "ENOENT",
    "find_pinned_programs": "ENOENT",
    "read_physical_memory": "ENOENT",
    # Abstract names belong to a network namespace.
    "connect_by_abstract_name": "ECONNREFUSED",
    # Something else is mounted over these.
    "read_kernel_memory": "ENODATA",
    "read_kernel_symbols": "ENODATA",
    # No CAP_MKNOD, CAP_BPF, CAP_SYS_MODULE, CAP_SYS_ADMIN.
    "make_physical_memory": "EPERM",
    "make_the_disk": "EPERM",
    "load_a_program": "EPERM",
    "find_the_agents_programs": "EPERM",
    "load_a_module": "EPERM",
    "mount_a_file_system": "EPERM",
    # A user namespace gives capabilities, but no proc that shows more than the one there is.
    "mount_proc_in_a_user_namespace": "EPERM",
    # Its cgroup is mounted read-only.
    "thaw_by_itself": "EROFS",
    "leave_the_cgroup": "EROFS",
}
ADDRESSES = {"eth0": "10.0.2.15", "veth": "10.99.0.1", "loopback": "127.0.0.1"}
CONTAINERS_ADDRESS = "10.99.0.2"
PLANTED = """\
import os, signal, socket
servers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
for server, name in zip(servers, ("\\0vmishim-planted", "/run/vmishim-planted")):
    server.bind(name)
    server.listen(8)
os.write(1, b"listening\\n")
signal.pause()
"""


@pytest.fixture(scope="module")
def network(lab: LabVM, agent: InstalledAgent) -> Iterator[None]:
    """A network path from the container to the guest and beyond, as container runtimes build it; and the agent's unit
    with the addresses it listens to, as in docs/deploy.md."""
    init = lab.run("cat", f"{CONTAINER_CGROUP}/cgroup.procs").stdout.split()[0].decode()
    lab.run("ip", "link", "add", "veth-monitored", "type", "veth", "peer", "name", "eth0", "netns", init)
    lab.run("ip", "addr", "add", f"{ADDRESSES['veth']}/24", "dev", "veth-monitored")
    lab.run("ip", "link", "set", "veth-monitored", "up")
    for words in (
        f"addr add {CONTAINERS_ADDRESS}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {ADDRESSES['veth']}",
    ):
        lab.run("nsenter", "--net", "--target", init, "ip", *words.split())
    yield
    lab.run("ip", "link", "del", "veth-monitored")


def filtered(lab: LabVM, *properties: str) -> None:
    lab.run("systemctl", "set-property", "--runtime", "vmishim-agent", *properties)


@pytest.fixture(scope="module")
def whom_it_listens_to(lab: LabVM, network: None) -> Iterator[None]:
    allowed = ("localhost", f"{HOST_ADDRESS}/24", ADDRESSES["veth"])
    filtered(lab, "IPAddressDeny=any", *(f"IPAddressAllow={address}" for address in allowed))
    yield
    filtered(lab, "IPAddressDeny=", "IPAddressAllow=")


@pytest.fixture(scope="module")
def targets(lab: LabVM, agent: InstalledAgent) -> Iterator[dict[str, Any]]:
    """What the tries are against, beside the agent's files: planted where they have to be."""
    lab.run("mkdir", "/sys/fs/bpf/planted")
    lab.run("systemd-run", "--unit=planted-listener", "python3", "-IS", "-c", PLANTED)
    lab.wait_until(
        lambda: b"listening" in lab.run("journalctl", "-u", "planted-listener", "-o", "cat").stdout, "the listener"
    )
    (module,) = lab.run("find", f"/usr/lib/modules/{lab.image.release}", "-name", "dummy.ko*").stdout.decode().split()
    yield {
        "pid": int(lab.run("systemctl", "show", "vmishim-agent", "-p", "MainPID", "--value").stdout),
        "disk": [int(number) for number in lab.read("/sys/block/vda/dev").split(b":")],
        "module": module,
        "pin": "planted",
        "abstract": "vmishim-planted",
        "path": "/run/vmishim-planted",
        "port": GUEST_PORT,
        "addresses": [*ADDRESSES.values()],
    }
    lab.run("systemctl", "stop", "planted-listener")
    lab.run("rmdir", "/sys/fs/bpf/planted")
    lab.run("rmmod", "dummy")


def tried(lab: LabVM, targets: dict[str, Any], inside: bool) -> dict[str, Any]:
    cgroup = "/sys/fs/cgroup" if inside else CONTAINER_CGROUP
    run = lab.container if inside else lab.run
    done = run("python3", "-IS", "-", json.dumps(targets | {"cgroup": cgroup}), input=INTRUDER.read_bytes())
    outcomes: dict[str, Any] = json.loads(done.stdout)
    return outcomes


@pytest.fixture(scope="module")
def inside(lab: LabVM, targets: dict[str, Any], whom_it_listens_to: None) -> dict[str, Any]:
    """What each try in the container came to."""
    return tried(lab, targets, inside=True)


@pytest.fixture(scope="module")
def outside(lab: LabVM, targets: dict[str, Any], whom_it_listens_to: None) -> dict[str, Any]:
    """What each try outside came to."""
    return tried(lab, targets, inside=False)


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_containers_root_can_not(inside: dict[str, Any], outside: dict[str, Any], name: str) -> None:
    assert (inside[name], outside[name]) == (OUTCOMES[name], "done")


def test_no_try_is_left_out(inside: dict[str, Any]) -> None:
    assert inside.keys() - {"connect"} == OUTCOMES.keys()


@pytest.mark.parametrize(
    ("at", "outcome"), [("eth0", "no answer"), ("veth", "no answer"), ("loopback", "ECONNREFUSED")]
)
def test_the_containers_root_can_not_connect(
    inside: dict[str, Any], outside: dict[str, Any], at: str, outcome: str
) -> None:
    """The container can reach these addresses, and has its own loopback."""
    assert (inside["connect"][ADDRESSES[at]], outside["connect"][ADDRESSES[at]]) == (outcome, "done")


def test_it_is_the_units_filter_that_keeps_the_container_off(
    lab: LabVM, targets: dict[str, Any], inside: dict[str, Any]
) -> None:
    """Without it the agent's port is open to everything that can reach it."""
    filtered(lab, "IPAddressDeny=", "IPAddressAllow=")
    try:
        found = tried(lab, targets, inside=True)["connect"]
    finally:
        filtered(lab, "IPAddressDeny=any", f"IPAddressAllow={HOST_ADDRESS}")
    assert found == {ADDRESSES["eth0"]: "done", ADDRESSES["veth"]: "done", ADDRESSES["loopback"]: "ECONNREFUSED"}


def test_the_ids_is_answered_all_the_same(inside: dict[str, Any], ids: Ids) -> None:
    assert 1 in ids.processes()
