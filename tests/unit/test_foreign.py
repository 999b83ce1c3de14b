"""Text of a guest, an agent or a file, in every field that is shown: it neither acts, nor hides or reorders a thing."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from guest_agent.__main__ import Printable
from tests.unit.test_comparison import made
from tests.unit.test_lying_guest import BASE
from vmishim import cli
from vmishim.attestation.errors import NoReportError
from vmishim.commands import CommandError, doctor, enrolment, export, inspection
from vmishim.commands import watch as watching
from vmishim.compare import report
from vmishim.errors import FaultError, LibvmiError, LinkError, UnknownNameError
from vmishim.foreign import LONGEST, paragraph, printable
from vmishim.guests import domains
from vmishim.guests.domains import Domain
from vmishim.inject.errors import CompileError, InjectError
from vmishim.inspection import cluster, fleet
from vmishim.inspection.changes import Event, Sight, changes, findings
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.libvmi import Libvmi
from vmishim.libvmi.config import export_entry
from vmishim.output import dump, show, show_error
from vmishim.wire.messages import AgentError, Failure

ESCAPES = ["\x1b[2J", "\x1b]0;gotcha\x07", "\r", "\0", "\x9b31m", "\u202e", "\u2066", "\u200f", "\u200b", "\u2028"]
HOSTILE = "a" + "b".join(ESCAPES) + "\n<script>" + "x" * 4096
TASK = Task(7, 7, 1, 0, HOSTILE, HOSTILE, BASE)
MODULE = Module(HOSTILE, 4096, HOSTILE, BASE, BASE)
SOCKET = Socket(4, "10.0.0.1", 22, "10.0.0.2", 9, HOSTILE, 0, 1, 2, 7, HOSTILE, BASE)


def assert_harmless(shown: str, breaks: str = "\n") -> None:
    """Nothing of `HOSTILE` is in it as it was, and something is."""
    assert "gotcha" in shown
    assert [char for char in shown if not char.isprintable() and char not in breaks] == []
    assert max(map(len, shown.split("\n"))) < 4 * LONGEST
    assert "\n<script>" not in shown


@given(st.text())
def test_text_is_printable_and_honest_text_stays(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= LONGEST
    assert printable(shown) == shown
    assert paragraph(text).replace("\n", "").isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("entries", [("ps", TASK), ("lsmod", MODULE), ("ss", SOCKET)], ids=lambda each: each[0])
@pytest.mark.parametrize("form", ["text", "json"])
def test_lists(
    entries: tuple[str, Any], form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, entry = entries
    guest = Domain("web-1", ramfile="/nowhere")
    answers = [fleet.Answer("web-1", [entry]), fleet.Answer(HOSTILE, error=HOSTILE)]
    monkeypatch.setattr(fleet, "matching", lambda _: [guest, Domain(HOSTILE, ramfile="/nowhere")])
    monkeypatch.setattr(cluster, "engine", lambda *_: lambda *_: iter(answers))
    options = argparse.Namespace(
        domains="*",
        engine="",
        engine_tls=(),
        strategy="batch",
        deadline=1.0,
        json=form == "json",
        stats=True,
        tree=False,
        threads=False,
    )
    assert getattr(inspection, name)(options) == 1
    shown = capsys.readouterr()
    assert_harmless(shown.out) if form == "text" else assert_json(shown.out)
    assert shown.err.startswith("vmishim: 2 guests, 1 not read")


def assert_json(shown: str) -> None:
    """Whole, and escaped by JSON."""
    assert shown.isascii()
    assert [char for char in shown if not char.isprintable() and char != "\n"] == []
    assert any(HOSTILE in map(str, json.loads(line).values()) for line in shown.splitlines())


class Profile:
    """A kernel whose every fact is hostile."""

    release = hostname = boot_id = HOSTILE
    vcpus = memory_size = 1 << 30

    def member(self, struct: str, member: str) -> Any:
        return SimpleNamespace(offset=8, size=8)


@contextmanager
def reached(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(profile=Profile(), agent=None, close=lambda: None)


def watch(said: Callable[[], str]) -> str:
    screen = watching.Screen(printable(HOSTILE))
    before, now = Sight(), Sight(tasks={(7,): TASK}, modules={(1,): MODULE}, sockets={(2,): SOCKET})
    shown = [*changes(before, now), *findings(Sight(unlisted={(1,): HOSTILE})), Event("!", "process", "x", HOSTILE)]
    for event in shown:
        print(*screen.add(event.sign, event.kind, event.text, event.finding))
    console = Console(file=io.StringIO(), width=200, height=50, force_terminal=False)
    console.print(watching.drawn(screen, console, 1.0))
    print(console.file.getvalue())  # type: ignore[attr-defined]
    return said()


def test_watch(capsys: pytest.CaptureFixture[str]) -> None:
    assert_harmless(watch(lambda: capsys.readouterr().out))


def test_the_title_of_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "target", reached)
    monkeypatch.setattr(Libvmi, "over", lambda _: None)
    watched = watching.Watch(argparse.Namespace(domain=HOSTILE, local=False, lists=()))
    watched.open()
    assert_harmless(watched.screen.title)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._say(doctor.Finding("kernel", "bad", HOSTILE, HOSTILE))
    assert_harmless(capsys.readouterr().out)


def test_config_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for release in (HOSTILE, '6.1"; }', "6.1\n", "6.1 x", "\u202e6.1"):
        profile: Any = SimpleNamespace(release=release, member=Profile().member)
        with pytest.raises(ValueError, match=r"libvmi\.conf cannot hold the kernel's release"):
            export_entry(profile, "web-1")
    monkeypatch.setattr(export, "target", reached)
    with pytest.raises(CommandError) as caught:
        export.config(argparse.Namespace(domain="web-1"))
    assert_harmless(str(cli._explain(caught.value)))


def test_domains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Domain(HOSTILE, agent=HOSTILE, agent_key=HOSTILE, key=HOSTILE)
    monkeypatch.setattr(domains, "load", lambda *_: {HOSTILE: entry})
    for names in (True, False):
        assert enrolment.domains(argparse.Namespace(names=names, json=False)) == 0
        assert_harmless(capsys.readouterr().out)


def test_facts_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    show(("FACT", "VALUE"), {HOSTILE: HOSTILE}.items())
    assert_harmless(capsys.readouterr().out)
    dump({"fact": HOSTILE})
    assert "\\u202e" in capsys.readouterr().out


ERRORS: list[BaseException] = [
    *(kind(HOSTILE) for kind in (LibvmiError, LinkError, InjectError, CompileError, NoReportError)),
    AgentError(Failure(HOSTILE[:40], HOSTILE)),
    UnknownNameError(HOSTILE),
    InjectError("refused", HOSTILE),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_every_class_in_a_line_and_in_a_traceback(
    error: LibvmiError, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [char for char in str(error) if not char.isprintable() and char != "\n"] == []
    whole = "".join(traceback.format_exception(error)) + getattr(error, "log", "")
    assert [char for char in whole if not char.isprintable() and char != "\n"] == []
    assert "gotcha" in whole
    line = cli._explain(error)
    assert line is not None
    assert line.isprintable()


def test_other_errors_in_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(HOSTILE) from FaultError(BASE)
    except ValueError as error:
        show_error(type(error), error, error.__traceback__)
    assert_harmless(capsys.readouterr().err.replace("\n<script>", ""))


def test_a_traceback_without_hostile_text_is_pythons_own(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("Grüße, 'x'")
    except ValueError as error:
        show_error(type(error), error, error.__traceback__)
        ours = capsys.readouterr().err
        sys.__excepthook__(type(error), error, error.__traceback__)
    assert ours == capsys.readouterr().err


def planted(value: Any) -> Any:
    """The same report, with hostile text after every text that comes from elsewhere."""
    if isinstance(value, dict):
        ours = {"result", "answers", "name", "reference", "explained"}
        return {key: each if key in ours else planted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [planted(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = planted(made()) | {"missing": [dict.fromkeys(("name", "why", "remedy"), HOSTILE)]}
    report.table(hostile)
    assert_harmless(capsys.readouterr().out)
    page = report.page(hostile)
    assert [char for char in page if not char.isprintable() and char != "\n"] == []
    assert "gotcha" in page
    assert "<script>" not in page


def test_the_agents_log() -> None:
    """A program's log, a peer's version, the text of an exception: all of it may come from an attacker."""
    formatter = Printable("%(message)s")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("agent", logging.ERROR, "", 0, "said %s", (HOSTILE,), sys.exc_info())
    shown = formatter.format(record)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert "ValueError" in shown
