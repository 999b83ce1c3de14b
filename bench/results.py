"""What was measured, as values, and as the records in docs/."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

STRATEGIES = ("scalar", "page", "batch", "native")


@dataclass(frozen=True)
class Cost:
    """One listing by one strategy."""

    seconds: list[float]
    """Of each run."""
    requests: int = 0
    carried: int = 0
    """Bytes of all frames of one listing, in both directions."""
    projected: bool = False
    """Not run to its end, which would take long: the number of reads times what the first of them took."""

    @property
    def ms(self) -> float:
        """The median."""
        return median(self.seconds) * 1e3


@dataclass(frozen=True)
class Case:
    """One listing of one size, every strategy to read."""

    listing: str
    size: int
    """Tasks, modules or sockets there were."""
    reads: int
    """Calls of the API the listing makes."""
    costs: dict[str, Cost]
    buckets: int = 0
    """Of the hash that the sockets are in."""

    @property
    def name(self) -> str:
        """What was listed, in full."""
        where = f" in {self.buckets:,} buckets" if self.buckets else ""
        return f"{self.size:,} {self.listing}{where}"

    def times(self, numerator: str, denominator: str, *, fastest: bool = False) -> float | None:
        """How many times longer one strategy takes than another, by medians or by the fastest run of each."""
        if numerator not in self.costs or denominator not in self.costs:
            return None
        one, other = self.costs[numerator], self.costs[denominator]
        return min(one.seconds) / min(other.seconds) if fastest else one.ms / other.ms


@dataclass(frozen=True)
class Part:
    """A share of a listing's time."""

    what: str
    ms: float
    where: str


@dataclass(frozen=True)
class Ground:
    """All that was measured of one kernel on one machine."""

    kernel: str
    where: str
    """Such as "lab VM (tcg)"."""
    machine: str
    date: str
    cases: list[Case]
    first: dict[str, float]
    """Milliseconds from nothing to the end of the first listing of processes, by strategy."""
    first_of: int
    """Processes in that listing."""
    cached: dict[str, float]
    """Nanoseconds of a read that needs no request."""
    parts: list[Part]
    """Where the time of one batch listing of processes goes."""
    parts_of: int
    """Processes in that listing."""
    emulated: bool = False
    """Whether the guest's instructions are interpreted by software."""
    network: str = ""
    """What is between the two ends."""
    load: float = 0.0
    """The highest load average during the run (proc(5), loadavg): processes that wanted a CPU, including ours."""
    cpus: int = 0
    """Of the machine."""


def as_json(ground: Ground) -> dict[str, Any]:
    """Everything, times in seconds to the microsecond."""
    return {name: rounded(value) for name, value in asdict(ground).items()}


def from_json(record: dict[str, Any]) -> Ground:
    """What `as_json` gave."""
    parts = [Part(**part) for part in record["parts"]]
    return Ground(**record | {"cases": [case_from_json(case) for case in record["cases"]], "parts": parts})


def case_from_json(record: dict[str, Any]) -> Case:
    """One case of a record."""
    return Case(**record | {"costs": {strategy: Cost(**cost) for strategy, cost in record["costs"].items()}})


def rounded(value: Any) -> Any:
    """A record's floats to six digits."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def machine() -> str:
    """This machine's processor and interpreter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown processor")
    return f"{model}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
