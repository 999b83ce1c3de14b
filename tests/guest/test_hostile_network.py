"""An agent in a guest under attack at its port."""

from __future__ import annotations

from functools import partial

from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.guest.ids import Ids
from trials.hostile import flood
from trials.hostile.sockets import Agent
from vmishim.errors import LinkError

POURED_MIB = 600
"""More than the unit's ``MemoryMax``."""


def test_messages_without_an_end_cost_the_agent_no_restart(lab: LabVM, agent: InstalledAgent, ids: Ids) -> None:
    """libzmq keeps their parts: the agent closes such connections before its unit's MemoryMax ends it."""
    before = _restarts(lab)
    with flood.Pouring(Agent(agent.endpoint, agent.private, agent.public, 0)) as pouring:
        lab.wait_until(lambda: pouring.bytes_poured >= POURED_MIB << 20, f"{POURED_MIB} MiB poured")
        lab.wait_until(lambda: _listed(ids) >= {1, 2}, "a listing during the flood")
    assert _listed(ids) >= {1, 2}
    assert _restarts(lab) == before


def test_the_agent_is_started_again_however_often_it_ends(lab: LabVM, agent: InstalledAgent, ids: Ids) -> None:
    """systemd's default gives up after five starts in ten seconds."""
    for _ in range(7):
        before = _restarts(lab)
        lab.run("systemctl", "kill", "--signal=KILL", "vmishim-agent")
        lab.wait_until(partial(_restarted, lab, before), "the agent's restart")
    lab.wait_until(lambda: _listed(ids) >= {1, 2}, "a listing")


def _restarted(lab: LabVM, before: int) -> bool:
    return _restarts(lab) > before


def _restarts(lab: LabVM) -> int:
    return int(lab.run("systemctl", "show", "vmishim-agent", "-p", "NRestarts", "--value").stdout)


def _listed(ids: Ids) -> set[int]:
    try:
        return set(ids.processes())
    except LinkError:
        return set()
