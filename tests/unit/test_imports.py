"""Imports point down only, so that each part can be read, tested and shipped without those above it."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TABLE: dict[str, set[str]] = {
    # What both sides have.
    "vmishim.foreign": set(),
    "vmishim.errors": {"vmishim.foreign"},
    "vmishim.version": set(),
    "vmishim.ebpf_objects": {"vmishim.errors"},
    "vmishim.isolated": set(),
    "vmishim.endpoint": set(),
    "vmishim.plural": set(),
    "vmishim.files": set(),
    "vmishim.wire": {"vmishim.errors", "vmishim.foreign", "vmishim.files"},
    "vmishim.kernel": {"vmishim.errors", "vmishim.files"},
    # The guest's side.
    "guest_agent": set(),
    "guest_agent.sandbox": {"vmishim.errors"},
    "guest_agent.programs": {"vmishim.errors", "vmishim.kernel", "vmishim.wire"},
    "guest_agent.bytecode": {"guest_agent.programs", "vmishim.wire"},
    "guest_agent.loader": {
        *("guest_agent.bytecode", "guest_agent.programs", "guest_agent.sandbox", "guest_agent.steps"),
        *("vmishim.errors", "vmishim.wire"),
    },
    "guest_agent.steps": {"vmishim.errors", "vmishim.wire"},
    "guest_agent.injections": {"guest_agent.loader", "guest_agent.programs", "vmishim.wire"},
    "guest_agent.freezer": {"guest_agent.sandbox", "vmishim.errors"},
    "guest_agent.kernel": {"guest_agent.programs", "vmishim.ebpf_objects", "vmishim.kernel", "vmishim.wire"},
    "guest_agent.sealed": {
        *("guest_agent.kernel", "guest_agent.programs", "vmishim.ebpf_objects", "vmishim.errors", "vmishim.wire"),
    },
    "guest_agent.attestation": {"vmishim.wire"},
    "guest_agent.agent": {
        *("guest_agent.freezer", "guest_agent.injections", "guest_agent.kernel", "guest_agent.loader"),
        *("guest_agent.programs", "guest_agent.sealed", "vmishim.errors", "vmishim.version", "vmishim.wire"),
    },
    "guest_agent.connections": set(),
    "guest_agent.serve": {"guest_agent.connections", "vmishim.errors", "vmishim.wire"},
    "guest_agent.commands": {
        *("guest_agent.agent", "guest_agent.attestation", "guest_agent.freezer", "guest_agent.injections"),
        *("guest_agent.kernel", "guest_agent.loader", "guest_agent.sandbox", "guest_agent.sealed"),
        *("guest_agent.serve", "vmishim.errors", "vmishim.files", "vmishim.version", "vmishim.wire"),
    },
    # Only the standard library, until it has found out that the rest is there.
    "guest_agent.requirements": set(),
    "guest_agent.__main__": {
        *("guest_agent.commands", "guest_agent.requirements", "vmishim.errors", "vmishim.foreign", "vmishim.version"),
    },
    # The IDS's side.
    "vmishim.attestation": {"vmishim.errors", "vmishim.files", "vmishim.wire"},
    "vmishim.memory": {"vmishim.errors"},
    "vmishim.link": {"vmishim.endpoint", "vmishim.errors", "vmishim.wire"},
    "vmishim.client": {"vmishim.errors", "vmishim.memory", "vmishim.version", "vmishim.wire"},
    "vmishim.readahead": {"vmishim.client", "vmishim.errors", "vmishim.kernel", "vmishim.memory", "vmishim.wire"},
    "vmishim.guests": {
        *("vmishim.endpoint", "vmishim.foreign"),
        *("vmishim.attestation", "vmishim.client", "vmishim.errors", "vmishim.kernel", "vmishim.link"),
        *("vmishim.files", "vmishim.isolated", "vmishim.memory", "vmishim.readahead", "vmishim.wire"),
    },
    "vmishim.inject": {
        "vmishim.foreign",
        *("vmishim.errors", "vmishim.guests", "vmishim.isolated", "vmishim.kernel", "vmishim.memory", "vmishim.wire"),
    },
    "vmishim.libvmi": {
        *("vmishim.errors", "vmishim.files", "vmishim.guests", "vmishim.inject", "vmishim.kernel", "vmishim.memory"),
        "vmishim.endpoint",
    },
    "vmishim": {"vmishim.errors", "vmishim.libvmi", "vmishim.version"},
    "libvmi": {"vmishim.libvmi"},
    "vmishim.volatility": {
        *("vmishim.errors", "vmishim.files", "vmishim.guests", "vmishim.kernel", "vmishim.memory", "vmishim.wire"),
    },
    "vmishim.inspection": {
        *("vmishim.errors", "vmishim.files", "vmishim.guests", "vmishim.isolated", "vmishim.libvmi", "vmishim.memory"),
        "vmishim.kernel",
    },
    "vmishim.watching": {
        *("vmishim.errors", "vmishim.foreign", "vmishim.guests", "vmishim.inspection", "vmishim.libvmi"),
        *("vmishim.endpoint", "vmishim.isolated", "vmishim.link", "vmishim.plural", "vmishim.version"),
    },
    "vmishim.script": {"vmishim.errors", "vmishim.guests"},
    "vmishim.children": {"vmishim.script"},
    "vmishim.program": {"vmishim.errors", "vmishim.isolated", "vmishim.script"},
    "vmishim.capi": {
        *("vmishim.errors", "vmishim.foreign", "vmishim.libvmi", "vmishim.memory", "vmishim.script", "vmishim.version"),
    },
    "vmishim.output": {"vmishim.foreign"},
    "vmishim.compare": {
        *("vmishim.foreign", "vmishim.plural"),
        *("libvmi", "vmishim.errors", "vmishim.guests", "vmishim.libvmi"),
        *("vmishim.isolated", "vmishim.output", "vmishim.script", "vmishim.version"),
    },
    "vmishim.acquire": {
        *("vmishim.errors", "vmishim.files", "vmishim.guests", "vmishim.kernel", "vmishim.memory", "vmishim.version"),
        "vmishim.wire",
    },
    "vmishim.drgn": {
        *("vmishim.errors", "vmishim.guests", "vmishim.kernel", "vmishim.memory", "vmishim.wire"),
    },
    "vmishim.bundle": {"vmishim.ebpf_objects", "vmishim.files"},
    "vmishim.commands": {
        *("vmishim.acquire", "vmishim.drgn", "vmishim.foreign", "vmishim.memory", "vmishim.plural"),
        *("vmishim.attestation", "vmishim.bundle", "vmishim.compare", "vmishim.ebpf_objects", "vmishim.errors"),
        *("vmishim.guests", "vmishim.inject", "vmishim.inspection", "vmishim.libvmi", "vmishim.link", "vmishim.output"),
        *("vmishim.files", "vmishim.program", "vmishim.readahead", "vmishim.script", "vmishim.version", "vmishim.wire"),
        "vmishim.watching",
        "vmishim.volatility",
    },
    "vmishim.cli": {"vmishim.commands", "vmishim.errors", "vmishim.foreign", "vmishim.output", "vmishim.version"},
    # What is not shipped.
    "lab": {
        *("guest_agent.programs", "vmishim.bundle", "vmishim.commands", "vmishim.compare", "vmishim.errors"),
        *("vmishim.guests", "vmishim.isolated", "vmishim.script", "vmishim.wire"),
    },
    "bench": {
        *("guest_agent.__main__", "guest_agent.agent", "guest_agent.kernel", "lab", "libvmi", "vmishim.drgn"),
        "vmishim.errors",
        *("vmishim.guests", "vmishim.inspection", "vmishim.kernel", "vmishim.libvmi", "vmishim.readahead"),
        *("vmishim.volatility", "vmishim.wire"),
    },
    "trials": {
        *("bench", "guest_agent.agent", "guest_agent.kernel", "lab", "vmishim.attestation", "vmishim.client"),
        *("vmishim.errors", "vmishim.guests", "vmishim.inspection", "vmishim.kernel", "vmishim.libvmi"),
        *("vmishim.isolated", "vmishim.link", "vmishim.memory", "vmishim.wire"),
    },
}
"""What each package or module may import besides itself. A module belongs to the longest name here that is its own or
that of a package around it."""


def modules() -> dict[str, Path]:
    """Every module, by its name; the package ``compat/libvmi`` by the name under which it is imported."""
    found = {}
    for folder in ("vmishim", "guest_agent", "compat/libvmi", "lab", "bench", "trials"):
        above = (ROOT / folder).parent
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(above).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@cache
def imports(name: str, by_string: bool = True) -> frozenset[str]:
    """Everything that a module imports, wherever in it: in functions and for types too. Of ours, module by module.

    :param by_string: what it hands to ``import_module`` as well
    """
    found: set[str] = set()
    text = MODULES[name].read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{name}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys()
            if names - MODULES.keys():
                found.add(node.module)
    if by_string and "import_module" in text:
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        found |= {value for value in constants if isinstance(value, str) and "." in value} & MODULES.keys()
    return frozenset(found - {name})


def importers(name: str) -> set[str]:
    """The modules that are shipped and import a library."""
    shipped = (module for module in MODULES if top(module) in ("vmishim", "guest_agent", "libvmi"))
    return {module for module in shipped if name in map(top, imports(module))}


def top(name: str) -> str:
    return name.partition(".")[0]


def row(name: str) -> str:
    """The row of the table that a module belongs to."""
    while name not in TABLE:
        name, _, last = name.rpartition(".")
        assert last, "no row"
    return name


def used(of: str) -> dict[str, str]:
    """The rows that the modules of a row import, each with one import that shows it."""
    return {
        row(found): f"{name} imports {found}"
        for name in MODULES
        if row(name) == of
        for found in imports(name)
        if found in MODULES and row(found) != of
    }


def test_the_table_has_no_circle() -> None:
    assert set().union(*TABLE.values()) <= TABLE.keys()
    TopologicalSorter(TABLE).prepare()  # raises CycleError


def test_every_module_is_of_one_row_and_every_row_of_a_module() -> None:
    assert {row(name) for name in MODULES} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_row_imports_only_what_it_may(name: str) -> None:
    assert {shown for found, shown in used(name).items() if found not in TABLE[name]} == set()


@pytest.mark.parametrize("name", TABLE)
def test_a_row_may_import_nothing_that_it_does_not(name: str) -> None:
    assert TABLE[name] - used(name).keys() == set()


def test_modules_have_no_circle_within_their_row() -> None:
    TopologicalSorter({name: imports(name) & MODULES.keys() for name in MODULES}).prepare()  # raises CycleError


def test_each_side_has_one_module_that_imports_zmq() -> None:
    assert importers("zmq") == {"vmishim.link", "guest_agent.serve"}


def test_only_the_wire_touches_ciphers() -> None:
    beside = {name for name in importers("cryptography") if row(name) != "vmishim.wire"}
    # These verify signatures, and sign; they encrypt nothing.
    assert beside == {"vmishim.attestation.chain", "vmishim.acquire.signing"}


def test_the_wire_needs_the_standard_library_and_cryptography() -> None:
    needed = {top(found) for name in MODULES if row(name) == "vmishim.wire" for found in imports(name)}
    assert needed - sys.stdlib_module_names == {"cryptography", "vmishim"}
