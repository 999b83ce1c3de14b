"""What the agent of a guest may still do: nothing but answer, according to the guest's kernel and by trying."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from guest_agent.loader import PRIVILEGES
from lab.agent import AGENT, KEYS, InstalledAgent
from lab.vm import LabVM
from tests.guest.ids import Ids
from tests.guest.test_injection import EXAMPLE
from tests.local.test_sandbox import THREADS, Attempts, Status, assert_confined, parse
from vmishim.errors import LinkError
from vmishim.guests.agent import AgentGuest, connect
from vmishim.inject import InjectError, inject
from vmishim.libvmi import Libvmi
from vmishim.wire.keys import generate
from vmishim.wire.messages import Hello, Lookup, Members, Message, More, Names, Pointees, Read, Symbols, encode

INJECTION = "/etc/systemd/system/vmishim-agent.service.d/injection.conf"


def statuses(lab: LabVM) -> dict[str, Status]:
    """The agent's threads, by name, and the process beside it, the loader or the one that thaws: ``beside``."""
    processes = "/sys/fs/cgroup/system.slice/vmishim-agent.service/cgroup.procs"
    script = f"for pid in $(cat {processes}); do cat /proc/$pid/task/*/status; done"
    texts = lab.run("sh", "-c", script).stdout.decode().split("Name:\t")[1:]
    main = lab.run("systemctl", "show", "-P", "MainPID", "vmishim-agent").stdout.decode().strip()
    found = {}
    for name, fields in (parse(f"Name:\t{text}") for text in texts):
        found[name if fields["Tgid"] == main else "beside"] = fields
    assert len(found) == len(texts)
    return found


def user(lab: LabVM) -> str:
    """The user that systemd made for the service, by number."""
    return lab.run("stat", "-c", "%u", "/run/vmishim-agent").stdout.decode().strip()


def journal(lab: LabVM) -> str:
    return lab.run("journalctl", "-b", "-u", "vmishim-agent", "-o", "cat", "--no-pager").stdout.decode()


def test_every_thread_has_given_up_what_it_had(lab: LabVM, agent: InstalledAgent) -> None:
    threads = statuses(lab)
    assert threads.keys() == THREADS | {"python3", "beside"}
    for status in threads.values():
        assert_confined(status, user(lab))


class TestInTheGuest(Attempts):
    @pytest.fixture(scope="class")
    @classmethod
    def where(cls, lab: LabVM, agent: InstalledAgent) -> LabVM:
        return lab


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
