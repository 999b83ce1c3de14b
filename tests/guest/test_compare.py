"""``vmishim compare`` on a booted guest: our backends and the genuine bindings, held to each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.agent import InstalledAgent
from lab.environment import genuine
from lab.vm import LabVM
from vmishim import cli
from vmishim.wire.keys import save_private

EXAMPLES = Path(__file__).parents[2] / "compat" / "examples"
BACKENDS = ["native", "ramfile", "agent-scalar", "agent-page", "agent-batch"]

Compare = Callable[..., tuple[int, str, dict[str, Any]]]

LAST_BYTE = """\
import sys
from libvmi import Libvmi

with Libvmi(sys.argv[1]) as vmi:
    print(vmi.read_8_pa(vmi.get_memsize() - 1))
"""
"""Differs by design: a reader of the whole file sees memory to the file's end; for the kernel, and so for its agent, it
ends before what the firmware keeps for itself."""

CLOCK = """\
import sys
from libvmi import Libvmi

with Libvmi(sys.argv[1]) as vmi:
    print(vmi.get_name(), vmi.read_64_ksym("jiffies_64"))
"""


@pytest.fixture
def compare(
    lab: LabVM,
    agent: InstalledAgent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Compare:
    """``vmishim compare`` with the guest enrolled as "lab", by both backends, stopped while its file is read:
    arguments -> (exit status, output, report)."""
    monkeypatch.setenv("VMISHIM_GENUINE_PYTHON", str(genuine()))
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    save_private(tmp_path / "key", agent.private)
    entry = {"agent": agent.endpoint, "agent_key": agent.public.text, "key": f"{tmp_path}/key", "ramfile": f"{lab.ram}"}
    lines = [f'{setting} = "{value}"' for setting, value in entry.items()]
    (tmp_path / "domains.toml").write_text("\n".join(["[lab]", *lines, "timeout = 30.0\n"]))

    def run(script: Path | str, *arguments: str, options: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
        if isinstance(script, str):
            (tmp_path / "script.py").write_text(script)
            script = tmp_path / "script.py"
        # QEMU's monitor serves one client at a time; the lab's own connects again when it is needed.
        lab.monitor("query-status")
        assert lab._monitor is not None
        lab._monitor.close()
        lab._monitor = None
        capfd.readouterr()
        ours = ["--qmp", str(lab.folder / "monitor.sock"), "--runs", "1", "-o", str(tmp_path / "made"), *options]
        status = cli.main(["compare", *ours, str(script), "lab", *arguments])
        assert lab.monitor("query-status")["running"]
        assert (tmp_path / "made.html").read_text().startswith("<!doctype html>")
        return status, capfd.readouterr().out, json.loads((tmp_path / "made.json").read_text())

    return run


@pytest.mark.parametrize("name", ["process_list.py", "module_list.py"])
def test_every_backend_agrees_byte_for_byte(compare: Compare, name: str) -> None:
    status, out, made = compare(EXAMPLES / name)
    assert (status, made["result"], made["missing"]) == (0, "agreed", [])
    assert made["stopped"]
    rows = {row["name"]: row for row in made["backends"]}
    assert list(rows) == BACKENDS
    assert rows.pop("native")["answers"] == "reference"
    assert {name: row["answers"] for name, row in rows.items()} == dict.fromkeys(BACKENDS[1:], "same")
    assert len({(row["reads"], row["pages"]) for row in made["backends"]}) == 1
    assert rows["agent-batch"]["requests"] == 2
    assert 2 < rows["agent-page"]["requests"] < rows["agent-scalar"]["requests"]
    assert all(len(row["times"]) == 1 and row["status"] == 0 for row in made["backends"])
    assert out.rstrip().endswith("All backends gave the same answers.")


def test_a_difference_is_caught_and_the_read_is_named(lab: LabVM, compare: Compare) -> None:
    status, out, made = compare(LAST_BYTE, options=("--only", "native,ramfile,agent-batch"))
    assert (status, made["result"], made["rounds"]) == (1, "differ", 3)
    native, ramfile, batch = made["backends"]
    assert (native["answers"], ramfile["answers"], batch["answers"]) == ("reference", "same", "differ")
    size = lab.ram.stat().st_size
    by_agent, by_file, other, *_ = batch["first"]
    assert (by_agent["call"], by_agent["reference"]) == ("get_memsize()", f"{size:#x}")
    assert 0 < size - int(by_agent["other"], 16) < 1 << 20
    assert (by_file["call"], by_file["other"]) == (f"read_8_pa({size - 1:#x})", None)
    assert (other["call"], other["reference"]) == (f"read_8_pa({int(by_agent['other'], 16) - 1:#x})", None)
    assert f"   get_memsize(): {size:#x}, here {by_agent['other']}" in out.splitlines()


def test_memory_that_moves_is_told_from_a_difference(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMISHIM_GENUINE_PYTHON")
    status, out, made = compare(CLOCK, options=("--only", "native,ramfile,agent-batch"))
    assert (status, made["result"], made["moved"], made["rounds"]) == (0, "agreed", True, 3)
    assert [row["answers"] for row in made["backends"]] == ["reference", "moved"]
    assert made["backends"][1]["first"][0]["call"] == 'read_64_ksym("jiffies_64")'
    # And what there is not is named, with what would make it.
    (native,) = made["missing"]
    assert native["name"] == "native"
    assert "pip install libvmi==3.7.1" in native["remedy"]
    assert "no native: no interpreter with LibVMI's genuine bindings was given" in out
