"""What ``python -m bench.paper`` compares with and plants."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from bench import hosts, variants, workloads
from vmishim.libvmi import Libvmi


@pytest.fixture
def planted() -> Iterator[set[int]]:
    """Processes of this machine that are called alike."""
    children = [subprocess.Popen(["sleep", "infinity"]) for _ in range(7)]
    yield {child.pid for child in children}
    for child in children:
        child.kill()
        child.wait()


def test_copying_one_by_one_lists_what_was_planted(planted: set[int]) -> None:
    with variants.here(variants.SEQUENTIAL) as agent, Libvmi.over(guest := agent.connect()) as vmi:
        at = hosts.find(guest.profile)
        before = guest.link.requests
        listed = dict(workloads.processes(vmi, at))
        assert guest.link.requests - before == 1
    assert {pid for pid in planted if listed.get(pid) == "sleep"} == planted
