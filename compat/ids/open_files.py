#!/usr/bin/env python3
"""List the open files of a Linux guest's processes. Reports programs whose file is in no folder any more."""

import sys

import report
from linux import BROKEN, Damaged


def look(guest, programs_only):
    listing, findings = [], []
    for task in guest.tasks():
        with guest.marking(f"open files of {guest.whose(task)}"):
            for entry in () if programs_only else opened(guest, task):
                listing.append(entry)
        with guest.marking(f"the program of {guest.whose(task)}"):
            findings += program(guest, task)
    return listing, findings


def opened(guest, task):
    pid, comm = (
        guest.number(task + guest.layout["task_struct tgid"]),
        guest.text(task + guest.layout["task_struct comm"], 16),
    )
    broken = 0
    for thread, number, file in guest.files(task):
        tid = guest.number(thread + guest.layout["task_struct pid"])
        entry = {"pid": pid, "tid": tid, "comm": comm, "fd": number, "path": None, "deleted": None}
        with guest.marking(f"descriptor {number} of {pid} {comm}"):
            entry["path"] = guest.path(file)
            entry["deleted"] = guest.is_deleted(file)
        yield entry
        broken += entry["path"] is None
        if broken == BROKEN:
            raise Damaged(f"{broken} of them are broken, and the rest was not read")


def program(guest, task):
    file = guest.executable(task)
    if not file or not guest.is_deleted(file):
        return []
    process, path = guest.process(task), guest.path(file)
    return [
        {
            "finding": f"{process.pid} {process.comm} runs {path}, which is deleted or was never in a folder",
            "kind": "deleted program",
            "pid": process.pid,
            "comm": process.comm,
            "path": path,
        }
    ]


def line(entry):
    path = "?" if entry["path"] is None else entry["path"]
    return f"{entry['pid']:>7} {entry['comm']:<16}{entry['fd']:>5}  {path}"


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--programs", action="store_true", help="only check the running programs, do not list files")
    arguments = parser.parse_args()
    return report.run(arguments, lambda guest: look(guest, arguments.programs), line)


if __name__ == "__main__":
    sys.exit(main())
