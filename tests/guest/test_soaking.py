"""Two minutes of the soak (trials/soak): nothing wrong, nothing lost for good, nothing grown."""

from __future__ import annotations

import pytest

from lab.agent import InstalledAgent
from lab.vm import LabVM
from trials.soak.__main__ import Soak


@pytest.mark.long
def test_listings_are_right_while_all_comes_and_goes_and_fails(lab: LabVM, agent: InstalledAgent) -> None:
    assert Soak(lab, agent, minutes=2, seed="ci").run().failures == []
