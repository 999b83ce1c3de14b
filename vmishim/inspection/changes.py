"""What changed in a guest between two looks at its lists, and what is suspicious. Pure, except for `look`.

A finding is a hint, not a verdict: an updated daemon runs a deleted executable too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from vmishim.inspection import objects
from vmishim.inspection.lists import Damage, whole
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.libvmi import Libvmi

Kind = Literal["process", "module", "socket", "agent", "guest"]
Key = tuple[int | str, ...]
LISTS = ("processes", "modules", "sockets")
"""What a look reads."""

DELETED = "its executable was deleted, or never was in a file system"
UNLISTED = "not in the module list, but in /sys/module"
BECAME_ROOT = "became root"
LISTENS = "listens on a port that had no listener before"


@dataclass(frozen=True)
class Sight:
    """The lists of one look, each entry under a key that stays the same while it exists.

    :ivar deleted: keys of processes whose executable is deleted
    :ivar unlisted: modules that are hidden from the module list, by name and address
    :ivar users: the real user ids of each process's threads
    :ivar damage: what could not be read
    """

    tasks: Mapping[Key, Task] = field(default_factory=dict)
    modules: Mapping[Key, Module] = field(default_factory=dict)
    sockets: Mapping[Key, Socket] = field(default_factory=dict)
    deleted: frozenset[Key] = frozenset()
    unlisted: Mapping[Key, str] = field(default_factory=dict)
    users: Mapping[Key, frozenset[int]] = field(default_factory=dict)
    damage: Sequence[str] = ()


@dataclass(frozen=True)
class Event:
    """An entry that is new (``+``), gone (``-``), or suspicious (``!``)."""

    sign: Literal["+", "-", "!"]
    kind: Kind
    text: str
    finding: str = ""
    entry: Task | Module | Socket | None = field(default=None, compare=False)
    """The entry itself; None for what has none, such as a lost agent."""


def look(vmi: Libvmi, lists: Collection[str] = LISTS) -> Sight:
    """Read lists within one hold. What cannot be read of them is in `Sight.damage`.

    :param lists: which, of `LISTS`; the others are empty
    :raises LibvmiError: they can't be read
    :raises LinkError: the guest could not be reached
    """
    seen = whole(vmi, partial(_look, lists))
    sight, damage = seen.entries[0], seen.damage
    return replace(sight, damage=damage)


def _look(lists: Collection[str], vmi: Libvmi, damage: Damage) -> Iterator[Sight]:
    processes, modules, sockets = (name in lists for name in LISTS)
    tasks = {task_key(task): task for task in objects.tasks(vmi, damage)} if processes else {}
    users: dict[int, set[int]] = {}
    for task in (*tasks.values(), *objects.other_users(vmi, damage)) if processes else ():
        if task.uid is not None:
            users.setdefault(task.tgid, set()).add(task.uid)
    yield Sight(
        tasks=tasks,
        modules={module_key(module): module for module in objects.modules(vmi, damage)} if modules else {},
        # Sockets that no process has open (any more, or yet) come and go by themselves.
        sockets={socket_key(each): each for each in objects.sockets(vmi, damage) if each.inode != 0} if sockets else {},
        deleted=frozenset(task_key(task) for task in (objects.without_file(vmi, damage) if processes else ())),
        unlisted={(name, address): name for name, address in objects.unlisted_modules(vmi, damage)} if modules else {},
        users={key: frozenset(users.get(task.tgid, ())) for key, task in tasks.items()},
    )


def task_key(task: Task) -> Key:
    """What a process is known by."""
    # Process numbers are reused, and so is the memory of a task, but hardly both at once.
    return task.pid, task.address


def module_key(module: Module) -> Key:
    """What a module is known by."""
    return module.name, module.address


def socket_key(each: Socket) -> Key:
    """What a socket is known by."""
    return (
        each.version,
        each.local,
        each.local_port,
        each.remote,
        each.remote_port,
        each.namespace or 0,
        each.inode or 0,
    )


def findings(now: Sight) -> Iterator[Event]:
    """What is suspicious at the first look at a guest."""
    yield from (
        Event("!", "process", described(now.tasks[key]), DELETED, now.tasks[key])
        for key in now.tasks
        if key in now.deleted
    )
    yield from (Event("!", "module", name, UNLISTED) for name in now.unlisted.values())


def changes(before: Sight, now: Sight) -> Iterator[Event]:
    """What changed from one look to the next: first what is gone, then what is new."""
    were, are = _names(before), _names(now)
    hid, hide = set(before.unlisted.values()), set(now.unlisted.values())
    for key, task in before.tasks.items():
        if key not in now.tasks:
            yield Event("-", "process", described(task), entry=task)
    yield from (Event("-", "module", name, entry=entry) for name, entry in were.items() if name not in are)
    for key, socket in before.sockets.items():
        if key not in now.sockets:
            yield Event("-", "socket", described(socket), entry=socket)
    for key, task in now.tasks.items():
        found = DELETED if key in now.deleted and key not in before.deleted else ""
        if key not in before.tasks:
            yield Event("+", "process", described(task), found, task)
        else:
            if _became_root(before, now, key):
                found = "; ".join(filter(None, (BECAME_ROOT, found)))
            if found:
                yield Event("!", "process", described(task), found, task)
    for name, entry in are.items():
        found = UNLISTED if name in hide and name not in hid else ""
        if name not in were:
            yield Event("+", "module", name, found, entry)
        elif found:
            yield Event("!", "module", name, found, entry)
    known = {_port(each) for each in before.sockets.values() if each.state == "listen"}
    for key, socket in now.sockets.items():
        if key not in before.sockets:
            fresh = socket.state == "listen" and _port(socket) not in known
            yield Event("+", "socket", described(socket), LISTENS if fresh else "", socket)


def _port(socket: Socket) -> Key:
    return socket.namespace or 0, socket.local_port


def _became_root(before: Sight, now: Sight, key: Key) -> bool:
    """Whether a process has a thread that is root's and had none, or its leading thread became root's."""
    was, uids = before.tasks[key].uid, before.users.get(key, frozenset())
    return bool(was and now.tasks[key].uid == 0) or bool(uids and 0 not in uids and 0 in now.users.get(key, ()))


def _names(sight: Sight) -> dict[str, Module | None]:
    """All modules by name, listed or not; None for those that are not."""
    listed: dict[str, Module | None] = {module.name: module for module in sight.modules.values()}
    return listed | {name: None for name in sight.unlisted.values() if name not in listed}


def described(entry: Task | Socket) -> str:
    """A process or a socket, described in a few words."""
    if isinstance(entry, Task):
        uid, parent = ("?" if each is None else each for each in (entry.uid, entry.ppid))
        return f"{entry.pid} {entry.comm}, uid {uid}, parent {parent}"
    owner = f", {entry.comm} ({entry.pid})" if entry.pid else ""
    local, remote = ends(entry)
    return f"{local} listen{owner}" if entry.state == "listen" else f"{local} - {remote}{owner}"


def ends(socket: Socket) -> tuple[str, str]:
    """Both ends of a socket: ``127.0.0.1:22``, ``[::1]:22``; a star if there is no port."""
    local, remote = (
        f"{f'[{address}]' if ':' in address else address}:{port or '*'}"
        for address, port in ((socket.local, socket.local_port), (socket.remote, socket.remote_port))
    )
    return local, remote
