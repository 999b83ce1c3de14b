#!/usr/bin/env python3
"""List the open files of a Linux guest's processes. Found are programs that run from a file no folder has any more."""

import sys

import report


def look(guest):
    listing, findings = [], []
    for task in guest.tasks():
        process = guest.process(task)
        for number, file in guest.files(task):
            entry = {"pid": process.pid, "comm": process.comm, "fd": number, "path": guest.path(file)}
            listing.append({**entry, "deleted": guest.is_deleted(file)})
        file = guest.executable(task)
        if file and guest.is_deleted(file):
            path = guest.path(file)
            findings.append(
                {
                    "finding": f"{process.pid} {process.comm} runs {path}, which is deleted or was never in a folder",
                    "kind": "deleted program",
                    "pid": process.pid,
                    "comm": process.comm,
                    "path": path,
                }
            )
    return listing, findings


def line(entry):
    return f"{entry['pid']:>7} {entry['comm']:<16}{entry['fd']:>5}  {entry['path']}"


def main():
    return report.run(report.parser(__doc__).parse_args(), look, line)


if __name__ == "__main__":
    sys.exit(main())
