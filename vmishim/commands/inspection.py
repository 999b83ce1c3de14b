"""``vmishim ps``, ``lsmod`` and ``ss``: the guest kernel's lists, for people and for programs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmishim.commands import CommandError
from vmishim.commands.guests import libvmi
from vmishim.foreign import printable
from vmishim.inspection import cluster, fleet, objects
from vmishim.inspection.changes import ends
from vmishim.inspection.fleet import Answer
from vmishim.inspection.lists import whole
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.output import dump, show, watched
from vmishim.plural import counted

PARTLY = 3
"""Exit status: what was read is printed, but not all could be read."""


@dataclass(frozen=True)
class Shape:
    """How a list is shown to people.

    :ivar what: what its entries are called, in the plural
    :ivar columns: titles; columns whose title begins with ``-`` may be left out
    :ivar row: gives an entry's cells
    """

    what: str
    columns: tuple[str, ...]
    row: Callable[[Any], tuple[Any, ...]]


SHAPES = {
    "ps": Shape(
        "processes",
        ("PID", "PPID", "UID", "STATE", "-TASK_STRUCT", "NAME"),
        lambda task: (task.pid, known(task.ppid), known(task.uid), task.state, f"{task.address:x}", task.comm),
    ),
    "threads": Shape(
        "threads",
        ("PID", "TID", "UID", "STATE", "-TASK_STRUCT", "NAME"),
        lambda task: (task.tgid, task.pid, known(task.uid), task.state, f"{task.address:x}", task.comm),
    ),
    "lsmod": Shape(
        "modules",
        ("SIZE", "STATE", "-CODE", "-STRUCT MODULE", "NAME"),
        lambda module: (module.size, module.state, f"{module.base:x}", f"{module.address:x}", module.name),
    ),
    "ss": Shape(
        "sockets",
        ("STATE", "LOCAL", "REMOTE", "UID", "-INODE", "-NETNS", "OWNER"),
        lambda each: (each.state, *ends(each), *map(known, (each.uid, each.inode, each.namespace)), owner(each)),
    ),
}


def ps(options: argparse.Namespace) -> int:
    """List processes. :raises LibvmiError: they can't be read"""
    if options.domains and options.tree:
        raise CommandError("--tree works with one guest only; leave out --tree or --domains")
    if options.threads and options.tree:
        raise CommandError("--tree shows processes; leave out --tree or --threads")
    if options.domains or not options.tree or options.json:
        return _list(options, "threads" if options.threads else "ps")
    with libvmi(options) as vmi:
        tasks, damage = whole(vmi, lambda vmi, damage: watched(objects.tasks(vmi, damage), "processes"))
    rows = ((task.pid, known(task.uid), task.state, branch + task.comm) for branch, task in tree(tasks))
    show(("PID", "UID", "STATE", "NAME"), rows)
    return _say(damage)


def lsmod(options: argparse.Namespace) -> int:
    """List modules. :raises LibvmiError: they can't be read"""
    return _list(options, "lsmod")


def ss(options: argparse.Namespace) -> int:
    """List TCP sockets. :raises LibvmiError: they can't be read"""
    return _list(options, "ss")


def _list(options: argparse.Namespace, name: str) -> int:
    if options.domains:
        return _lists(options, name)
    shape = SHAPES[name]
    with libvmi(options) as vmi:
        entries, damage = whole(vmi, lambda vmi, damage: watched(fleet.LISTS[name](vmi, damage), shape.what))
        release = vmi.vmi.profile.release
    if options.json:
        dump([_plain(entry) for entry in entries])
    elif entries:
        show(shape.columns, map(shape.row, entries))
    elif not damage:
        print(f"Linux {printable(release)} has no {shape.what}", file=sys.stderr)
    return _say(damage)


def _say(damage: Sequence[str], domain: str = "") -> int:
    """Say on standard error what could not be read. Returns the exit status."""
    for mark in damage:
        print(f"vmishim: {f'{domain}: ' if domain else ''}not read: {printable(mark)}", file=sys.stderr)
    return PARTLY if damage else 0


def _lists(options: argparse.Namespace, name: str) -> int:
    """The same for many guests: a table with a column for the guest, or one JSON object per line as they answer.
    Returns 1 if any guest could not be read, `PARTLY` if only part of one could.

    :raises CommandError: no guest's name matches
    """
    chosen = fleet.matching(options.domains)
    if not chosen:
        raise CommandError(f"no domain matches {options.domains!r}; list them with `vmishim domains`")
    shape, begun = SHAPES[name], time.monotonic()
    answers = {}
    asking = cluster.engine(options.engine, options.engine_tls)
    for answer in watched(asking(chosen, name, options.strategy, options.deadline), "guests"):
        answers[answer.domain] = answer
        if options.json:
            rows = [_plain(entry) for entry in answer.entries] if not answer.error else [{"error": answer.error}]
            rows += [{"damage": mark} for mark in answer.damage]
            for row in rows:
                print(json.dumps({"domain": answer.domain} | row), flush=True)
    failed = sum(bool(answer.error) for answer in answers.values())
    if not options.json:
        _show([answers[domain.name] for domain in chosen], shape)
    if options.stats or failed:
        told = f"{counted(len(answers), 'guest')}, {failed} not read" if failed else counted(len(answers), "guest")
        print(f"vmishim: {told}, {time.monotonic() - begun:.3f} s", file=sys.stderr)
    partly = [_say(answer.damage, answer.domain) for answer in answers.values()]
    return 1 if failed else max(partly)


def _show(answers: Sequence[Answer], shape: Shape) -> None:
    """One table of all guests that were read; the others' errors are below it, where they take no room from columns."""
    rows = [(answer.domain, *shape.row(entry)) for answer in answers if not answer.error for entry in answer.entries]
    if rows:
        show(("DOMAIN", *shape.columns), rows)
    for answer in answers:
        if answer.error:
            print(f"{printable(answer.domain)} not read: {printable(answer.error)}")


def owner(socket: Socket) -> str:
    """The socket's owner: ``NAME (PID)``; a question mark if not all open files could be searched."""
    if socket.pid is None:
        return "?"
    return f"{socket.comm} ({socket.pid})" if socket.pid else ""


def known(number: int | None) -> int | str:
    """A cell of a table: a question mark for what could not be read."""
    return "?" if number is None else number


def _plain(entry: Task | Module | Socket) -> dict[str, Any]:
    """For JSON. Not every JSON reader keeps numbers above 2^53, so addresses become hex strings."""
    fields = asdict(entry)
    return fields | {name: f"{fields[name]:#x}" for name in ("address", "base") if name in fields}


def tree(tasks: Sequence[Task]) -> Iterator[tuple[str, Task]]:
    """Tasks below their parents, each with the branches to draw before it.

    Every task is listed exactly once, even if the guest reports missing parents or cycles.
    """
    drawn = (sys.stdout.encoding or "").lower().startswith("utf")
    middle, last, beside, below = ("├─ ", "└─ ", "│  ", "   ") if drawn else ("|- ", "`- ", "|  ", "   ")
    listed = {task.pid for task in tasks}
    children: dict[int, list[Task]] = {}
    roots = []
    for task in tasks:
        if task.ppid is not None and task.ppid in listed and task.ppid != task.pid:
            children.setdefault(task.ppid, []).append(task)
        else:
            roots.append(task)
    seen: set[int] = set()
    for root in (*roots, *tasks):
        # A stack instead of recursion: the guest decides the depth.
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
