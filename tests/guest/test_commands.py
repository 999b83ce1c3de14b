"""The commands on a booted guest: what they list is what its ``/proc`` has."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import enrolled
from lab.agent import InstalledAgent
from lab.vm import LabVM
from vmishim import cli
from vmishim.wire.keys import generate, save_private

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vmishim(
    agent: InstalledAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """``vmishim`` with the guest enrolled as "lab": arguments -> (exit status, output, errors)."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    save_private(tmp_path / "key", agent.private)

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.main(arguments), *capfd.readouterr()

    status, out, err = run("enroll", "lab", agent.endpoint, agent.public.text)
    assert (status, err) == (0, "")
    assert re.search(r"lab answers: Linux \S+, \d+ CPUs", out)
    return run


@pytest.mark.parametrize("strategy", ["batch", "page", "scalar"])
def test_ps_lists_what_proc_has(lab: LabVM, vmishim: Command, strategy: str) -> None:
    planted = lab.spawn("sleep", "infinity", count=3, comm="planted")
    try:
        status, out, err = vmishim("ps", "lab", "--json", "--stats", "--strategy", strategy)
        fields = ("-o", "pid=", "-o", "ppid=", "-o", "uid=", "-o", "comm=")
        told = lab.run("ps", *fields, "-p", ",".join(map(str, planted))).stdout.decode()
    finally:
        lab.kill(planted)
    assert status == 0
    assert err.startswith(f"vmishim: {strategy}: ")
    listed = {task["pid"]: task for task in json.loads(out)}
    assert {pid for pid, task in listed.items() if task["comm"] == "planted"} == planted
    assert told.count("\n") == len(planted)
    for line in told.splitlines():
        pid, ppid, uid, comm = line.split()
        task = listed[int(pid)]
        assert (task["ppid"], task["uid"], task["comm"], task["state"]) == (int(ppid), int(uid), comm, "sleeping")
    assert listed[0]["comm"].startswith("swapper")
    assert listed[1]["comm"] == "systemd"


def test_lsmod_lists_what_proc_modules_has(lab: LabVM, vmishim: Command) -> None:
    status, out, _ = vmishim("lsmod", "lab", "--json")
    assert status == 0
    listed = [(module["name"], module["size"], module["state"], int(module["base"], 16)) for module in json.loads(out)]
    told = [line.split() for line in lab.read("/proc/modules").decode().splitlines()]
    assert listed == [(line[0], int(line[1]), line[4].lower(), int(line[5], 16)) for line in told]
    assert len(listed) > 5


def test_tables_and_tree_hold_the_same(vmishim: Command) -> None:
    status, table, _ = vmishim("ps", "lab")
    assert status == 0
    status, tree, _ = vmishim("ps", "lab", "--tree")
    assert status == 0
    assert {line.split()[0] for line in table.splitlines()} == {line.split()[0] for line in tree.splitlines()}
    assert vmishim("lsmod", "lab")[0] == 0


def test_the_doctor_finds_nothing(vmishim: Command) -> None:
    status, out, _ = vmishim("doctor", "lab", "--json")
    found = json.loads(out)
    assert [(entry["about"], entry["verdict"]) for entry in found if entry["verdict"] != "ok"] == [
        ("attestation", "note")
    ]
    assert status == 0
    assert {"reached", "version", "kernel", "symbols", "structures", "direct map", "one read"} <= {
        entry["about"] for entry in found
    }


def test_the_doctor_knows_a_key_that_is_not_permitted(vmishim: Command, tmp_path: Path) -> None:
    ours = generate()
    save_private(tmp_path / "key", ours, overwrite=True)
    status, out, _ = vmishim("doctor", "lab")
    assert status == 1
    assert f"add to /etc/vmishim/permitted: {ours.public.text}" in out
    status, _, err = vmishim("ps", "lab")
    assert (status, err.count("\n")) == (1, 1)
    assert "not permitted" in err


def test_the_doctor_knows_another_agent(agent: InstalledAgent, vmishim: Command) -> None:
    other = generate().public.text
    status, _, err = vmishim("enroll", "lab", agent.endpoint, other, "--replace")
    assert (status, err.count("\n")) == (1, 1)
    assert "lab was not added" in err
    assert vmishim("ps", "lab")[0] == 0
    assert vmishim("enroll", "lab", agent.endpoint, other, "--replace", "--no-check")[0] == 0
    status, out, _ = vmishim("doctor", "lab")
    assert status == 1
    assert "-> " in out.split("reached")[1]


