"""What a running agent may still do: nothing but answer, by the kernel's own word and by trying."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_agent.loader import PRIVILEGES
from lab.agent import AGENT, KEYS, InstalledAgent
from lab.vm import LabVM
from tests.local import attempts
from tests.guest.ids import Ids
from tests.guest.test_injection import EXAMPLE
from vmishim.errors import LinkError
from vmishim.guests import local
from vmishim.guests.agent import AgentGuest, connect
from vmishim.inject import InjectError, inject
from vmishim.libvmi import Libvmi
from vmishim.wire.keys import generate
from vmishim.wire.messages import Hello, Lookup, Members, Message, More, Names, Pointees, Read, Symbols, encode

ROOT = Path(__file__).parents[2]
SCRIPT = Path(attempts.__file__).read_text()
THREADS = {"ZMQbg/Reaper", "ZMQbg/IO/0"}
NONE = "0" * 16
INJECTION = "/etc/systemd/system/vmishim-agent.service.d/injection.conf"

Status = dict[str, str]


def parse(text: str) -> tuple[str, Status]:
    """Name and fields of a ``/proc/PID/status``."""
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return fields["Name"], fields


def statuses(lab: LabVM) -> dict[str, Status]:
    """Of the agent's threads, by name, and of the process beside it, the loader or the one that thaws: ``beside``."""
    processes = "/sys/fs/cgroup/system.slice/vmishim-agent.service/cgroup.procs"
    script = f"for pid in $(cat {processes}); do cat /proc/$pid/task/*/status; done"
    texts = lab.run("sh", "-c", script).stdout.decode().split("Name:\t")[1:]
    main = lab.run("systemctl", "show", "-P", "MainPID", "vmishim-agent").stdout.decode().strip()
    found = {}
    for name, fields in (parse(f"Name:\t{text}") for text in texts):
        found[name if fields["Tgid"] == main else "beside"] = fields
    assert len(found) == len(texts)
    return found


def assert_confined(status: Status, user: str, capabilities: str = NONE) -> None:
    assert (status["CapInh"], status["CapAmb"]) == (NONE, NONE)
    assert (status["CapPrm"], status["CapEff"]) == (capabilities, capabilities)
    assert status["Uid"].split() == status["Gid"].split() == [user] * 4
    assert user != "0"
    assert status["Groups"] == ""
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def user(lab: LabVM) -> str:
    """Whom systemd made for the service, by number."""
    return lab.run("stat", "-c", "%u", "/run/vmishim-agent").stdout.decode().strip()


def journal(lab: LabVM) -> str:
    return lab.run("journalctl", "-b", "-u", "vmishim-agent", "-o", "cat", "--no-pager").stdout.decode()


def test_every_thread_has_given_up_what_it_had(lab: LabVM, agent: InstalledAgent) -> None:
    threads = statuses(lab)
    assert threads.keys() == THREADS | {"python3", "beside"}
    for status in threads.values():
        assert_confined(status, user(lab))


