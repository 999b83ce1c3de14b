#!/usr/bin/env python3
"""Print the processes of a Linux guest as a tree. Reports processes whose parent is not in the list."""

import sys

import report


def look(guest):
    processes = {task: guest.process(task) for task in guest.tasks()}
    below = {}
    for process in processes.values():
        if process.parent != process.task:
            below.setdefault(process.parent, []).append(process)
    listing, findings = [], []
    tops = [process for process in processes.values() if process.parent == process.task]
    orphans = [process for parent, children in below.items() if parent not in processes for process in children]
    for process in orphans:
        pid = guest.number(process.parent + guest.layout["task_struct tgid"])
        findings.append(
            {
                "finding": f"{process.pid} {process.comm}: its parent, {pid}, is not in the list of tasks",
                "kind": "parent not listed",
                "pid": process.pid,
                "parent": pid,
            }
        )
    pending = [(process, 0) for process in reversed(tops + orphans)]
    while pending:
        process, depth = pending.pop()
        listing.append({"pid": process.pid, "comm": process.comm, "uid": process.uid, "depth": depth})
        pending += [(child, depth + 1) for child in reversed(below.get(process.task, []))]
    return listing, findings


def line(entry):
    return f"{entry['pid']:>7} {entry['uid']:>6}  {'  ' * entry['depth']}{entry['comm']}"


def main():
    return report.run(report.parser(__doc__).parse_args(), look, line)


if __name__ == "__main__":
    sys.exit(main())
