#!/usr/bin/env python3
"""Find processes of a Linux guest whose credentials were raised.

The kernel gives every process its own credentials. Two processes with the same struct cred, or a program with the
kernel's own (init_cred), mean that a pointer was overwritten. A process gets root's uid from its parent or from a
set-uid file: if its parent or session belongs to another user, it got root in another way. Daemons that give up root
after they start a root child are reported too; exclude them with --allow. A thread with credentials of its own is
checked as a process is.
"""

import sys

import report
from linux import S_ISUID, Damaged

DEEPEST = 1000


def look(guest, allowed):
    users = []
    for task in guest.tasks():
        with guest.marking(f"the process at {task:#x}"):
            users += guest.users(task)
    init_cred = guest.needed("init_cred")
    sharing = {}
    for process in users:
        sharing.setdefault(process.cred, set()).add(process.pid)
    findings, reported = [], set()
    for process in users:
        if process.cred is None or (process.pid, process.cred) in reported:
            continue  # threads of a process may share credentials among them
        reported.add((process.pid, process.cred))
        others = sorted(sharing[process.cred] - {process.pid})
        if process.mm and process.cred == init_cred:
            findings.append(found(process, "kernel's credentials", "has the kernel's own credentials, init_cred"))
        elif others and process.cred != init_cred:
            findings.append(found(process, "shared credentials", f"has the same struct cred as {others}"))
        elif process.mm and process.euid == 0 and process.comm not in allowed:
            whose = ""
            with guest.marking(f"what made {process.pid} {process.comm} root's"):
                whose = unexplained(guest, process)
            if whose:
                findings.append(found(process, "raised", f"is root's, but its {whose}"))
    return [], findings


def unexplained(guest, process):
    """The user of a root process's parent or session, if it is not root and no set-uid file explains it."""
    if is_set_uid(guest, process):
        return ""
    parent = known(guest.process(known(process).parent))
    if parent.uid != 0:
        return f"parent {parent.pid} {parent.comm} is of uid {parent.uid}"
    task = guest.session_leader(process.task)
    leader = known(guest.process(task)) if task else process
    if leader.uid == 0:
        return ""
    for _ in range(DEEPEST):
        # Up to where root's uid comes from.
        if parent.uid != 0 or is_set_uid(guest, parent):
            return ""
        if parent.task in (leader.task, parent.parent):
            break
        parent = known(guest.process(parent.parent))
    return f"session's leader {leader.pid} {leader.comm} is of uid {leader.uid}"


def known(process):
    """The same. :raises Damaged: its user or its parent cannot be read"""
    if process.uid is None or process.parent is None:
        raise Damaged(f"{process.pid} {process.comm} cannot be read")
    return process


def is_set_uid(guest, process):
    """Whether it runs a set-uid file that root owns."""
    file = guest.executable(process.task)
    if not file:
        return False
    inode = guest.inode(file)
    return bool(guest.mode(inode) & S_ISUID) and guest.number(inode + guest.layout["inode i_uid"]) == 0


def found(process, kind, words):
    return {
        "finding": f"{process.pid} {process.comm} {words}",
        "kind": kind,
        "pid": process.pid,
        "comm": process.comm,
        "uid": process.uid,
    }


def main():
    parser = report.parser(__doc__)
    parser.add_argument(
        "--allow", metavar="COMM", action="append", default=[], help="a process name that may be root; may be repeated"
    )
    arguments = parser.parse_args()
    return report.run(arguments, lambda guest: look(guest, arguments.allow))


if __name__ == "__main__":
    sys.exit(main())
