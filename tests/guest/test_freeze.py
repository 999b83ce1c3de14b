"""A pause that stops the monitored container: it stands still while the agent answers, and never for too long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from lab.agent import AGENT, InstalledAgent
from lab.vm import CONTAINER_CGROUP, CONTAINERS_SLICE, LabVM
from tests.guest.ids import Ids
from vmishim.errors import LinkError
from vmishim.guests.agent import AgentGuest, Strategy
from vmishim.libvmi import Libvmi, pause
from vmishim.wire.keys import save_private

LONG = 30.0
"""Seconds of silence that a holder may keep, where a test is not about their end."""
SHORT = 2.0
COUNT = """\
import os, time
count, file = 0, os.open("/tmp/count", os.O_WRONLY | os.O_CREAT)
while True:
    count += 1
    os.pwrite(file, b"%012d" % count, 0)
    time.sleep(0.002)
"""


PLANTED = "/sys/fs/cgroup/planted"
FREEZING = f"""\
import os, sys
sys.path.insert(0, {AGENT!r})
from pathlib import Path
from guest_agent.freezer import Freezer, FreezeError
cgroup, session = Path({PLANTED!r}), bytes(8)
cgroup.mkdir()
freezer = Freezer(cgroup)
freezer.freeze(session, 60_000)
print((cgroup / "cgroup.events").read_text().splitlines()[-1], flush=True)
"""


class Counter:
    """A process of the container that counts up."""

    def __init__(self, lab: LabVM) -> None:
        self.lab = lab
        (self.pid,) = lab.spawn("python3", "-IS", "-c", COUNT, comm="counter")
        counts = f"/proc/{self.pid}/root/tmp/count"
        lab.wait_until(lambda: lab.run("test", "-s", counts, check=False).returncode == 0, "the counter to begin")
        self.goes_on()

    def count(self) -> int:
        return int(self.lab.read(f"/proc/{self.pid}/root/tmp/count") or b"0")

    def goes_on(self) -> None:
        """Wait until it has counted on, which it does not while it is frozen."""
        before = self.count()
        self.lab.wait_until(lambda: self.count() > before, "the counter to go on")

    def stands_still(self) -> bool:
        """Whether it has not counted while another process, outside, did as much as it does in ten counts."""
        before = self.count()
        self.lab.run("python3", "-IS", "-c", "import time\nfor _ in range(10): time.sleep(0.002)")
        return self.count() == before


@pytest.fixture(scope="module")
def counter(lab: LabVM) -> Iterator[Counter]:
    planted = Counter(lab)
    yield planted
    lab.kill({planted.pid})


def connect(agent: InstalledAgent, freeze: float = LONG, strategy: Strategy = "batch") -> AgentGuest:
    return agent.connect(strategy=strategy, freeze=freeze)


@pytest.fixture
def guest(agent: InstalledAgent) -> Iterator[AgentGuest]:
    target = connect(agent)
    yield target
    target.close()


def frozen(lab: LabVM) -> bool:
    return b"frozen 1" in lab.read(f"{CONTAINERS_SLICE}/cgroup.events").splitlines()


def thaws(lab: LabVM, why: str) -> None:
    lab.wait_until(lambda: not frozen(lab), f"the container to thaw: {why}", 60)


def main_pid(lab: LabVM) -> int:
    return int(lab.run("systemctl", "show", "vmishim-agent", "-p", "MainPID", "--value").stdout)


def warden(lab: LabVM) -> int:
    (pid,) = lab.run("pgrep", "-P", str(main_pid(lab))).stdout.split()
    return int(pid)


def is_back(agent: InstalledAgent) -> None:
    """Wait until there is an agent, by asking it: each look at systemd's state would delay its start."""
    agent.connect(timeout=120).close()


@pytest.mark.parametrize("strategy", ["batch", "scalar"])
def test_it_stands_still_while_the_agent_answers(
    lab: LabVM, agent: InstalledAgent, counter: Counter, strategy: Strategy
) -> None:
    ids = Ids(Libvmi.over(connect(agent, strategy=strategy)))
    assert not counter.stands_still()
    with pause(ids.vmi):
        assert frozen(lab)
        assert counter.stands_still()
        listed = ids.processes()
        monitored = {int(pid) for pid in lab.read(f"{CONTAINER_CGROUP}/cgroup.procs").split()}
        assert counter.pid in monitored <= listed.keys()
        assert listed[counter.pid] == "counter"
        assert counter.stands_still()
    thaws(lab, "the pause is over")
    counter.goes_on()


