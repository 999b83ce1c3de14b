"""Modules that are hidden, and what the kernel says taints it."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.inspection.checks.view import MODULE_NAME_MAX, OUT_OF_TREE, View
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.lists import ring
from vmishim.inspection.objects import MODULES_MAX

LISTED, OBJECTS, TREE = "the list of modules", "the objects of /sys/module", "the tree of modules' code"
TAINTS = {
    1: ("forced-module", Severity.MEDIUM, "a module was loaded by force"),
    3: ("forced-module", Severity.MEDIUM, "a module was removed by force"),
    12: ("foreign-module", Severity.LOW, "a module from outside the kernel's tree was loaded"),
    13: ("foreign-module", Severity.LOW, "a module without a valid signature was loaded"),
}
"""Bits of ``tainted_mask`` that speak for an attack (Documentation/admin-guide/tainted-kernels.rst). Warnings, staging
drivers and live patches taint a kernel too."""


def hidden_modules(view: View) -> Iterator[Finding]:
    """Modules, in any state, that are in one of the kernel's lists and missing from another."""
    views = {
        LISTED: {module.address for module in view.modules},
        OBJECTS: set(_with_object(view)),
        TREE: set(_in_tree(view)),
    }
    for module in sorted(set[int]().union(*views.values())):
        lacking = [name for name, found in views.items() if module not in found]
        if not lacking:
            continue
        name = "?"
        with view.marking(f"the name of the module at {module:#x}"):
            name = view.text(module + view.at("module name"), MODULE_NAME_MAX)
        yield Finding(
            "hidden-module",
            Severity.HIGH,
            name,
            f"the module {name} is missing from {' and '.join(lacking)}",
            f"{', '.join(each for each in views if each not in lacking)} with {', '.join(lacking)}",
            {"module": module},
            "what hooks lead to its code; a module that is being loaded or removed looks the same for a moment",
            "T1014",
        )


def _with_object(view: View) -> Iterator[int]:
    """Modules in the set of kobjects behind /sys/module, where built-in ones have no ``struct module``."""
    with view.marking(OBJECTS):
        head = view.pointer(view.symbol("module_kset")) + view.at("kset list")
        for kobject in ring(view.vmi, head, view.at("kobject entry"), MODULES_MAX, view.damage, OBJECTS):
            with view.marking(f"{OBJECTS}, {kobject:#x}"):
                module = view.field(kobject - view.at("module_kobject kobj"), "module_kobject mod")
                if module:
                    yield module


def _in_tree(view: View) -> Iterator[int]:
    """Modules in the tree in which the kernel looks up the module of a code address."""
    root = view.symbol("mod_tree") + view.at("mod_tree_root root") + view.at("latch_tree_root tree")
    link = view.at("mod_tree_node node") + view.at("latch_tree_node node")
    with view.marking(TREE):
        for node in view.rb_tree(view.pointer(root), TREE):
            with view.marking(f"{TREE}, {node:#x}"):
                yield view.field(node - link, "mod_tree_node mod")


def taint(view: View) -> Iterator[Finding]:
    """What was done to the kernel by its own account."""
    where = view.symbol("tainted_mask")
    mask = view.pointer(where)
    foreign = [module.name for module in view.modules if module.taints & OUT_OF_TREE]
    kinds: dict[str, tuple[Severity, list[str]]] = {}
    for bit, (kind, severity, words) in TAINTS.items():
        if mask >> bit & 1:
            kinds.setdefault(kind, (severity, []))[1].append(words)
    for kind, (severity, facts) in kinds.items():
        names, subject = "", "none is listed now"
        if kind == "foreign-module":
            subject = ", ".join(sorted(foreign)) or subject
            names = f"; listed now: {', '.join(foreign)}" if foreign else "; no such module is listed now"
        yield Finding(
            kind,
            severity,
            subject,
            f"{'; '.join(facts)}{names}",
            "tainted_mask, and the taints of the listed modules",
            {"tainted_mask": where},
            "dmesg, for which module it was; if none is listed now, it was removed, or hides",
            "T1547.006",
        )
