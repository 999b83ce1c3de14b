"""``vmishim scan`` finds exactly what was planted, and nothing of what only looks like it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lab.agent import InstalledAgent, install
from lab.vm import LabVM
from trials.detection.scenes import Attacks, found, plant_benign
from vmishim.guests.agent import AgentGuest
from vmishim.guests.ramfile import RamFile
from vmishim.inspection.checks import CHECKS
from vmishim.inspection.scan import Scan
from vmishim.wire.keys import save_private

WARM_MAX = 5
"""Requests of a look at a guest that was looked at before."""


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    with LabVM.boot(request.param) as booted:
        yield booted


@pytest.fixture(scope="module")
def scanned_agent(vm: LabVM) -> InstalledAgent:
    return install(vm)


@pytest.fixture(scope="module")
def target(scanned_agent: InstalledAgent) -> Iterator[AgentGuest]:
    with closing(scanned_agent.connect()) as connected:
        yield connected


@pytest.fixture(scope="module")
def scan(target: AgentGuest) -> Scan:
    """One scan for all looks."""
    return Scan(target)


@pytest.fixture(scope="module")
def entry(scanned_agent: InstalledAgent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domains.toml that names the guest."""
    folder = tmp_path_factory.mktemp("scan")
    save_private(folder / "key", scanned_agent.private)
    (folder / "domains.toml").write_text(
        f'[web-1]\nagent = "{scanned_agent.endpoint}"\nagent_key = "{scanned_agent.public.text}"\n'
        f'key = "{folder / "key"}"\ntimeout = 30\n'
        f'[web-2]\nagent = "tcp://127.0.0.1:1"\nagent_key = "{scanned_agent.public.text}"\n'
        f'key = "{folder / "key"}"\ntimeout = 1\n'
    )
    return folder / "domains.toml"


def command(entry: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("vmishim")), "scan", *arguments],
        env={**os.environ, "VMISHIM_CONFIG": str(entry)},
        cwd=entry.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_guest_as_it_comes_has_no_findings_and_every_check_runs(scan: Scan) -> None:
    seen = scan.look()
    assert (seen.findings, seen.unchecked, seen.damage) == ([], [], [])


@pytest.mark.long
def test_a_look_at_300_processes_costs_few_requests(vm: LabVM, target: AgentGuest, scan: Scan) -> None:
    planted = vm.spawn("sleep", "infinity", count=250)
    scan.look()
    before = target.link.requests
    seen = scan.look()
    assert target.link.requests - before <= WARM_MAX
    assert seen.looked[0] >= 300
    assert (seen.findings, seen.damage) == ([], [])
    vm.kill(planted)


def test_what_only_looks_like_an_attack_is_not_found(vm: LabVM, scan: Scan) -> None:
    plant_benign(vm)
    seen = scan.look()
    assert (found(seen.findings), seen.unchecked, seen.damage) == ({}, [], [])


@pytest.fixture(scope="module")
def attacks(vm: LabVM, target: AgentGuest) -> Attacks:
    """Every attack, all at a time, beside the honest things."""
    return Attacks(vm, target.direct)


def test_every_attack_is_found_and_nothing_else(attacks: Attacks, scan: Scan) -> None:
    seen = scan.look()
    assert found(seen.findings) == attacks.expected
    assert (seen.unchecked, seen.damage) == ([], [])


def test_a_guest_without_an_agent_tells_the_same(vm: LabVM, attacks: Attacks) -> None:
    vm.pause()
    try:
        with closing(RamFile("ram", vm.ram)) as ram:
            seen = Scan(ram).look()
    finally:
        vm.resume()
    assert found(seen.findings) == attacks.expected
    assert (seen.unchecked, seen.damage) == ([], [])


def test_the_command_tells_all_of_it_by_its_status_too(attacks: Attacks, entry: Path) -> None:
    done = command(entry, "web-1", "--json")
    told = json.loads(done.stdout)
    as_sets: dict[str, set[tuple[str, str, int | None]]] = {}
    for each in told["findings"]:
        as_sets.setdefault(each["check"], set()).add((each["id"], each["subject"], each["pid"]))
    assert (done.returncode, as_sets) == (6, attacks.expected)
    assert all(each["evidence"] and each["compared"] and each["look_next"] for each in told["findings"])


@pytest.mark.long
def test_the_status_is_that_of_the_highest_finding(attacks: Attacks, entry: Path) -> None:
    done = command(entry, "web-1", "--only", "taint")
    assert done.returncode == 4
    assert done.stdout.startswith("web-1: LOW foreign-module: ")
    # A guest that is down hides no finding of another.
    done = command(entry, "--domains", "web-*", "--only", "promiscuous", "--json", "--deadline", "60")
    lines = {line["domain"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 5
    assert [each["subject"] for each in lines["web-1"]["findings"]] == ["lo"]
    assert lines["web-2"]["error"]


def test_code_of_a_hidden_module_is_nobodys(attacks: Attacks, scan: Scan) -> None:
    attacks.hide_module()
    assert found(scan.look().findings) == attacks.expected
    assert attacks.expected.keys() == {check.name for check in CHECKS}, "every check has an attack"


@pytest.mark.long
def test_what_a_baseline_accepts_is_not_told_again(vm: LabVM, attacks: Attacks, entry: Path) -> None:
    known = str(entry.parent / "known.json")
    written = command(entry, "web-1", "--write-baseline", known)
    assert written.returncode == 0, written.stderr
    accepted = sum(map(len, attacks.expected.values()))
    done = command(entry, "web-1", "--baseline", known, "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["findings"], told["accepted"]) == (0, [], accepted)
    vm.run("sh", "-c", "echo /tmp/other >/proc/sys/kernel/modprobe")
    done = command(entry, "web-1", "--baseline", known)
    assert done.returncode == 6
    assert "modprobe_path is '/tmp/other'" in done.stdout


def test_what_is_undone_is_not_found(vm: LabVM, attacks: Attacks, scan: Scan) -> None:
    attacks.undo()
    assert found(scan.look().findings) == {"taint": {("foreign-module", "none is listed now", None)}}
    trouble = [line for line in vm.run("dmesg").stdout.splitlines() if b"BUG:" in line or b"WARNING:" in line]
    assert trouble == []
