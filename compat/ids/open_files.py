#!/usr/bin/env python3
"""List the open files of a Linux guest's processes. Reports programs whose file is in no folder any more."""

import sys

import report


def look(guest, programs_only):
    listing, findings = [], []
    for task in guest.tasks():
        process = guest.process(task)
        for number, file in () if programs_only else guest.files(task):
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
    parser = report.parser(__doc__)
    parser.add_argument("--programs", action="store_true", help="only check the running programs, do not list files")
    arguments = parser.parse_args()
    return report.run(arguments, lambda guest: look(guest, arguments.programs), line)


if __name__ == "__main__":
    sys.exit(main())
