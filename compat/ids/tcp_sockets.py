#!/usr/bin/env python3
"""List the TCP sockets of a Linux guest and the processes that have them open.

It reports listening or connected sockets that a process has open but that are missing from the kernel's tables, and
hooks in the functions that print /proc/net/tcp.
"""

import sys

import report
from linux import BROKEN, Damaged

SHOWN_BY = ("tcp4_seq_ops", "tcp6_seq_ops")
OPERATIONS = ("start", "stop", "next", "show")
"""Members of struct seq_operations, in their order."""
UNHASHED = ("CLOSE", "")


def look(guest):
    owners = {}
    for task in guest.tasks():
        with guest.marking(f"open files of {guest.whose(task)}"):
            broken = 0
            for _, number, file in guest.files(task):
                if broken == BROKEN:
                    raise Damaged(f"{broken} of them are broken, and the rest was not read")
                broken += 1
                with guest.marking(f"descriptor {number} of {guest.whose(task)}"):
                    sock = guest.socket_of(file)
                    broken -= 1
                    if sock:
                        owners.setdefault(sock, set()).add((task, number))
    hashed = dict.fromkeys(guest.hashed_sockets())
    listing, findings = [], []
    for sock in [*hashed, *(sock for sock in owners if sock not in hashed)]:
        socket = None
        with guest.marking(f"the socket at {sock:#x}"):
            socket = guest.socket(sock)
        if socket is None:
            continue
        if sock not in hashed and socket.state in UNHASHED:
            continue
        processes = {task: guest.process(task) for task, _ in owners.get(sock, ())}
        entry = {
            "state": socket.state,
            "local": socket.local,
            "remote": socket.remote,
            "owners": sorted(
                [processes[task].pid, processes[task].comm, number] for task, number in owners.get(sock, ())
            ),
        }
        listing.append(entry)
        if sock not in hashed:
            findings.append({"finding": f"hidden socket: {line(entry)}", "kind": "hidden socket", **entry})
    return listing, findings + hooks(guest)


def hooks(guest):
    found = []
    for table in SHOWN_BY:
        address = guest.symbol(table)
        # If IPv6 is a module, its code is outside the kernel's own.
        if address is None or not guest.needed("_stext") <= address < guest.needed("_end"):
            continue
        for name, target in zip(OPERATIONS, guest.words(address, len(OPERATIONS)), strict=True):
            if not guest.is_text(target):
                found.append(
                    {
                        "finding": f"{table}.{name} leads out of the kernel's code, to {target:#x}",
                        "kind": "hook",
                        "table": table,
                        "entry": name,
                        "address": target,
                    }
                )
    return found


def line(entry):
    owners = ", ".join(f"{comm} ({pid}, fd {number})" for pid, comm, number in entry["owners"])
    return f"{entry['state']:<12} {entry['local']:<24} {entry['remote']:<24} {owners or '-'}"


def main():
    return report.run(report.parser(__doc__).parse_args(), look, line)


if __name__ == "__main__":
    sys.exit(main())