def test_so_has_an_agent_of_this_machine() -> None:
    with local.agent():
        children = Path("/proc/thread-self/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children}
        (agent,) = (pid for pid, command in commands.items() if b"guest_agent" in command)
        threads = [parse(path.read_text()) for path in Path(f"/proc/{agent}/task").glob("*/status")]
        main = Path(f"/proc/{agent}/comm").read_text().strip()
    # The one more waits for the end of what started the agent.
    assert sorted(name for name, _ in threads) == sorted([*THREADS, main, main])
    for _, status in threads:
        assert_confined(status, status["Uid"].split()[0])


class Attempts:
    """Each attempt goes through, or fails in its own way, before the agent is confined; and is refused after."""

    def run(self, where: LabVM | None, *arguments: str) -> tuple[int, str, str]:
        """Status and output of the script, where the agent runs: in a guest, or here."""
        if where is not None:
            done = where.run("python3", "-c", SCRIPT, AGENT, *arguments, check=False)
            return done.returncode, done.stdout.decode(), done.stderr.decode()
        here = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return here.returncode, here.stdout, here.stderr

    def test_all_are_refused_and_requests_answered(self, where: LabVM | None) -> None:
        status, output, log = self.run(where)
        assert status == 0, log
        report = json.loads(output)
        assert errno.EPERM not in report["before"].values(), report["before"]
        assert report["after"] == dict.fromkeys(report["before"], errno.EPERM)
        assert report["answers after"] == report["answers before"]
        for kind in ("Read", "Walk"):
            assert b"swapper/0" in bytes.fromhex(report["answers after"][kind])
        assert re.search(r'Traceback .*\n  File ".*", line \d+, in main\n(.*\n)*ZeroDivisionError: as planned', log)

    @pytest.mark.parametrize("attempt", attempts.FATAL)
    def test_the_worst_end_the_process(self, where: LabVM | None, attempt: str) -> None:
        status, output, log = self.run(where, attempt)
        # A shell between would say 128 + signal; there is none.
        assert (abs(status) & 127, output) == (signal.SIGSYS, ""), log


class TestInTheGuest(Attempts):
    @pytest.fixture
    def where(self, lab: LabVM, agent: InstalledAgent) -> LabVM:
        return lab


class TestHere(Attempts):
    @pytest.fixture
    def where(self) -> None:
        if os.geteuid():
            pytest.skip("loading eBPF programs on this machine takes root")


def requests(guest: AgentGuest) -> Iterator[Message | bytes]:
    """Every kind of request, good ones and such as are refused."""
    banner = guest.profile.symbol("linux_banner")
    yield Hello("soak", ["init_task"], ["task_struct comm"])
    yield Symbols(["init_task", "no_such"])
    yield Names([banner, 1])
    yield Members(["task_struct comm", "no_such"])
    yield Pointees(["task_struct 0"])
    yield Read(0, banner, 4096)
    yield Read(0, 8, 8)
    yield Read(1, 1 << 20, 4096)
    yield Read(0, banner, 1 << 40)
    yield Lookup(0x1000, banner)
    yield More(4711)
    yield b""
    yield b"\xff" * 100


def test_a_soak_of_every_kind(lab: LabVM, agent: InstalledAgent) -> None:
    """Fifty of each over two sessions, and the agent is still the same process, without a traceback."""
    before, said = statuses(lab), len(journal(lab))
    for _ in range(2):
        guest = agent.connect()
        for _ in range(25):
            for request in requests(guest):
                guest.link.exchange(request if isinstance(request, bytes) else encode(request))
        assert Ids(Libvmi.over(guest)).processes()
        guest.close()
    assert {name: status["Pid"] for name, status in statuses(lab).items()} == {
        name: status["Pid"] for name, status in before.items()
    }
    assert "Traceback" not in journal(lab)[said:]


def test_a_key_struck_out_of_the_file_is_out(lab: LabVM, agent: InstalledAgent) -> None:
    """Written into the same file, which the agent holds: it goes on as the process it was."""
    before = statuses(lab)["python3"]["Pid"]
    mine, other = generate(), agent.connect()
    lab.run("sh", "-c", f"echo '{mine.public.text}' >>{KEYS}/permitted")
    guest = connect(agent.domain(), private=mine)
    lab.run("sh", "-c", f"echo '{agent.private.public.text}' >{KEYS}/permitted")
    with pytest.raises(LinkError, match="not permitted"):
        guest.remote.symbols(["init_task"])
    assert other.remote.symbols(["no_such"]) == [None]
    assert statuses(lab)["python3"]["Pid"] == before


def test_a_list_that_takes_the_place_of_the_old_one_counts(lab: LabVM, agent: InstalledAgent) -> None:
    """As editors save it. The agent may open no file, so it ends, and the next one reads it."""
    before = statuses(lab)["python3"]["Pid"]
    mine, other = generate(), agent.connect()
    lab.run("sh", "-c", f"echo '{mine.public.text}' >>{KEYS}/permitted")
    guest = connect(agent.domain(), private=mine)
    lab.write(f"{KEYS}/permitted", f"{agent.private.public.text}\n".encode())
    with pytest.raises(LinkError, match="not permitted"):
        guest.remote.symbols(["init_task"])
    assert other.remote.symbols(["no_such"]) == [None]
    assert statuses(lab)["python3"]["Pid"] != before
    assert f"{KEYS}/permitted was replaced" in journal(lab)


def test_who_loads_programs_holds_nothing_else(lab: LabVM, agent: InstalledAgent) -> None:
    """The loader's privileges; and that its death ends injection, not the agent."""
    lab.write(
        INJECTION, f"[Service]\nExecStart=\nExecStart=!/usr/bin/python3 {AGENT} serve --allow-injection\n".encode()
    )
    lab.run("sh", "-c", "systemctl daemon-reload && systemctl restart vmishim-agent")
    try:
        threads = statuses(lab)
        assert threads.keys() == THREADS | {"python3", "beside"}
        for name, status in threads.items():
            kept = sum(1 << number for number in PRIVILEGES) if name == "beside" else 0
            assert_confined(status, user(lab), f"{kept:016x}")
        guest = agent.connect()
        with inject(guest, EXAMPLE):
            files = lab.run("ls", "-l", f"/proc/{threads['beside']['Pid']}/fd").stdout.decode().splitlines()[1:]
            kinds = {re.sub(r":.*", "", line.rpartition("-> ")[2]) for line in files}
            assert kinds == {"/dev/null", "socket", "/memfd"}  # the last is libffi's, for callbacks
            lab.run("kill", "-KILL", threads["beside"]["Pid"])
            with pytest.raises(InjectError, match="process that loads programs has ended"):
                inject(guest, EXAMPLE)
        assert Ids(Libvmi.over(guest)).processes()
        guest.close()
    finally:
        lab.run("sh", "-c", f"rm {INJECTION}; systemctl daemon-reload && systemctl restart vmishim-agent")
