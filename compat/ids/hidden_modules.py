#!/usr/bin/env python3
"""Find modules of a Linux guest's kernel that are in one of its lists and missing from another.

It compares the list of modules (/proc/modules, lsmod), the kobjects behind /sys/module, and the tree in which the
kernel looks up the module of a code address.
"""

import sys

import report


def look(guest):
    views = {
        "the list of modules": set(guest.listed_modules()),
        "the set of kobjects": set(guest.kobject_modules()),
        "the tree of code": set(guest.tree_modules()),
    }
    findings = []
    # In any state: a module can hide by claiming that it is still loading or was never started.
    for module in sorted(set().union(*views.values())):
        lacking = [name for name, view in views.items() if module not in view]
        if lacking:
            name = "?"
            with guest.marking(f"the name of the module at {module:#x}"):
                name = guest.module_name(module)
            findings.append(
                {
                    "finding": f"hidden module {name} ({module:#x}): not in {', '.join(lacking)}",
                    "kind": "hidden module",
                    "name": name,
                    "lacking": lacking,
                }
            )
    return [], findings


def main():
    return report.run(report.parser(__doc__).parse_args(), look)


if __name__ == "__main__":
    sys.exit(main())
