"""What is printed on a narrow terminal: nothing is cut, numbers are not broken, and what is left out is named."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from vmishim.commands import inspection
from vmishim.commands.watch import Screen, drawn
from vmishim.inspection.fleet import Answer
from vmishim.inspection.objects import Socket, Task
from vmishim.output import show

SOCKET = Socket(4, "127.0.0.1", 56648, "10.0.0.2", 443, "established", 0, 11111, 4026531833, 202, "a-long-name-15c", 1)


class Terminal(io.StringIO):
    """A terminal of so many columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    def made(columns: int) -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "dumb")
        return terminal

    return made


def squeezed(text: str) -> str:
    return "".join(text.split())


@given(
    rows=st.lists(st.tuples(st.integers(0, 1 << 64), st.text("ab :.(-)", max_size=30), st.text("xyz 12", max_size=90))),
    columns=st.integers(20, 120),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_cell_is_cut(terminal: Callable[[int], Terminal], rows: list[tuple[int, str, str]], columns: int) -> None:
    out = terminal(columns)
    show(("NUMBER", "MIDDLE", "LAST"), rows)
    assert squeezed(out.getvalue()) == "NUMBERMIDDLELAST" + squeezed("".join(str(cell) for row in rows for cell in row))
    lines = out.getvalue().split("\n")
    assert all(any(str(row[0]) in line for line in lines) for row in rows)


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_ports_and_owners_are_whole_at_any_width(terminal: Callable[[int], Terminal], columns: int) -> None:
    out = terminal(columns)
    shape = inspection.SHAPES["ss"]
    show(shape.columns, [shape.row(SOCKET)])
    words = out.getvalue().split()
    assert {"127.0.0.1:56648", "10.0.0.2:443", "a-long-name-15c", "(202)"} <= set(words)


def test_columns_that_are_left_out_are_named(
    terminal: Callable[[int], Terminal], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = inspection.SHAPES["ss"]
    for columns, left in ((200, ""), (80, "left out for lack of room: INODE, NETNS (--json has all)\n")):
        out = terminal(columns)
        show(shape.columns, [shape.row(SOCKET)])
        assert capsys.readouterr().err == left
        assert all((title.removeprefix("-") in out.getvalue()) != (title in left) for title in ("INODE", "NETNS"))


def test_what_is_not_a_terminal_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(("NAME", "-MORE", "LAST"), [("a" * 100, "b" * 100, "c d " * 100)])
    said = capsys.readouterr()
    assert said.out.split("\n")[1].split() == ["a" * 100, "b" * 100, *(["c", "d"] * 100)]
    assert said.err == ""


def test_a_guest_that_was_not_read_takes_no_room_from_the_others(terminal: Callable[[int], Terminal]) -> None:
    out = terminal(80)
    task = Task(4242, 4242, 1, 0, "sleep", "sleeping", 0xFFFF_8880_0000_1000)
    error = "nothing answered at tcp://10.0.0.9:5555 within 5 s (nothing listens there)" * 3
    inspection._show([Answer("web-1", [task]), Answer("web-2", error=error)], inspection.SHAPES["ps"])
    header, row, *rest = out.getvalue().splitlines()
    assert header.split() == ["DOMAIN", "PID", "PPID", "UID", "STATE", "TASK_STRUCT", "NAME"]
    assert row.split() == ["web-1", "4242", "1", "0", "sleeping", "ffff888000001000", "sleep"]
    assert rest == [f"web-2 not read: {error}"]


@pytest.mark.parametrize(("columns", "rows"), [(40, 30), (60, 18), (80, 24), (140, 24)])
def test_findings_of_a_watch_are_shown_in_full(columns: int, rows: int) -> None:
    screen = Screen("web-1, Linux 6.1.0-56-cloud-amd64")
    text, finding = "127.0.0.1:56648 listen, worker (202)", "listens on a port that had no listener before"
    screen.add("+", "socket", text, finding)
    shown = io.StringIO()
    console = Console(file=shown, width=columns, height=rows, markup=False, highlight=False)
    console.print(drawn(screen, console, 1.0))
    assert squeezed(finding) in squeezed(
        "".join(line[44 if columns >= 100 else 0 :] for line in shown.getvalue().splitlines())
    )
    assert "127.0.0.1:56648" in shown.getvalue()
    assert "(202)" in shown.getvalue()


def test_a_watch_says_if_events_do_not_fit() -> None:
    screen = Screen("web-1")
    console = Console(file=io.StringIO(), width=60, height=10, markup=False, highlight=False)
    for fit, marked in ((5, False), (6, False), (7, True), (30, True)):
        screen.lines.clear()
        for number in range(fit):
            screen.add("+", "process", f"{number} sleep")
        lines = console.render_lines(drawn(screen, console, 1.0), pad=False)
        assert len(lines) <= 10
        assert ("older events" in "".join(segment.text for segment in lines[-1])) is marked


def test_a_watch_keeps_findings_however_much_happens_later() -> None:
    screen = Screen("web-1")
    screen.add("+", "socket", "0.0.0.0:31337 listen", "listens on a port that had no listener before")
    for number in range(3000):
        screen.add("+", "process", f"{number} sleep")
    screen.add("!", "agent", "does not answer")
    assert [line[3] for line in screen.findings] == ["0.0.0.0:31337 listen", "does not answer"]
