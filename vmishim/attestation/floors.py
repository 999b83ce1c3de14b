"""The TCB at which AMD's published fixes are in place, by processor: ``floors.toml``, which has its sources."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any

from vmishim.attestation.report import Tcb


def floor(cpuid: tuple[int, int, int] | None) -> dict[str, int]:
    """The lowest TCB parts for a processor, by family, model and stepping; empty if none is known."""
    if cpuid is None:
        return {}
    family, model, stepping = cpuid
    found: dict[str, int] = {}
    for entry in _entries():
        low, high = entry["models"]
        if entry["family"] == family and low <= model <= high and entry.get("stepping", stepping) == stepping:
            for part in fields(Tcb):
                if part.name in entry:
                    found[part.name] = max(entry[part.name], found.get(part.name, 0))
    return found


@cache
def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = tomllib.loads(files(__package__).joinpath("floors.toml").read_text("utf-8"))[
        "floor"
    ]
    return entries
