"""What a running agent may still do: nothing but answer, by the kernel's own word and by trying."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.agent import AGENT
from lab.vm import LabVM
from tests.local import attempts
from vmishim.guests import local

ROOT = Path(__file__).parents[2]
SCRIPT = Path(attempts.__file__).read_text()
THREADS = {"ZMQbg/Reaper", "ZMQbg/IO/0"}
NONE = "0" * 16

Status = dict[str, str]


def parse(text: str) -> tuple[str, Status]:
    """Name and fields of a ``/proc/PID/status``."""
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return fields["Name"], fields


def assert_confined(status: Status, user: str, capabilities: str = NONE) -> None:
    assert (status["CapInh"], status["CapAmb"]) == (NONE, NONE)
    assert (status["CapPrm"], status["CapEff"]) == (capabilities, capabilities)
    assert status["Uid"].split() == status["Gid"].split() == [user] * 4
    assert user != "0"
    assert status["Groups"] == ""
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


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

    @pytest.fixture(scope="class")
    @classmethod
    def tried(cls, where: LabVM | None) -> tuple[dict[str, Any], str]:
        """What the script reports and logs where the agent runs: in a guest, or here."""
        if where is not None:
            done = where.run("python3", "-c", SCRIPT, AGENT)
            return json.loads(done.stdout), done.stderr.decode()
        here = subprocess.run([sys.executable, "-c", SCRIPT, str(ROOT)], capture_output=True, text=True, check=False)
        assert here.returncode == 0, here.stderr
        return json.loads(here.stdout), here.stderr

    def test_all_are_refused_and_requests_answered(self, tried: tuple[dict[str, Any], str]) -> None:
        report, log = tried
        assert errno.EPERM not in report["before"].values(), report["before"]
        assert report["after"] == dict.fromkeys(report["before"], errno.EPERM)
        assert report["answers after"] == report["answers before"]
        for kind in ("Read", "Walk"):
            assert b"swapper/0" in bytes.fromhex(report["answers after"][kind])
        assert re.search(r'Traceback .*\n  File ".*", line \d+, in main\n(.*\n)*ZeroDivisionError: as planned', log)

    @pytest.mark.parametrize("attempt", attempts.FATAL)
    def test_the_worst_end_the_process(self, tried: tuple[dict[str, Any], str], attempt: str) -> None:
        assert tried[0]["ends"][attempt] == -signal.SIGSYS


class TestHere(Attempts):
    @pytest.fixture(scope="class")
    @classmethod
    def where(cls) -> None:
        if os.geteuid():
            pytest.skip("loading eBPF programs on this machine takes root")
