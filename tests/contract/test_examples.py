"""The examples, unchanged: on the genuine bindings, and on ours by both backends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.agent import InstalledAgent
from tests.contract.scene import Scene
from vmishim.wire.keys import save_private

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "compat" / "examples"

Run = Callable[[str, str], list[str]]
"""Runs an example by one of the backends; gives its lines."""


@pytest.fixture
def run(scene: Scene, installed: InstalledAgent, tmp_path: Path) -> Run:
    """Over names and configurations for all backends."""
    entries = "".join(
        f"{key} = {value if isinstance(value, int) else chr(34) + value + chr(34)}; "
        for key, value in scene.config.items()
    )
    (tmp_path / "libvmi.conf").write_text(f"ram {{ {entries}}}\n")
    save_private(tmp_path / "key", installed.private)
    (tmp_path / "domains.toml").write_text(
        f'["{scene.vm.ram}"]\nramfile = "{scene.vm.ram}"\n'
        f'[agent]\nagent = "{installed.endpoint}"\nagent_key = "{installed.public.text}"\n'
        f'key = "{tmp_path / "key"}"\ntimeout = 30\n'
    )

    def run(example: str, backend: str) -> list[str]:
        python = scene.python if backend == "genuine" else sys.executable
        ours = {} if backend == "genuine" else {"PYTHONPATH": f"{ROOT / 'compat'}:{ROOT}"}
        domain = "agent" if backend == "agent" else str(scene.vm.ram)
        done = subprocess.run(
            [python, str(EXAMPLES / example), domain],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "VMISHIM_CONFIG": str(tmp_path / "domains.toml"), **ours},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("example", ["process_list.py", "module_list.py"])
def test_an_example_prints_the_same_by_every_backend(run: Run, genuine_too: bool, example: str) -> None:
    expected = run(example, "ramfile")
    assert len(expected) > 1
    if genuine_too:
        assert run(example, "genuine") == expected
    by_agent = run(example, "agent")
    # The agent serves while the guest runs: workers of the kernel may have come and gone.
    steady = [line for line in expected if "kworker" not in line]
    assert [line for line in by_agent if "kworker" not in line] == steady


def test_the_listing_has_the_planted_process(run: Run, scene: Scene) -> None:
    assert any(
        line.startswith(f"[{scene.places.pid:>5}] sleep (struct addr 0x") for line in run("process_list.py", "agent")
    )
