#!/usr/bin/env python3
"""Find processes of a Linux guest that are in one of the kernel's lists and missing from another.

It compares the list of tasks, the table of pids (which /proc and kill use), and the lists of children. It also reports
threads that are missing from the list of their process.
"""

import sys

import report
from linux import PID, TGID


def look(guest):
    listed = set(guest.tasks())
    idle = guest.needed("init_task")
    born = {idle, *guest.descendants(idle)}
    threads, leaders = set(), {idle}
    for number, pid in guest.pids():
        with guest.marking(f"pid {number}"):
            threads.add(guest.task_of(pid, PID))
            leaders.add(guest.task_of(pid, TGID))
    leaders.discard(0)
    threads.discard(0)
    views = {"the list of tasks": listed, "the table of pids": leaders, "the lists of children": born}
    findings = []
    for task in sorted(listed | leaders | born):
        lacking = [name for name, view in views.items() if task not in view]
        if lacking:
            findings.append(found(guest, task, "hidden process", lacking))
    grouped = {thread for task in listed | leaders | born for thread in guest.threads(task)}
    for task in sorted(threads - grouped):
        findings.append(found(guest, task, "hidden thread", ["the list of its process's threads"]))
    return [], findings


def found(guest, task, kind, lacking):
    pid, comm = None, "?"
    with guest.marking(f"the {kind.removeprefix('hidden ')} at {task:#x}"):
        pid = guest.number(task + guest.layout["task_struct pid"])
        comm = guest.text(task + guest.layout["task_struct comm"], 16)
    return {
        "finding": f"{kind} {pid} {comm}: not in {', '.join(lacking)}",
        "kind": kind,
        "pid": pid,
        "comm": comm,
        "lacking": lacking,
    }


def main():
    return report.run(report.parser(__doc__).parse_args(), look)


if __name__ == "__main__":
    sys.exit(main())