def test_pauses_nest(lab: LabVM, guest: AgentGuest) -> None:
    vmi = Libvmi.over(guest)
    vmi.pause_vm()
    vmi.pause_vm()
    vmi.resume_vm()
    assert frozen(lab)
    vmi.resume_vm()
    thaws(lab, "each pause was resumed")


def test_it_stands_still_as_long_as_one_of_two_pauses(lab: LabVM, agent: InstalledAgent, guest: AgentGuest) -> None:
    one, other = Libvmi.over(guest), Libvmi.over(connect(agent))
    one.pause_vm()
    other.pause_vm()
    one.resume_vm()
    assert frozen(lab)
    other.resume_vm()
    thaws(lab, "both have resumed")
    other.destroy()


def test_the_end_of_a_connection_thaws(lab: LabVM, agent: InstalledAgent) -> None:
    guest = connect(agent)
    guest.hold()
    assert frozen(lab)
    guest.close()
    thaws(lab, "the connection was closed")


def test_a_killed_ids_leaves_nothing_frozen(
    lab: LabVM, agent: InstalledAgent, counter: Counter, tmp_path: Path
) -> None:
    save_private(tmp_path / "key", agent.private)
    (tmp_path / "domains.toml").write_text(
        f'[lab]\nagent = "{agent.endpoint}"\nagent_key = "{agent.public.text}"\n'
        f'key = "{tmp_path}/key"\ntimeout = 30\nfreeze = {SHORT}\n'
    )
    script = (
        "from vmishim import Libvmi\n"
        "import sys\n"
        "vmi = Libvmi('lab')\n"
        "vmi.pause_vm()\n"
        "print('paused', flush=True)\n"
        "while True: vmi.v2pcache_flush(), vmi.read_addr_ksym('init_task')\n"
    )
    environment = {"VMISHIM_CONFIG": str(tmp_path / "domains.toml"), "PYTHONPATH": ":".join(sys.path)}
    ids = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert ids.stdout is not None
    assert ids.stdout.readline() == b"paused\n"
    until = monotonic() + 2 * SHORT
    while monotonic() < until:  # its requests renew it
        assert frozen(lab)
    ids.kill()
    ids.communicate()
    thaws(lab, "its holder is dead")
    counter.goes_on()


def test_a_pause_that_was_silent_for_too_long_is_over(lab: LabVM, agent: InstalledAgent) -> None:
    """What was read is good; what was not can't be had of that instant any more."""
    guest = connect(agent, freeze=SHORT)
    ids = Ids(Libvmi.over(guest))
    ids.processes()
    with pause(ids.vmi):
        before = ids.processes()
        thaws(lab, "nothing was asked")
        assert ids.processes() == before
        with pytest.raises(LinkError, match="the pause is over"):
            ids.modules()
    assert ids.modules()
    with pause(ids.vmi):
        assert frozen(lab)
    guest.close()


def test_a_pause_that_was_ended_by_hand_is_over(lab: LabVM, guest: AgentGuest) -> None:
    ids = Ids(Libvmi.over(guest))
    with pause(ids.vmi):
        lab.run("sh", "-c", f"echo 0 >{CONTAINERS_SLICE}/cgroup.freeze")
        with pytest.raises(LinkError, match="thawed by hand"):
            ids.processes()


def test_a_pause_is_lost_with_its_session(lab: LabVM, guest: AgentGuest) -> None:
    """An agent that was restarted answers; but what it reads is of another instant."""
    ids = Ids(Libvmi.over(guest))
    with pause(ids.vmi):
        ids.processes()
        lab.run("systemctl", "restart", "vmishim-agent")
        thaws(lab, "the agent was stopped")
        with pytest.raises(LinkError, match="lost within a pause"):
            ids.modules()
    with pause(ids.vmi):
        assert frozen(lab)
        assert ids.modules()


