"""What ``python -m bench.paper`` plants."""

from __future__ import annotations

from pathlib import Path

from bench import plant_modules
from lab.vm import LabVM


def test_planted_modules_are_modules(lab: LabVM) -> None:
    source = Path(plant_modules.__file__).read_text()
    lab.run("python3", "-c", source, "planted_", "5")
    try:
        names = {line.split()[0] for line in lab.read("/proc/modules").decode().splitlines()}
        assert {name for name in names if "planted_" in name} == {f"planted_{number}" for number in range(5)}
    finally:
        lab.run("rmmod", *(f"planted_{number}" for number in range(5)), check=False)
