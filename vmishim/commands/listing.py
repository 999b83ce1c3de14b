"""``vmishim ps``, ``lsmod`` and ``ss``: the guest kernel's lists, for people and for programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vmishim import lists
from vmishim.commands.guests import libvmi
from vmishim.commands.tables import dump, show, watched
from vmishim.libvmi import pause
from vmishim.lists import Module, Socket, Task


def ps(options: argparse.Namespace) -> int:
    """List processes. :raises LibvmiError: they can't be read"""
    with libvmi(options) as vmi, pause(vmi):
        tasks = list(watched(lists.tasks(vmi), "processes"))
    if options.json:
        dump([_plain(task) for task in tasks])
    elif options.tree:
        rows = ((task.pid, task.uid, task.state, branch + task.comm) for branch, task in tree(tasks))
        show(("PID", "UID", "STATE", "NAME"), rows)
    else:
        flat = ((task.pid, task.ppid, task.uid, task.state, f"{task.address:x}", task.comm) for task in tasks)
        show(("PID", "PPID", "UID", "STATE", "-TASK_STRUCT", "NAME"), flat)
    return 0


def lsmod(options: argparse.Namespace) -> int:
    """List modules. :raises LibvmiError: they can't be read"""
    with libvmi(options) as vmi, pause(vmi):
        modules = list(watched(lists.modules(vmi), "modules"))
        release = vmi.vmi.profile.release
    if options.json:
        dump([_plain(module) for module in modules])
    elif modules:
        rows = ((each.size, each.state, f"{each.base:x}", f"{each.address:x}", each.name) for each in modules)
        show(("SIZE", "STATE", "-CODE", "-STRUCT MODULE", "NAME"), rows)
    else:
        print(f"Linux {release} has no modules loaded", file=sys.stderr)
    return 0


def ss(options: argparse.Namespace) -> int:
    """List TCP sockets. :raises LibvmiError: they can't be read"""
    with libvmi(options) as vmi, pause(vmi):
        sockets = list(watched(lists.sockets(vmi), "sockets"))
    if options.json:
        dump([_plain(socket) for socket in sockets])
    else:
        rows = ((each.state, *ends(each), each.uid, each.inode, each.namespace, owner(each)) for each in sockets)
        show(("STATE", "LOCAL", "REMOTE", "UID", "-INODE", "-NETNS", "OWNER"), rows)
    return 0


def ends(socket: Socket) -> tuple[str, str]:
    """Both ends of a socket: ``127.0.0.1:22``, ``[::1]:22``; a star for a port that there is not."""
    made = []
    for address, port in ((socket.local, socket.local_port), (socket.remote, socket.remote_port)):
        made.append(f"{f'[{address}]' if ':' in address else address}:{port or '*'}")
    return made[0], made[1]


def owner(socket: Socket) -> str:
    """Whose it is, as people write it."""
    return f"{socket.comm} ({socket.pid})" if socket.pid else ""


def _plain(entry: Task | Module | Socket) -> dict[str, Any]:
    """As JSON, whose numbers are not safe beyond 2^53 in every reader: addresses are hex strings."""
    fields = asdict(entry)
    return fields | {name: f"{fields[name]:#x}" for name in ("address", "base") if name in fields}


def tree(tasks: Sequence[Task]) -> Iterator[tuple[str, Task]]:
    """Tasks below their parents, each with the branches to draw before it.

    Whatever the guest says: every task comes exactly once, also those whose parents are missing or go round in circles.
    """
    drawn = (sys.stdout.encoding or "").lower().startswith("utf")
    middle, last, beside, below = ("├─ ", "└─ ", "│  ", "   ") if drawn else ("|- ", "`- ", "|  ", "   ")
    known = {task.pid for task in tasks}
    children: dict[int, list[Task]] = {}
    roots = []
    for task in tasks:
        if task.ppid in known and task.ppid != task.pid:
            children.setdefault(task.ppid, []).append(task)
        else:
            roots.append(task)
    seen: set[int] = set()
    for root in (*roots, *tasks):
        # A stack, since the guest decides how deep this goes.
        waiting = [("", "", root)]
        while waiting:
            own, under, task = waiting.pop()
            if task.address in seen:
                continue
            seen.add(task.address)
            yield own, task
            below_it = children.get(task.pid, [])
            for number, child in enumerate(reversed(below_it)):
                end = number == 0
                waiting.append((under + (last if end else middle), under + (below if end else beside), child))
