"""The IDS in one VM, the monitored system in another: what is listed is what is there, whatever the host does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trials import two_vms
from trials.two_vms import Two

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def vms() -> Iterator[Two]:
    with two_vms.booted() as both:
        yield both


def test_the_listing_is_exactly_proc(vms: Two) -> None:
    planted = vms.monitored.spawn("sleep", "infinity", count=5, comm="planted")
    done = vms.listing()
    assert done.returncode == 0, done.stderr.decode()
    assert vms.is_true(done.stdout)
    assert {int(line[1:6]) for line in done.stdout.splitlines() if b" planted (" in line} == planted


def test_a_hostile_host_can_only_make_it_fail(vms: Two) -> None:
    right, errors, wrong = two_vms.hostile(vms)
    assert wrong == 0
    assert right > 0
    assert errors > 0
