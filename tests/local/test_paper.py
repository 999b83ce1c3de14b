"""What ``python -m bench.paper`` compares with and plants."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import hosts, plant_modules, variants, workloads
from lab.vm import LabVM
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


def test_planted_modules_are_modules(lab: LabVM) -> None:
    source = Path(plant_modules.__file__).read_text()
    lab.run("python3", "-c", source, "planted_", "5")
    try:
        names = {line.split()[0] for line in lab.read("/proc/modules").decode().splitlines()}
        assert {name for name in names if "planted_" in name} == {f"planted_{number}" for number in range(5)}
    finally:
        lab.run("rmmod", *(f"planted_{number}" for number in range(5)), check=False)