def test_a_guest_that_can_attest_nothing_is_said_to_be_one(
    lab: LabVM, agent: InstalledAgent, vmishim: Command, tmp_path: Path
) -> None:
    none = "the agent's machine gives no attestation report: /sys/kernel/config/tsm/report: "
    status, out, err = vmishim("attest", "lab")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert none in err
    status, out, _ = vmishim("doctor", "lab")
    assert status == 0
    assert none in out
    with (tmp_path / "domains.toml").open("a") as file:
        file.write(f"[lab.attestation]\nmeasurement = ['{'00' * 48}']\n")
    status, out, err = vmishim("ps", "lab")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert none in err
    status, out, _ = vmishim("doctor", "lab", "--json")
    assert status == 1
    assert [entry["about"] for entry in json.loads(out) if entry["verdict"] == "bad"] == ["attestation"]


@pytest.mark.parametrize(("seconds", "verdict"), [(5.0, "ok"), (61.0, "bad")])  # the agent allows a minute
def test_the_doctor_tries_a_pause_that_freezes(vmishim: Command, tmp_path: Path, seconds: float, verdict: str) -> None:
    with (tmp_path / "domains.toml").open("a") as file:
        file.write(f"freeze = {seconds}\n")
    status, out, _ = vmishim("doctor", "lab", "--json")
    found = {finding["about"]: finding["verdict"] for finding in json.loads(out)}
    assert (status, found["pause"]) == (verdict == "bad", verdict)


def test_a_guest_to_play_with_is_enrolled_until_it_ends(
    lab: LabVM, agent: InstalledAgent, vmishim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by ``lab boot --agent play``, in a VM that has an agent already."""
    monkeypatch.setattr(enrolled, "install", lambda vm: agent)
    before = set(lab.processes())
    try:
        with enrolled.enrolled(lab, "play"):
            status, out, err = vmishim("ps", "play", "--json")
            assert (status, err) == (0, "")
            listed = Counter(task["comm"] for task in json.loads(out) if task["comm"] in enrolled.PLANTED)
            assert listed == enrolled.PLANTED
            assert vmishim("ss", "play")[0] == 0
    finally:
        lab.kill({pid for pid, comm in lab.processes().items() if pid not in before and comm in enrolled.PLANTED})
    status, _, err = vmishim("ps", "play")
    assert (status, err.count("\n")) == (1, 1)
    assert "no domain 'play'" in err
    assert vmishim("ps", "lab")[0] == 0  # the other guest's entry is as it was


def test_a_guest_that_is_forgotten_can_be_enrolled_again(agent: InstalledAgent, vmishim: Command) -> None:
    assert vmishim("forget", "lab")[0] == 0
    assert "no domain 'lab'" in vmishim("ps", "lab")[2]
    assert vmishim("enroll", "lab", agent.endpoint, agent.public.text)[0] == 0
    assert vmishim("ps", "lab")[0] == 0


def test_a_libvmi_conf_entry_is_the_guests_own(lab: LabVM, vmishim: Command) -> None:
    status, out, _ = vmishim("config", "--export", "lab")
    assert status == 0
    assert lab.image.release in out
    assert re.search(r"linux_tasks = 0x[0-9a-f]+;", out)


def test_the_same_commands_read_a_ram_file(lab: LabVM, vmishim: Command, tmp_path: Path) -> None:
    with (tmp_path / "domains.toml").open("a") as file:
        file.write(f'\n[file]\nramfile = "{lab.ram}"\n')
    assert vmishim("doctor", "file")[0] == 0
    lists = {}
    for name in ("lab", "file"):
        status, out, _ = vmishim("lsmod", name, "--json")
        assert status == 0
        lists[name] = json.loads(out)
    assert lists["file"] == lists["lab"]
    lab.pause()
    try:
        status, out, _ = vmishim("ps", "file", "--json")
    finally:
        lab.resume()
    assert status == 0
    assert {task["comm"] for task in json.loads(out)} > {"systemd", "swapper/0"}
