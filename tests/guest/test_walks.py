"""Walks by plan over lists planted in the lab VM's kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from lab import planter
from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.ground.walks import Ground, LongWalks, Requests
from vmishim.guests.agent import AgentGuest


class TestLab(Requests, LongWalks):
    """Over a network, by the agent as it is installed."""

    @pytest.fixture(scope="class")
    @classmethod
    def ground(cls, lab: LabVM, agent: InstalledAgent) -> Iterator[Ground]:
        def another() -> AgentGuest:
            return agent.connect(strategy="scalar", timeout=60.0)

        with closing(another()) as guest, planter.inside(lab) as ground:
            yield Ground(ground, guest, another)
