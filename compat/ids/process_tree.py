#!/usr/bin/env python3
"""Print the processes of a Linux guest as a tree. Reports processes whose parent is not in the list."""

import sys

import report


def look(guest):
    processes = {}
    for task in guest.tasks():
        with guest.marking(f"the process at {task:#x}"):
            processes[task] = guest.process(task)
    below = {}
    for process in processes.values():
        if process.parent not in (process.task, None):
            below.setdefault(process.parent, []).append(process)
    listing, findings = [], []
    tops = [process for process in processes.values() if process.parent in (process.task, None)]
    orphans = [process for parent, children in below.items() if parent not in processes for process in children]
    for process in orphans:
        pid = None
        with guest.marking(f"the parent of {process.pid} {process.comm}"):
            pid = guest.number(process.parent + guest.layout["task_struct tgid"])
        findings.append(
            {
                "finding": f"{process.pid} {process.comm}: its parent, {pid}, is not in the list of tasks",
                "kind": "parent not listed",
                "pid": process.pid,
                "parent": pid,
            }
        )
    idle, listed = guest.needed("init_task"), set()
    for top in (*tops, *orphans, *processes.values()):
        if top.task in listed:
            continue
        if top.parent is not None and top.parent in processes and top.task != idle:
            guest.mark(f"real_parent of {top.pid} {top.comm}: it is its own ancestor")
        pending = [(top, 0)]
        while pending:
            process, depth = pending.pop()
            if process.task not in listed:
                listed.add(process.task)
                listing.append({"pid": process.pid, "comm": process.comm, "uid": process.uid, "depth": depth})
                pending += [(child, depth + 1) for child in reversed(below.get(process.task, []))]
    return listing, findings


def line(entry):
    uid = "?" if entry["uid"] is None else entry["uid"]
    return f"{entry['pid']:>7} {uid:>6}  {'  ' * entry['depth']}{entry['comm']}"


def main():
    return report.run(report.parser(__doc__).parse_args(), look, line)


if __name__ == "__main__":
    sys.exit(main())
