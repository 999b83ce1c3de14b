"""The events that a watch reports between two looks at a guest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vmishim.commands import watch
from vmishim.commands.watch import Screen, Watch, drawn
from vmishim.errors import LibvmiError, LinkError, RebootedError
from vmishim.inspection import changes
from vmishim.inspection.changes import Event, Sight
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.watching import session

SHELL = Task(7, 7, 1, 1000, "sh", "sleeping", 0xFFFF_8880_0000_7000)
LISTENER = Socket(4, "0.0.0.0", 22, "0.0.0.0", 0, "listen", 0, 50, 1, 7, "sshd", 0xFFFF_8880_0000_9000)
LINE = Socket(6, "::1", 22, "::1", 4000, "established", 0, 51, 1, 7, "sshd", 0xFFFF_8880_0000_A000)
MODULE = Module("loop", 4096, "live", 0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_C000_1000)
KEY = (7, SHELL.address)


def sight(*sockets: Socket, tasks: tuple[Task, ...] = (), modules: tuple[Module, ...] = (), **more: Any) -> Sight:
    return Sight(
        {(task.pid, task.address): task for task in tasks},
        {(module.name, module.address): module for module in modules},
        {(each.inode or 0,): each for each in sockets},
        **more,
    )


def seen(before: Sight, now: Sight) -> list[Event]:
    return list(changes.changes(before, now))


def test_an_unchanged_entry_is_no_event() -> None:
    same = sight(LISTENER, LINE, tasks=(SHELL,), modules=(MODULE,), deleted=frozenset([KEY]))
    assert seen(same, same) == []
    assert seen(same, sight(replace(LISTENER, state="close"), LINE, tasks=(replace(SHELL, state="running"),),
                            modules=(MODULE,), deleted=frozenset([KEY]))) == []  # fmt: skip


def test_new_and_gone_entries_are_events() -> None:
    all_of_it = sight(LISTENER, LINE, tasks=(SHELL,), modules=(MODULE,))
    assert seen(sight(), all_of_it) == [
        Event("+", "process", "7 sh, uid 1000, parent 1"),
        Event("+", "module", "loop"),
        Event("+", "socket", "0.0.0.0:22 listen, sshd (7)", changes.LISTENS),
        Event("+", "socket", "[::1]:22 - [::1]:4000, sshd (7)"),
    ]
    assert [(event.sign, event.text) for event in seen(all_of_it, sight())] == [
        ("-", "7 sh, uid 1000, parent 1"),
        ("-", "loop"),
        ("-", "0.0.0.0:22 listen, sshd (7)"),
        ("-", "[::1]:22 - [::1]:4000, sshd (7)"),
    ]


def test_a_reused_pid_is_another_process() -> None:
    other = replace(SHELL, address=SHELL.address + 0x4000)
    assert [event.sign for event in seen(sight(tasks=(SHELL,)), sight(tasks=(other,)))] == ["-", "+"]


@pytest.mark.parametrize(
    ("before", "now", "event"),
    [
        ({}, {"deleted": frozenset([KEY])}, Event("!", "process", "7 sh, uid 1000, parent 1", changes.DELETED)),
        ({}, {"unlisted": {("rk", 1): "rk"}}, Event("+", "module", "rk", changes.UNLISTED)),
    ],
)
def test_findings_are_reported_once(before: dict[str, Any], now: dict[str, Any], event: Event) -> None:
    first, second = sight(tasks=(SHELL,), **before), sight(tasks=(SHELL,), **now)
    assert seen(first, second) == [event]
    assert seen(second, second) == []
    assert list(changes.findings(second)) == [replace(event, sign="!")]


def test_a_module_that_unlinks_itself_has_not_gone() -> None:
    before, now = sight(modules=(MODULE,)), sight(unlisted={("loop", MODULE.address): "loop"})
    assert seen(before, now) == [Event("!", "module", "loop", changes.UNLISTED)]


def test_each_hidden_module_is_looked_at_a_few_times_only() -> None:
    """A hostile guest may report 65,536."""

    class Counted(dict[Any, str]):
        looks = 0

        def values(self) -> Any:
            for name in super().values():
                Counted.looks += 1
                yield name

    hidden = Counted({(f"m{number}", number): f"m{number}" for number in range(500)})
    assert len(seen(sight(), sight(unlisted=hidden))) == 500
    assert Counted.looks < 500 * 10


def test_a_process_that_becomes_root_is_a_finding() -> None:
    (event,) = seen(sight(tasks=(SHELL,)), sight(tasks=(replace(SHELL, uid=0),)))
    assert event == Event("!", "process", "7 sh, uid 0, parent 1", changes.BECAME_ROOT)


def test_a_second_listener_on_a_port_is_no_finding() -> None:
    (event,) = seen(sight(LISTENER), sight(LISTENER, replace(LISTENER, version=6, local="::", inode=60)))
    assert (event.text, event.finding) == ("[::]:22 listen, sshd (7)", "")


# The watch, on a guest that fails on demand.

LINK = SimpleNamespace(handshakes=1, requests=0, bytes_sent=0, bytes_received=0)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, list[Sight | LibvmiError]]:
    """A watch, and the results of its next looks."""
    coming: list[Sight | LibvmiError] = []

    def look(vmi: object, lists: object) -> Sight:
        found = coming.pop(0)
        if isinstance(found, LibvmiError):
            raise found
        return found

    @contextmanager
    def target(domain: str, local: bool) -> Iterator[SimpleNamespace]:
        profile = SimpleNamespace(boot_id="first", release="6.1")
        yield SimpleNamespace(profile=profile, agent=SimpleNamespace(link=LINK))

    monkeypatch.setattr(session, "look", look)
    monkeypatch.setattr(session, "Libvmi", SimpleNamespace(over=lambda reached: reached))
    monkeypatch.setattr(watch, "target", target)
    made = Watch(argparse.Namespace(local=True, domain=None, lists=changes.LISTS))
    made.open()
    return made, coming


def test_the_watch_continues_after_every_failure(watched: tuple[Watch, list[Sight | LibvmiError]]) -> None:
    made, coming = watched
    gone, torn = LinkError("nobody\nthere"), LibvmiError("VMI_FAILURE")
    coming += [sight(), gone, gone, torn, torn, sight(tasks=(SHELL,))]
    told = [[f"{sign} {kind} {text}" for _, sign, kind, text, _ in made.step()] for _ in range(6)]
    assert told == [
        [],
        ["! agent does not answer: nobody; there"],
        [],
        ["! agent answers again", "! guest its lists can't be read: VMI_FAILURE"],
        [],
        ["+ process 7 sh, uid 1000, parent 1"],
    ]
    assert made.screen.state.startswith("1 process, ")


def test_a_guest_that_reboots_repeatedly_is_not_reported_as_empty(
    watched: tuple[Watch, list[Sight | LibvmiError]],
) -> None:
    made, coming = watched
    again = RebootedError("'web-1' was rebooted")
    coming += [sight(tasks=(SHELL,)), again, again]
    assert list(made.step()) == []
    made._session._handshakes = 0  # each of these looks makes a session of its own
    assert [text for *_, text, _ in made.step()] == [
        "made a new session: the agent was restarted, or the connection broke",
        "its lists can't be read: 'web-1' was rebooted",
    ]
    assert not coming


@pytest.mark.parametrize("kind", [LibvmiError, RebootedError])
def test_a_new_boot_between_two_looks_is_read_by_its_own_kernel(
    monkeypatch: pytest.MonkeyPatch, kind: type[LibvmiError]
) -> None:
    """The link makes a new session by itself, while symbols are still those of the previous boot."""
    booted = ["first"]
    link = SimpleNamespace(handshakes=1, requests=0, bytes_sent=0, bytes_received=0)

    @contextmanager
    def target(domain: str, local: bool) -> Iterator[SimpleNamespace]:
        link.handshakes += 1
        profile = SimpleNamespace(boot_id=booted[0], release="6.1")
        yield SimpleNamespace(profile=profile, agent=SimpleNamespace(link=link))

    def look(vmi: SimpleNamespace, lists: object) -> Sight:
        if vmi.vmi.profile.boot_id == booted[0]:
            return sight(tasks=(SHELL,))
        link.handshakes += 1
        raise kind("...")

    monkeypatch.setattr(watch, "target", target)
    monkeypatch.setattr(session, "look", look)
    monkeypatch.setattr(session, "Libvmi", SimpleNamespace(over=lambda reached: SimpleNamespace(vmi=reached)))
    made = Watch(argparse.Namespace(local=False, domain="web-1", lists=changes.LISTS))
    made.open()
    assert list(made.step()) == []
    booted[0] = "second"
    assert [text for *_, text, _ in made.step()] == ["answers again; the guest was rebooted"]
    assert list(made.step()) == []
    assert made.screen.state.startswith("1 process, ")
    link.handshakes += 1
    assert [text for *_, text, _ in made.step()] == [
        "made a new session: the agent was restarted, or the connection broke"
    ]
    assert list(made.step()) == []


def test_the_newest_event_is_on_top_and_nothing_controls_the_terminal() -> None:
    console = Console(width=80, height=8, record=True, markup=False, force_terminal=False)
    shown = Screen("web-1")
    for number in range(20):
        shown.add("+", "process", f"{number} \x1b[2J[red]")
    console.print(drawn(shown, console, 2.0))
    lines = console.export_text().splitlines()
    assert lines[0].startswith("web-1  ")
    assert [line.split()[3] for line in lines[4:-1]] == ["19", "18", "17"]
    assert lines[-1] == "... older events do not fit"
    assert "\\x1b[2J[red]" in lines[4]


@pytest.mark.parametrize(
    ("were", "are", "found"),
    [
        ({1000}, {1000, 0}, True),  # a thread of it did, for itself
        ({1000, 0}, {1000, 0}, False),
        ({1000}, {1000}, False),
        (set(), {1000, 0}, False),  # they could not be read before
    ],
)
def test_a_thread_that_became_root_is_a_finding(were: set[int], are: set[int], found: bool) -> None:
    before = sight(tasks=(SHELL,), users={KEY: frozenset(were)})
    now = sight(tasks=(SHELL,), users={KEY: frozenset(are)})
    assert [event.finding for event in seen(before, now)] == [changes.BECAME_ROOT] * found
