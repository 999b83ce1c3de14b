"""The lab VM itself: what it plants is there, what it ends is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.launch import LabError
from lab.vm import CONTAINER_CGROUP, CommandError, LabVM
from tests.until import until


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    with LabVM.boot(request.param) as booted:
        yield booted


AT_ONCE = lambda vm, deadline: None  # noqa: E731
"""In place of ``LabVM._await_ready``: how a VM ends does not depend on how far it has booted."""


def is_running(pid: int) -> bool:
    """Whether a process of the host runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def await_end(pid: int) -> None:
    until(lambda: not is_running(pid), what=f"the end of process {pid}")


def test_boots_the_kernel_asked_for(vm: LabVM) -> None:
    release = vm.run("uname", "-r").stdout.decode().strip()
    assert release == vm.image.release
    assert release.startswith(f"{vm.image.kernel.name}.")


def test_nothing_failed_in_the_guest(vm: LabVM) -> None:
    assert vm.run("systemctl", "list-units", "--failed", "--no-legend", "--plain").stdout == b""


def test_a_listing_does_not_list_itself(vm: LabVM) -> None:
    assert not {"grep", "sh"} & set(vm.processes().values())


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_planted_processes_are_those_in_proc(vm: LabVM, count: int) -> None:
    before = vm.processes()
    planted = vm.spawn("sleep", "infinity", count=count)
    after = vm.processes()
    assert len(planted) == count
    assert {pid for pid, comm in after.items() if comm == "sleep"} - before.keys() == planted
    vm.kill(planted)
    assert not planted & vm.processes().keys()


def test_planted_processes_belong_to_the_container(vm: LabVM) -> None:
    (pid,) = vm.spawn("sleep", "infinity", comm="pretender")
    assert vm.processes()[pid] == "pretender"
    assert vm.read(f"{CONTAINER_CGROUP}/cgroup.procs").split().count(b"%d" % pid) == 1
    init = next(pid for pid, comm in vm.processes().items() if comm == "catatonit")
    status = vm.read(f"/proc/{pid}/status")
    assert b"\nPPid:\t%d\n" % init in status
    vm.kill({pid})


def test_the_container_sees_only_its_own(vm: LabVM) -> None:
    inside = vm.container("ps", "-e", "-o", "comm=").stdout.split()
    assert sorted(inside) == [b"catatonit", b"ps"]
    assert vm.container("hostname").stdout == b"monitored\n"
    links = vm.container("ip", "-oneline", "link").stdout.decode().splitlines()
    assert len(links) == 1
    assert "LOOPBACK,UP" in links[0]
    init = next(pid for pid, comm in vm.processes().items() if comm == "catatonit")
    for space in ("pid", "mnt", "net", "ipc", "uts", "cgroup"):
        theirs = vm.run("readlink", f"/proc/{init}/ns/{space}").stdout
        assert theirs != vm.run("readlink", f"/proc/1/ns/{space}").stdout, space


def test_the_containers_cgroup_can_be_frozen(vm: LabVM) -> None:
    def frozen() -> bool:
        return b"frozen 1" in vm.read(f"{CONTAINER_CGROUP}/cgroup.events")

    vm.run("sh", "-c", f"echo 1 >{CONTAINER_CGROUP}/cgroup.freeze")
    vm.wait_until(frozen, "the container to freeze")
    assert vm.run("echo", "the rest runs on").stdout
    vm.run("sh", "-c", f"echo 0 >{CONTAINER_CGROUP}/cgroup.freeze")
    vm.wait_until(lambda: not frozen(), "the container to thaw")


def test_commands_return_what_they_wrote(vm: LabVM) -> None:
    done = vm.run("sh", "-c", "cat; echo bad >&2; exit 3", input=b"in\0put", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\0put", b"bad\n")
    with pytest.raises(CommandError, match="status 3: bad"):
        vm.run("sh", "-c", "echo bad >&2; exit 3")


def test_a_command_that_is_late_is_killed(vm: LabVM) -> None:
    with pytest.raises(LabError, match=r"not done after 0\.5 s"):
        vm.run("sleep", "1234", timeout=0.5)
    vm.wait_until(lambda: vm.run("pgrep", "-f", "sleep 1234", check=False).returncode == 1, "the sleeper to go")


def test_files_come_back_as_written(vm: LabVM) -> None:
    data = os.urandom(3_000_000)
    vm.write("/opt/new folder/file", data, 0o750)
    assert vm.read("/opt/new folder/file") == data
    assert vm.run("stat", "-c", "%a", "/opt/new folder/file").stdout == b"750\n"
    with pytest.raises(LabError, match="/no/such/file"):
        vm.read("/no/such/file")


def test_kallsyms_has_addresses(vm: LabVM) -> None:
    (line,) = [line for line in vm.kallsyms().splitlines() if line.endswith(b" init_task")]
    assert int(line.split()[0], 16) > 1 << 63


def test_the_agents_needs_are_there(vm: LabVM) -> None:
    script = "import ctypes, zmq, cryptography; ctypes.CDLL('libbpf.so.1')"
    assert vm.run("python3", "-c", script).stderr == b""
    assert vm.run("test", "-r", "/sys/kernel/btf/vmlinux").returncode == 0


def test_the_endpoint_leads_into_the_guest(vm: LabVM) -> None:
    answer = "import socket; s = socket.create_server(('', 5555)); s.accept()[0].sendall(b'hello')"
    vm.run("systemd-run", "--unit=answer", "python3", "-c", answer)
    vm.wait_until(lambda: b":5555" in vm.run("ss", "-Hltn").stdout, "the listener")
    with socket.create_connection(("127.0.0.1", vm.port), timeout=10) as connection:
        assert connection.recv(5) == b"hello"


def test_pause_stops_the_clock(vm: LabVM) -> None:
    vm.pause()
    assert vm.monitor("query-status")["running"] is False
    vm.resume()
    assert vm.run("true").returncode == 0


def test_memory_is_a_file(vm: LabVM) -> None:
    assert vm.ram.stat().st_size == 1024 << 20


def test_nothing_remains_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabVM, "_await_ready", AT_ONCE)
    with LabVM.boot() as vm:
        pid, folder = vm.pid, vm.folder
        assert is_running(pid)
        assert folder.exists()
    assert not is_running(pid)
    assert not folder.exists()


def test_a_boot_that_fails_says_why() -> None:
    begun = time.monotonic()
    with pytest.raises(LabError, match=r"(?s)ended while booting.*/nonexistent"):
        LabVM.boot(append="init=/nonexistent")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_vm_dies_with_its_owner(deadly: signal.Signals) -> None:
    script = (
        "import sys, time\n"
        "from lab.vm import LabVM\n"
        "LabVM._await_ready = lambda vm, deadline: None\n"
        "with LabVM.boot() as vm:\n"
        "    print(vm.pid, vm.folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    assert is_running(int(pid))
    assert Path(folder).exists()
    owner.send_signal(deadly)
    owner.wait(timeout=30)
    await_end(int(pid))
    until(lambda: not Path(folder).exists(), what=f"the removal of {folder}")
