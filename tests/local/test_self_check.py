"""Root on the agent's machine rewrites the agent's maps: what is frozen stays, and the rest is noticed.

These tests are that root; tests/local/bpf_root.py is what it does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.variants import PLAIN, RunningAgent, here
from tests.local.bpf_root import ForeignMap, maps_of
from vmishim.commands.doctor import inside
from vmishim.guests.agent import AgentGuest
from vmishim.wire.plan import Plan, Step, Take

REWRITABLE = ("read_state", "walk_state", "out", "heads")


@pytest.fixture(params=[False, True], ids=["the agent encrypts", "the kernel encrypts"])
def running(request: pytest.FixtureRequest) -> Iterator[RunningAgent]:
    with here(PLAIN, kernel=request.param) as agent:
        yield agent


@pytest.fixture
def plain() -> Iterator[RunningAgent]:
    with here(PLAIN) as agent:
        yield agent


@pytest.fixture
def maps(plain: RunningAgent) -> Iterator[dict[str, ForeignMap]]:
    found = maps_of(plain.pid)
    yield found
    for one in found.values():
        one.close()


def use(guest: AgentGuest) -> None:
    """Have each program run, with each map in use."""
    task = guest.profile.symbol("init_task")
    comm = guest.profile.member("task_struct", "comm").offset
    guest.remote.read(task + comm, 16)
    listed = Plan(0, Step.SELF, (Take(0, comm, 16),), heads=2, stride=0)
    assert list(guest.remote.walk(listed, [task, task]))


def doctors_finding(guest: AgentGuest) -> tuple[str, str]:
    """Verdict and text."""
    (found,) = (finding for finding in inside(guest) if finding.about == "self-check")
    return found.verdict, found.text


def test_how_addresses_are_translated_is_frozen(running: RunningAgent) -> None:
    with closing(running.connect()) as guest:
        use(guest)
        found = maps_of(running.pid)
        layout = found["layout"].read()
        assert int.from_bytes(layout[8:16], "little") == guest.profile.levels
        with pytest.raises(PermissionError):
            found["layout"].write(bytes(len(layout)))
        assert found["layout"].read() == layout
        for one in found.values():
            one.close()


def test_an_agent_that_was_left_alone_says_so(running: RunningAgent) -> None:
    for _ in range(3):
        with closing(running.connect()) as guest:
            use(guest)
            assert guest.profile.self_check == "ok"
            assert doctors_finding(guest) == ("ok", "the agent's programs and maps are what it loaded")


@pytest.mark.parametrize("name", REWRITABLE)
def test_a_rewritten_map_is_told_to_each_later_session(
    plain: RunningAgent, maps: dict[str, ForeignMap], name: str
) -> None:
    with closing(plain.connect()) as guest:
        use(guest)
    assert set(maps) >= {*REWRITABLE, "layout"}
    before = maps[name].read()
    maps[name].write(bytes([before[0] ^ 1]) + before[1:])
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"changed, .* answers may be forged: map {name} was rewritten$"):
            guest = plain.connect()
        with closing(guest):
            assert doctors_finding(guest) == ("bad", f"map {name} was rewritten")
            use(guest)  # writes the map again; what was found stays known


def test_a_rewritten_answer_of_the_kernel_is_told() -> None:
    with here(PLAIN, kernel=True) as agent:
        with closing(agent.connect()) as guest:
            use(guest)
        found = maps_of(agent.pid)
        before = found["sealed"].read()
        found["sealed"].write(bytes([before[0] ^ 1]) + before[1:])
        with pytest.warns(UserWarning, match="map sealed was rewritten$"):
            agent.connect().close()
        for one in found.values():
            one.close()


SCRIPT = """
import fcntl, os, sys
sys.path.insert(0, sys.argv[1])
from guest_agent import sandbox
from guest_agent.agent import Agent
from guest_agent.kernel import Kernel
from vmishim.wire import messages

kernel = Kernel()
agent = Agent(kernel)
sandbox.drop_capabilities()
sandbox.confine(sandbox.serving())

def told():
    hello = agent.answer(b"", messages.encode(messages.Hello("test", [], [])))
    return messages.decode(hello).facts["self_check"]

print(told(), flush=True)
descriptor = kernel._programs.program("lookup")
os.close(descriptor)
assert fcntl.fcntl(kernel._programs.program("read"), fcntl.F_DUPFD_CLOEXEC, descriptor) == descriptor
print(told(), flush=True)
os._exit(0)
"""


def test_an_exchanged_program_is_told_by_a_confined_agent() -> None:
    """Root can exchange a descriptor inside the agent (ptrace); here the agent's own process does."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(root)], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["ok", "program lookup was exchanged"], done.stderr