def test_a_stopped_service_thaws(lab: LabVM, guest: AgentGuest, counter: Counter) -> None:
    guest.hold()
    assert frozen(lab)
    lab.run("systemctl", "stop", "vmishim-agent")
    try:
        thaws(lab, "the agent was stopped")
        counter.goes_on()
    finally:
        lab.run("systemctl", "start", "vmishim-agent")


def test_a_killed_agent_thaws(lab: LabVM, agent: InstalledAgent, guest: AgentGuest, counter: Counter) -> None:
    guest.hold()
    assert frozen(lab)
    lab.run("kill", "-KILL", str(main_pid(lab)))
    thaws(lab, "the agent was killed")
    counter.goes_on()
    is_back(agent)


def test_the_warden_thaws_without_a_next_agent(lab: LabVM) -> None:
    """What was frozen by a process that kills itself and is not started again."""
    killed = lab.run("python3", "-IS", "-c", FREEZING + "os.kill(os.getpid(), 9)", check=False)
    assert killed.returncode == -9
    assert killed.stdout == b"frozen 1\n"
    lab.wait_until(lambda: b"frozen 0" in lab.read(f"{PLANTED}/cgroup.events"), "the warden to thaw")
    lab.run("rmdir", PLANTED)


def test_the_next_agent_thaws_what_no_warden_could(
    lab: LabVM, agent: InstalledAgent, guest: AgentGuest, counter: Counter
) -> None:
    guest.hold()
    assert frozen(lab)
    lab.run("systemctl", "kill", "--signal=KILL", "vmishim-agent")  # all of its processes
    thaws(lab, "the next agent has started")
    counter.goes_on()
    is_back(agent)


def test_an_agent_without_a_warden_is_restarted(
    lab: LabVM, agent: InstalledAgent, guest: AgentGuest, counter: Counter
) -> None:
    guest.hold()
    assert frozen(lab)
    before = main_pid(lab)
    lab.run("kill", "-KILL", str(warden(lab)))
    thaws(lab, "the next agent has started")
    counter.goes_on()
    lab.wait_until(lambda: main_pid(lab) not in (0, before), "the next agent's process", 60)
    is_back(agent)


def test_the_warden_may_do_nothing_else(lab: LabVM, agent: InstalledAgent) -> None:
    lines = lab.read(f"/proc/{warden(lab)}/status").decode().splitlines()
    status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    owner = lab.run("stat", "-c", "%u", "/run/vmishim-agent").stdout.decode().split()
    assert status["Uid"] == owner * 4
    assert {kind: status[f"Cap{kind}"] for kind in ("Prm", "Eff", "Amb")} == {
        kind: ["0" * 16] for kind in ("Prm", "Eff", "Amb")
    }
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    held = lab.run("sh", "-c", f"readlink /proc/{warden(lab)}/fd/*").stdout.decode().split()
    files = {name for name in held if not name.startswith("socket:")}
    assert files == {f"{CONTAINERS_SLICE}/cgroup.freeze", f"{CONTAINERS_SLICE}/cgroup.events"}
    assert len(held) == len(files) + 2  # the agent's socket and the journal's


def test_a_stopped_agent_does_not_keep_it_frozen(lab: LabVM, agent: InstalledAgent, counter: Counter) -> None:
    guest = connect(agent, freeze=SHORT)
    guest.hold()
    assert frozen(lab)
    pid = str(main_pid(lab))
    lab.run("kill", "-STOP", pid)
    thaws(lab, "the holder's time is up")
    counter.goes_on()
    lab.run("kill", "-CONT", pid)
    guest.close()


def test_a_time_out_of_bounds_is_refused(lab: LabVM, agent: InstalledAgent) -> None:
    guest = connect(agent, freeze=61)
    with pytest.raises(LinkError, match=r"lasts 1 to 60,000 ms without a request, not 61,000"):
        Libvmi.over(guest).pause_vm()
    assert not frozen(lab)
    guest.close()


def test_a_cgroup_that_has_gone_is_named(lab: LabVM) -> None:
    script = FREEZING + (
        "cgroup.rmdir()\n"
        "for ask in (lambda: freezer.renew(session), lambda: freezer.freeze(session, 60_000)):\n"
        "    try: ask()\n"
        "    except FreezeError as error: print(error)\n"
    )
    _, *said = lab.run("python3", "-IS", "-c", script).stdout.decode().splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("the monitored container's cgroup is gone (No such device)")
