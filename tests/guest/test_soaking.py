"""Two minutes of the soak (ci/soak): nothing wrong, nothing lost for good, nothing grown."""

from __future__ import annotations

from ci.soak.__main__ import Soak
from ci.vm.agent import InstalledAgent
from ci.vm.lab import LabVM


def test_listings_are_right_while_all_comes_and_goes_and_fails(lab: LabVM, agent: InstalledAgent) -> None:
    assert Soak(lab, agent, minutes=2, seed="ci").run().failures == []
