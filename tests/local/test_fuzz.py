"""Each fuzzed target for a second. Longer: ``python -m trials.fuzz TARGET --time S``."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has no build for this Python: nothing is fuzzed")

from trials.fuzz.bombs import BOMBS
from trials.fuzz.budget import OverBudgetError, within_budget
from trials.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


def fuzz(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trials.fuzz", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("target", list(TARGETS))
def test_nothing_is_found_in_a_second(target: str, tmp_path: Path) -> None:
    done = fuzz(target, "--time", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) > len(TARGETS[target].seeds())


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_seeds_lead_somewhere(target: str) -> None:
    assert all(TARGETS[target].seeds())
    for seed in TARGETS[target].seeds():
        TARGETS[target].run(seed)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, bomb in BOMBS.items() if bomb.bounds])
def test_without_its_bound_a_bomb_is_a_finding(name: str) -> None:
    bomb = BOMBS[name]
    data = bomb.make()
    with bomb.unbounded(), pytest.raises((OverBudgetError, RecursionError, ValueError)):
        within_budget(partial(bomb.parse, data))


def test_each_bomb_belongs_to_a_target() -> None:
    assert {bomb.target for bomb in BOMBS.values()} <= TARGETS.keys()
