"""Attestation in a booted guest, which is none of AMD's confidential ones: it says so, and nothing takes it for one."""

from __future__ import annotations

import pytest

from ci.vm.agent import InstalledAgent
from vmishim.attestation import Requirements, ask
from vmishim.attestation.errors import NoReportError
from vmishim.guest import Guest, connect

REQUIRED = Requirements(frozenset({bytes(48)}))


def test_a_guest_without_attestation_says_so(guest: Guest) -> None:
    with pytest.raises(NoReportError) as caught:
        ask(guest.link.exchange)
    for way in ("/sys/kernel/config/tsm/report: ", "/dev/sev-guest: "):
        assert way in str(caught.value)


def test_an_ids_that_requires_attestation_does_not_read_it(agent: InstalledAgent) -> None:
    with pytest.raises(NoReportError, match="there is no attestation on the agent's machine"):
        connect("lab", agent.endpoint, agent.private, agent.public, 30.0, requirements=REQUIRED)
