#!/usr/bin/env python3
"""Find modules of a Linux guest's kernel that one of its lists has and another lacks.

Compared are the list of modules (/proc/modules, lsmod), the kobjects behind /sys/module, and the tree in which the
kernel looks up whose code an address belongs to.
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
    # Of whatever state: a module that claims to be still loading, or never to have begun, is one way to hide.
    for module in sorted(set().union(*views.values())):
        lacking = [name for name, view in views.items() if module not in view]
        if lacking:
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
