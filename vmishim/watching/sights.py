"""What a worker saw of a guest, as plain bytes: what differs from a look that the receiver has, or all of it. Pure.

One line of JSON for each entry. The receiver believes nothing: each field has its type and bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from io import BytesIO
from typing import Any

from vmishim.errors import LibvmiError
from vmishim.inspection.changes import Key, Sight, module_key, socket_key, task_key
from vmishim.inspection.cluster import ERROR_MAX, LINE_MAX, TEXT_MAX, checked
from vmishim.inspection.lists import MARKS_MAX
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.watching.session import ENTRIES_MAX, Cost, Seen

USERS_MAX = 500
"""Users of one process's threads that are told."""

Lines = Iterator[list[Any]]


def encode(before: Sight | None, seen: Seen) -> bytes:
    """What was seen.

    :param before: the look that the receiver has; None for none
    """
    cost = [seen.cost.requests, seen.cost.sent, seen.cost.received, round(1e6 * seen.cost.seconds)]
    texts = [seen.problem[:ERROR_MAX], seen.boot[:TEXT_MAX], seen.release[:TEXT_MAX]]
    head = [*texts, seen.answered, seen.renewed, before is not None, seen.sight is not None, *cost]
    lines = [head, *(_lines(before or Sight(), seen.sight) if seen.sight is not None else ())]
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def _lines(before: Sight, now: Sight) -> Lines:
    yield from (["gone", "task", *key] for key in before.tasks if key not in now.tasks)
    yield from (["gone", "module", *key] for key in before.modules if key not in now.modules)
    yield from (["gone", "socket", *key] for key in before.sockets if key not in now.sockets)
    for key, task in now.tasks.items():
        if _told(before, key) != (told := _told(now, key)):
            yield ["task", *astuple(task), *told[1:]]
    for name, were, are in (("module", before.modules, now.modules), ("socket", before.sockets, now.sockets)):
        same: Mapping[Key, Any] = were
        for key, entry in are.items():
            if same.get(key) != entry:
                yield [name, *astuple(entry)]
    yield from (["unlisted", name, key[1]] for key, name in now.unlisted.items())
    yield from (["damage", mark[:ERROR_MAX]] for mark in now.damage)


def _told(sight: Sight, key: Key) -> tuple[Task | None, list[int], bool]:
    """What is told of a process: itself, the users of its threads, and whether its executable is deleted."""
    return sight.tasks.get(key), sorted(sight.users.get(key, ()))[:USERS_MAX], key in sight.deleted


def decode(before: Sight | None, data: bytes) -> Seen:
    """What `encode` was given, from bytes that a worker sent.

    :param before: the look that the worker was told the receiver has
    :raises ValueError: they are malformed; the text says where
    """
    lines = BytesIO(data)
    number = 1
    try:
        seen, differs = _head(_line(lines))
        if seen.sight is None:
            return seen
        if differs and before is None:
            raise ValueError
        into = _Copy(before if differs and before is not None else Sight())
        while line := lines.readline(LINE_MAX):
            number += 1
            into.take(json.loads(line))
        return replace(seen, sight=into.sight())
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"line {number} of the worker's answer is malformed") from None
    except LibvmiError as error:
        return replace(seen, sight=None, problem=str(error))


def _line(lines: BytesIO) -> list[Any]:
    values = json.loads(lines.readline(LINE_MAX))
    if type(values) is not list:
        raise ValueError
    return values


def _head(values: list[Any]) -> tuple[Seen, bool]:
    texts, flags, cost = values[:3], values[3:7], values[7:]
    if not all(type(text) is str and len(text) <= max(ERROR_MAX, TEXT_MAX) for text in texts):
        raise ValueError
    if not all(type(flag) is bool for flag in flags) or len(cost) != 4:
        raise ValueError
    if not all(type(each) is int and 0 <= each < 1 << 63 for each in cost):
        raise ValueError
    problem, boot, release = texts
    answered, renewed, differs, there = flags
    if there and (problem or not answered):
        raise ValueError
    spent = Cost(cost[0], cost[1], cost[2], cost[3] / 1e6)
    return Seen(Sight() if there else None, problem, answered, renewed, boot, release, spent), differs


class _Copy:
    """A sight that is being put together."""

    def __init__(self, before: Sight) -> None:
        self.tasks, self.modules = dict(before.tasks), dict(before.modules)
        self.sockets, self.users = dict(before.sockets), dict(before.users)
        self.deleted = set(before.deleted)
        self.unlisted: dict[Key, str] = {}
        self.damage: list[str] = []

    def take(self, values: Any) -> None:
        """Take in one line. :raises ValueError: it is malformed. :raises LibvmiError: there are too many"""
        match values:
            case ["gone", "task", *key]:
                self._gone(self.tasks, key)
                self.users.pop(tuple(key), None)
                self.deleted.discard(tuple(key))
            case ["gone", "module", *key]:
                self._gone(self.modules, key)
            case ["gone", "socket", *key]:
                self._gone(self.sockets, key)
            case ["task", *fields, list(users), bool(deleted)]:
                task = checked(Task, fields)
                if len(users) > USERS_MAX or not all(type(uid) is int and 0 <= uid < 1 << 32 for uid in users):
                    raise ValueError
                assert isinstance(task, Task)
                key_ = task_key(task)
                self.tasks[key_], self.users[key_] = task, frozenset(users)
                (self.deleted.add if deleted else self.deleted.discard)(key_)
            case ["module", *fields]:
                module = checked(Module, fields)
                assert isinstance(module, Module)
                self.modules[module_key(module)] = module
            case ["socket", *fields]:
                socket = checked(Socket, fields)
                assert isinstance(socket, Socket)
                self.sockets[socket_key(socket)] = socket
            case ["unlisted", str(name), int(address)] if len(name) <= TEXT_MAX and 0 <= address < 1 << 64:
                self.unlisted[name, address] = name
            case ["damage", str(mark)] if len(mark) <= ERROR_MAX and len(self.damage) <= MARKS_MAX:
                self.damage.append(mark)
            case _:
                raise ValueError
        held = len(self.tasks) + len(self.modules) + len(self.sockets) + len(self.unlisted)
        if held > ENTRIES_MAX:
            raise LibvmiError(f"they have more than the {ENTRIES_MAX:,} entries that are kept of a guest")

    @staticmethod
    def _gone(entries: dict[Key, Any], key: list[Any]) -> None:
        """:raises ValueError: there was none"""
        try:
            del entries[tuple(key)]
        except KeyError:
            raise ValueError from None

    def sight(self) -> Sight:
        return Sight(
            self.tasks,
            self.modules,
            self.sockets,
            frozenset(self.deleted),
            self.unlisted,
            {key: self.users.get(key, frozenset()) for key in self.tasks},
            self.damage,
        )
