"""An agent in a guest under attack at its port."""

from __future__ import annotations

from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.guest.ids import Ids
from trials.hostile import flood
from trials.hostile.sockets import Agent
from vmishim.errors import LinkError


def test_a_message_without_an_end_costs_the_agent_a_restart(lab: LabVM, agent: InstalledAgent, ids: Ids) -> None:
    """libzmq keeps its parts: the unit's MemoryMax ends that, and the IDS finds the agent that comes after."""
    unit = "vmishim-agent"
    lab.run("systemctl", "set-property", "--runtime", unit, "MemoryMax=128M")
    before = _restarts(lab)
    try:
        flood.parts(Agent(agent.endpoint, agent.private, agent.public, 0))
        lab.wait_until(lambda: _restarts(lab) > before, "the agent's restart")
        lab.wait_until(lambda: _listed(ids), "a listing")
        assert _listed(ids) >= {1, 2}
    finally:
        lab.run("systemctl", "set-property", "--runtime", unit, "MemoryMax=512M")


def _restarts(lab: LabVM) -> int:
    return int(lab.run("systemctl", "show", "vmishim-agent", "-p", "NRestarts", "--value").stdout)


def _listed(ids: Ids) -> set[int]:
    try:
        return set(ids.processes())
    except LinkError:
        return set()
