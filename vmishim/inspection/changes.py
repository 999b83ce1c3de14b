"""What changed in a guest between two looks at its lists, and what is suspicious. Pure, except for `look`.

A finding is a hint, not a verdict: an updated daemon runs a deleted executable too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vmishim.inspection import objects
from vmishim.inspection.lists import Damage, whole
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.libvmi import Libvmi

Kind = Literal["process", "module", "socket"]
Key = tuple[int | str, ...]

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


def look(vmi: Libvmi) -> Sight:
    """Read all lists within one hold. What cannot be read of them is in `Sight.damage`.

    :raises LibvmiError: they can't be read
    :raises LinkError: the guest could not be reached
    """
    seen = whole(vmi, _look)
    sight, damage = seen.entries[0], seen.damage
    return replace(sight, damage=damage)


def _look(vmi: Libvmi, damage: Damage) -> Iterator[Sight]:
    tasks = {_task(task): task for task in objects.tasks(vmi, damage)}
    users: dict[int, set[int]] = {}
    for task in (*tasks.values(), *objects.other_users(vmi, damage)):
        if task.uid is not None:
            users.setdefault(task.tgid, set()).add(task.uid)
    yield Sight(
        tasks=tasks,
        modules={(module.name, module.address): module for module in objects.modules(vmi, damage)},
        # Sockets that no process has open (any more, or yet) come and go by themselves.
        sockets={_socket(each): each for each in objects.sockets(vmi, damage) if each.inode != 0},
        deleted=frozenset(_task(task) for task in objects.without_file(vmi, damage)),
        unlisted={(name, address): name for name, address in objects.unlisted_modules(vmi, damage)},
        users={key: frozenset(users.get(task.tgid, ())) for key, task in tasks.items()},
    )


def _task(task: Task) -> Key:
    # Process numbers are reused, and so is the memory of a task, but hardly both at once.
    return task.pid, task.address


def _socket(each: Socket) -> Key:
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
    yield from (Event("!", "process", described(now.tasks[key]), DELETED) for key in now.tasks if key in now.deleted)
    yield from (Event("!", "module", name, UNLISTED) for name in now.unlisted.values())


def changes(before: Sight, now: Sight) -> Iterator[Event]:
    """What changed from one look to the next: first what is gone, then what is new."""
    were, are = _names(before), _names(now)
    hid, hide = set(before.unlisted.values()), set(now.unlisted.values())
    for key, task in before.tasks.items():
        if key not in now.tasks:
            yield Event("-", "process", described(task))
    yield from (Event("-", "module", name) for name in were if name not in are)
    for key, socket in before.sockets.items():
        if key not in now.sockets:
            yield Event("-", "socket", described(socket))
    for key, task in now.tasks.items():
        found = DELETED if key in now.deleted and key not in before.deleted else ""
        if key not in before.tasks:
            yield Event("+", "process", described(task), found)
        else:
            if _became_root(before, now, key):
                found = "; ".join(filter(None, (BECAME_ROOT, found)))
            if found:
                yield Event("!", "process", described(task), found)
    for name in are:
        found = UNLISTED if name in hide and name not in hid else ""
        if name not in were:
            yield Event("+", "module", name, found)
        elif found:
            yield Event("!", "module", name, found)
    known = {_port(each) for each in before.sockets.values() if each.state == "listen"}
    for key, socket in now.sockets.items():
        if key not in before.sockets:
            fresh = socket.state == "listen" and _port(socket) not in known
            yield Event("+", "socket", described(socket), LISTENS if fresh else "")


def _port(socket: Socket) -> Key:
    return socket.namespace or 0, socket.local_port


def _became_root(before: Sight, now: Sight, key: Key) -> bool:
    """Whether a process has a thread that is root's and had none, or its leading thread became root's."""
    was, uids = before.tasks[key].uid, before.users.get(key, frozenset())
    return bool(was and now.tasks[key].uid == 0) or bool(uids and 0 not in uids and 0 in now.users.get(key, ()))


def _names(sight: Sight) -> dict[str, None]:
    """Names of all modules, listed or not."""
    return dict.fromkeys([*(module.name for module in sight.modules.values()), *sight.unlisted.values()])


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
