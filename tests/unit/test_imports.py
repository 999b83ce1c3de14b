"""Imports point one way, so that each part can be read, tested and shipped without those above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vmishim", "guest_agent", "compat/libvmi")


def modules() -> dict[str, Path]:
    """Every module we ship, by its name; the package ``libvmi`` by that."""
    found = {}
    for package in PACKAGES:
        folder = ROOT / package
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Names of what a file imports, anywhere in it; of ours down to the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            # "from package import module" needs the package's own __init__ too.
            yield node.module
            yield from names


def importers(name: str) -> set[str]:
    return {module for module, path in MODULES.items() if any(top(found) == name for found in imports(path))}


def top(name: str) -> str:
    return name.partition(".")[0]


def part(name: str) -> str:
    """Which layer a module belongs to."""
    if name in ("vmishim", "vmishim.errors"):
        return "ground"
    for layer in (
        "vmishim.wire",
        "vmishim.attestation",
        "vmishim.memory",
        "vmishim.kernel",
        "vmishim.readahead",
        "vmishim.commands",
        "guest_agent",
        "libvmi",
    ):
        if name == layer or name.startswith(f"{layer}."):
            return layer
    return name


ABOVE = {
    "ground": set[str](),
    "vmishim.wire": {"ground"},
    "vmishim.libvmi.constants": {"ground"},
    "vmishim.attestation": {"ground", "vmishim.wire"},
    "vmishim.kernel": {"ground", "vmishim.wire", "vmishim.libvmi.constants", "vmishim.memory"},
    "vmishim.memory": {"ground", "vmishim.wire", "vmishim.kernel"},
    "guest_agent": {"ground", "vmishim.wire", "vmishim.kernel"},
    "vmishim.link": {"ground", "vmishim.wire"},
    "libvmi": {"ground", "vmishim.libvmi", "vmishim.libvmi.constants", "vmishim.libvmi.event"},
}
"""What each layer may import, besides itself; the modules that are not here are the top, and free."""


@pytest.mark.parametrize("layer", ABOVE)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    below = {
        f"{name} imports {found}"
        for name, path in MODULES.items()
        if part(name) == layer
        for found in imports(path)
        if top(found) in ("vmishim", "guest_agent", "libvmi", "bench", "lab", "trials", "compat")
        if part(found) not in ABOVE[layer] | {layer}
    }
    assert below == set()


def test_each_side_has_one_module_that_imports_zmq() -> None:
    assert importers("zmq") == {"vmishim.link", "guest_agent.serve"}


def test_only_the_wire_touches_ciphers() -> None:
    beside = {name for name in importers("cryptography") if part(name) != "vmishim.wire"}
    assert beside == {"vmishim.attestation.chain"}  # which verifies signatures, and encrypts nothing


def test_the_wire_needs_the_standard_library_and_cryptography() -> None:
    needed = {top(found) for name, path in MODULES.items() if part(name) == "vmishim.wire" for found in imports(path)}
    assert needed - sys.stdlib_module_names == {"cryptography", "vmishim"}
