"""What workers of a cluster saw of a guest: it arrives as it was, whole or as a difference; all else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.guests.domains import Domain
from vmishim.inspection.changes import Key, Sight, module_key, socket_key, task_key
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.watching import held
from vmishim.watching.held import MARK, NUMBER
from vmishim.watching.session import Cost, Seen
from vmishim.watching.sights import decode, encode
from vmishim.watching.workers_client import chosen

TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
SMALL = st.integers(0, 3)
WIDE = st.integers(0, 2**64 - 1)
TASKS = st.builds(Task, SMALL, SMALL, st.none() | WIDE, st.none() | WIDE, TEXT, st.just("running"), SMALL, TEXT)
MODULES = st.builds(Module, st.sampled_from(["a", "b"]), WIDE, st.just("live"), WIDE, SMALL, TEXT)
SOCKETS = st.builds(
    Socket,
    st.sampled_from([4, 6]),
    TEXT,
    SMALL,
    TEXT,
    SMALL,
    st.just("listen"),
    WIDE,
    SMALL,
    SMALL,
    SMALL,
    TEXT,
    WIDE,
    TEXT,
)


@st.composite
def sights(draw: st.DrawFn) -> Sight:
    tasks = {task_key(each): each for each in draw(st.lists(TASKS, max_size=4))}
    keys = sorted(tasks)
    return Sight(
        tasks,
        {module_key(each): each for each in draw(st.lists(MODULES, max_size=3))},
        {socket_key(each): each for each in draw(st.lists(SOCKETS, max_size=3))},
        frozenset(key for key in keys if draw(st.booleans())),
        {(name, 7): name for name in draw(st.lists(st.sampled_from(["evil", "x"]), max_size=2))},
        {key: frozenset(draw(st.sets(SMALL))) for key in keys},
        draw(st.lists(TEXT, max_size=2)),
    )


@given(st.none() | sights(), sights())
def test_a_look_arrives_as_it_was(before: Sight | None, now: Sight) -> None:
    seen = Seen(now, renewed=True, boot="b", release="6.1", cost=Cost(1, 2, 3, 0.25))
    assert decode(before, encode(before, seen)) == seen


@given(sights())
def test_an_unchanged_guest_is_one_line(now: Sight) -> None:
    same = replace(now, unlisted={}, damage=[])
    assert encode(same, Seen(same)).count(b"\n") == 1


def test_a_look_that_failed_arrives_as_it_was() -> None:
    seen = Seen(None, "nothing answered", answered=False, boot="b")
    assert decode(None, encode(None, seen)) == seen


TASK = Task(1, 1, 0, 0, "init", "sleeping", 7)
HEAD = encode(None, Seen(Sight()))
DIFFERS = encode(Sight(), Seen(Sight()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}\n",
        b"[]\n",
        HEAD.replace(b"true", b"1"),
        HEAD.replace(b'""', b"7", 1),
        DIFFERS,
        HEAD + b"7\n",
        HEAD + b'["gone","task",1,7]\n',
        HEAD + b'["gone","task",[1],7]\n',
        HEAD + b'["task",1,1,0,0,"init","sleeping",7,"",[0],1]\n',
        HEAD + b'["task",1,1,0,0,"init","sleeping",7,"",[-1],false]\n',
        HEAD + b'["task",1,1,0,0,"init","sleeping",-7,"",[0],false]\n',
        HEAD + b'["module",1]\n',
        HEAD + b'["unlisted","x",-1]\n',
        HEAD + b'["damage",1]\n',
        HEAD + b'["damage","x"]\n' * 200,
        HEAD + b"[" * 8000,
        HEAD + b" " * 9000 + b"[]\n",
        encode(None, Seen(None, "x")).replace(b"false,0", b"true,0"),
    ],
)
def test_what_is_no_look_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^line \d+ of the worker's answer is malformed$"):
        decode(None, data)


@given(st.binary() | st.binary().map(lambda data: HEAD + data))
def test_any_bytes_are_a_look_or_refused(data: bytes) -> None:
    try:
        seen = decode(None, data)
    except ValueError:
        return
    assert seen.sight is None or all(type(task) is Task for task in seen.sight.tasks.values())


def test_a_worker_that_claims_endless_lists_is_not_believed() -> None:
    line = json.dumps(["module", "a", 1, "live", 2, 3, ""])
    endless = "".join(line.replace("3", str(number)) + "\n" for number in range(200_002))
    seen = decode(None, HEAD + endless.encode())
    assert (seen.sight, seen.problem) == (None, "they have more than the 200,000 entries that are kept of a guest")


class Script:
    """A session whose looks the test decides."""

    coming: list[Seen] = []

    def __init__(self, *_: Any) -> None:
        self.closed = 0

    def look(self) -> Seen:
        return Script.coming.pop(0)

    def close(self) -> None:
        self.closed += 1


def test_a_worker_sends_a_difference_only_from_the_look_that_the_client_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "Session", Script)
    monkeypatch.setattr(held, "_held", {})
    guest = Domain("web-1", agent="ipc:///nowhere")
    key: Key = task_key(TASK)
    full = Sight(tasks={key: TASK}, users={key: frozenset([0])}, damage=[])
    Script.coming = [Seen(full), Seen(full), Seen(full), Seen(None, "torn"), Seen(full)]
    first = held.look(guest, (), b"")
    name = first[1 : 1 + NUMBER]
    assert first[:1] == MARK
    assert decode(None, first[1 + NUMBER :]).sight == full
    second = held.look(guest, (), name)
    assert second[1 + NUMBER :].count(b"\n") == 1
    assert decode(full, second[1 + NUMBER :]).sight == full
    lost = held.look(guest, (), name)  # the answer before was lost: the client has the first look still
    assert decode(None, lost[1 + NUMBER :]).sight == full
    assert decode(None, held.look(guest, (), lost[1 : 1 + NUMBER])[1 + NUMBER :]).problem == "torn"
    assert decode(None, held.look(guest, (), b"")[1 + NUMBER :]).sight == full


def test_a_worker_closes_sessions_that_moved_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "Session", Script)
    monkeypatch.setattr(held, "_held", {})
    Script.coming = [Seen(Sight())] * 3
    held.look(Domain("web-1", agent="ipc:///nowhere"), (), b"")
    first: Any = held._held["web-1"].session
    held.look(Domain("web-1", agent="ipc:///elsewhere"), (), b"")
    second: Any = held._held["web-1"].session
    assert (first.closed, second.closed) == (1, 0)
    held._held["web-1"].used -= held.KEPT_OPEN + 1
    held.look(Domain("web-2", agent="ipc:///nowhere"), (), b"")
    assert (second.closed, list(held._held)) == (1, ["web-2"])


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6, unique=True), st.integers(0, 5))
def test_only_the_guests_of_a_worker_that_goes_move(workers: list[str], number: int) -> None:
    gone = workers[number % len(workers)]
    left = [worker for worker in workers if worker != gone]
    for guest in map(str, range(30)):
        before = chosen(guest, workers)
        assert before == gone or chosen(guest, left) == before
        assert chosen(guest, list(reversed(workers))) == before
    assert chosen("web-1", []) == ""
