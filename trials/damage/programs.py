"""The programs that are run on damaged guests: the commands that list, the watch's look, the scan, the IDS examples."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from vmishim.guests.target import Target
from vmishim.inspection import changes, fleet
from vmishim.inspection.lists import whole
from vmishim.inspection.scan import Scan
from vmishim.libvmi import Libvmi

ROOT = Path(__file__).parents[2]
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "process_tree": (),
    "hidden_processes": (),
    "hidden_modules": (),
    "tcp_sockets": (),
    "credentials": ([],),
    "open_files": (False,),
    "syscall_table": ({}, {}),
}
"""Programs of compat/ids, with what their ``look`` takes beside the guest."""


@dataclass(frozen=True)
class Said:
    """What a program said.

    :ivar shown: its entries and findings
    :ivar marks: what it says that it could not read
    :ivar findings: of these, its findings
    """

    shown: Any
    marks: tuple[str, ...]
    findings: Any = ()


Program = Callable[[Target], Said]


def programs() -> dict[str, Program]:
    """All of them by name."""
    found: dict[str, Program] = {name: _command(name) for name in fleet.LISTS}
    return {**found, "watch": _watch, "scan": _scan, **{name: _example(name) for name in EXAMPLES}}


def _command(name: str) -> Program:
    def run(target: Target) -> Said:
        listed = whole(Libvmi.over(target), fleet.LISTS[name])
        return Said([astuple(entry) for entry in listed.entries], tuple(listed.damage))

    return run


def _watch(target: Target) -> Said:
    sight = changes.look(Libvmi.over(target))
    shown = sorted(sight.tasks), sight.users
    return Said(shown, tuple(sight.damage), (sorted(sight.deleted), sight.unlisted))


def _scan(target: Target) -> Said:
    seen = Scan(target).look()
    found = [(each.id, each.subject, each.pid) for each in seen.findings]
    return Said((list(seen.looked), list(seen.unchecked)), tuple(seen.damage), found)


def _example(name: str) -> Program:
    for folder in (ROOT / "compat", ROOT / "compat" / "ids"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    program, report = importlib.import_module(name), importlib.import_module("report")
    layout, linux = importlib.import_module("layout"), importlib.import_module("linux")

    def run(target: Target) -> Said:
        vmi = Libvmi.over(target)
        guest = linux.Linux(vmi, layout.Layout(vmi))
        listing, findings = report.sought(vmi, guest, lambda guest: program.look(guest, *EXAMPLES[name]))
        return Said(listing, tuple(guest.damage), findings)

    return run
