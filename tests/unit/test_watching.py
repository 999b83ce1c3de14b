"""A watch of many guests: what it remembers, what it writes, and that no guest delays another."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.until import until
from vmishim import cli
from vmishim.commands import watch_fleet, watch_screen
from vmishim.errors import LibvmiError
from vmishim.guests.domains import Domain
from vmishim.inspection import changes
from vmishim.inspection.changes import Event, Sight
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.watching import metrics, outlets, records, rounds
from vmishim.watching import session as sessions
from vmishim.watching.fleet import FleetWatch
from vmishim.watching.history import History
from vmishim.watching.outlets import File, Journal, Outlet, Stream, Syslog
from vmishim.watching.records import Recorder, line
from vmishim.watching.rounds import Guest, Rounds
from vmishim.watching.rules import RULES
from vmishim.watching.session import ENTRIES_MAX, Cost, Seen, Session, bounded

SHELL = Task(7, 7, 1, 1000, "sh", "sleeping", 0xFFFF_8880_0000_7000)
LISTENER = Socket(4, "0.0.0.0", 22, "0.0.0.0", 0, "listen", 0, 50, 1, 7, "sshd", 0xFFFF_8880_0000_9000)
LINE = Socket(6, "::1", 22, "::1", 4000, "established", 0, 51, 1, 7, "sshd", 0xFFFF_8880_0000_A000)
MODULE = Module("loop", 4096, "live", 0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_C000_1000)
KEY = (7, SHELL.address)
EMPTY = Sight()
BUSY = Sight(tasks={KEY: SHELL})
SILENT = Seen(None, "nothing answered", answered=False)


def seen(sight: Sight | None, **more: Any) -> Seen:
    return Seen(sight, boot="first", release="6.1", **more)


def told(history: History, what: Seen) -> list[str]:
    return [f"{event.sign} {event.kind} {event.text}" for event in history.take(what)]


def test_a_lost_agent_and_unreadable_lists_are_said_once_and_nothing_between_is_lost() -> None:
    history = History()
    assert told(history, seen(EMPTY)) == []
    assert told(history, SILENT) == ["! agent does not answer: nothing answered"]
    assert told(history, SILENT) == []
    torn = seen(None, problem="VMI_FAILURE")
    assert told(history, torn) == ["! agent answers again", "! guest its lists can't be read: VMI_FAILURE"]
    assert told(history, torn) == []
    assert told(history, seen(BUSY)) == ["+ process 7 sh, uid 1000, parent 1"]
    assert told(history, replace(seen(BUSY), renewed=True)) == [
        "! agent made a new session: the agent was restarted, or the connection broke"
    ]


def test_nothing_of_another_boot_is_compared() -> None:
    history = History()
    assert told(history, seen(BUSY)) == []
    assert told(history, replace(seen(EMPTY), boot="second")) == ["! agent answers again; the guest was rebooted"]
    assert told(history, replace(seen(EMPTY), boot="second")) == []


def test_a_guest_that_claims_endless_lists_is_not_kept() -> None:
    whole = Sight(tasks=dict.fromkeys(((number, 0) for number in range(ENTRIES_MAX)), SHELL))
    assert bounded(whole) is whole
    with pytest.raises(LibvmiError, match="200,001 entries, more than the 200,000 that are kept of a guest"):
        bounded(replace(whole, modules={("loop", 1): MODULE}))


# Records.


def recorded(event: Event) -> list[dict[str, Any]]:
    """An event's records as a reader of the file gets them."""
    return [json.loads(line(record)) for record in Recorder("run").of("web-1", event, 1_700_000_000.1234)]


def test_a_process_that_starts_is_one_record_with_ecs_names() -> None:
    (record,) = recorded(Event("+", "process", "7 sh, uid 1000, parent 1", entry=SHELL))
    assert record["@timestamp"] == "2023-11-14T22:13:20.123Z"
    assert record["host"] == {"name": "web-1"}
    assert record["process"] == {"pid": 7, "name": "sh", "parent": {"pid": 1}, "user": {"id": "1000"}}
    assert record["event"] == {
        "kind": "event",
        "action": "process-started",
        "severity": 0,
        "sequence": 1,
        "module": "vmishim",
        "dataset": "vmishim.watch",
        "category": ["process"],
        "type": ["start"],
    }
    assert record["vmishim"] == {"schema": 1}


def test_each_finding_is_an_alert_of_its_own_in_the_format_of_findings() -> None:
    event = Event("!", "process", "7 sh", f"{changes.BECAME_ROOT}; {changes.DELETED}", SHELL)
    alerts = recorded(event)
    assert [alert["rule"]["id"] for alert in alerts] == ["became-root", "deleted-executable"]
    assert [alert["event"]["kind"] for alert in alerts] == ["alert", "alert"]
    assert [alert["event"]["severity"] for alert in alerts] == [73, 47]
    assert alerts[0]["threat"]["technique"]["id"] == ["T1068"]
    finding = alerts[1]["vmishim"]["finding"]
    assert (finding["subject"], finding["pid"]) == ("sh", 7)
    assert finding["evidence"] == {"task_struct": "0xffff888000007000"}


def test_sockets_modules_and_agents_have_their_fields() -> None:
    (listener,) = recorded(Event("+", "socket", "0.0.0.0:22 listen", changes.LISTENS, LISTENER))
    assert (listener["source"], "destination" in listener) == ({"ip": "0.0.0.0", "port": 22}, False)
    assert listener["process"] == {"pid": 7, "name": "sshd"}
    (ended,) = recorded(Event("-", "socket", "x", entry=LINE))
    assert (ended["destination"], ended["network"]["type"]) == ({"ip": "::1", "port": 4000}, "ipv6")
    (hidden,) = recorded(Event("!", "module", "evil", changes.UNLISTED))
    assert (hidden["driver"], hidden["vmishim"]["finding"]["id"]) == ({"name": "evil"}, "hidden-module")
    (loaded,) = recorded(Event("+", "module", "loop", entry=MODULE))
    assert (loaded["driver"], loaded["event"]["action"]) == ({"name": "loop"}, "module-started")
    actions = [
        recorded(event)[0]["event"]["action"]
        for event in (
            *History().take(SILENT),
            Event("!", "agent", "answers again"),
            Event("!", "agent", "answers again; the guest was rebooted"),
            Event("!", "guest", "not read: x"),
            Event("!", "guest", "its lists can't be read: x"),
        )
    ]
    assert actions == ["agent-lost", "agent-back", "guest-rebooted", "guest-damaged", "guest-unreadable"]


def test_every_finding_of_a_watch_has_a_rule() -> None:
    assert RULES.keys() == {changes.DELETED, changes.UNLISTED, changes.BECAME_ROOT, changes.LISTENS}


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=()), max_size=3000))
def test_whatever_a_guest_calls_things_a_record_is_one_line_that_every_reader_accepts(comm: str, text: str) -> None:
    task = replace(SHELL, comm=comm)
    for record in Recorder("run").of(comm, Event("!", "process", text, changes.DELETED, task), 0.0):
        data = line(record)
        assert (data.count(b"\n"), data[-1:]) == (1, b"\n")
        assert data.isascii()
        json.dumps(json.loads(data), ensure_ascii=False).encode()  # strict: no half of a surrogate pair
        assert len(data) < 100_000


# Where records go.


def record(number: int) -> records.Record:
    made = Recorder("run")
    made._number = number - 1
    return made.made("web-1", "state", "x", "text", 0.0)


def sequence(data: bytes) -> list[int]:
    """The numbers of the records in a file."""
    return [json.loads(each)["event"]["sequence"] for each in data.splitlines()]


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Limits the size of files, as a full disk does; a write beyond it is an error, not a signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_no_record_and_is_said_once(tmp_path: Path, limited: Callable[[int], None]) -> None:
    said: list[str] = []
    file = File(tmp_path / "watch.json", said.append)
    file.write(record(1))
    size = (tmp_path / "watch.json").stat().st_size
    limited(size + size // 2)  # the next record fits only in part
    for number in range(2, 6):
        file.write(record(number))
    assert file.pending == 4
    text = "File too large; records are kept, and written as soon as they can be"
    assert said == [f"{tmp_path}/watch.json: {text}"]
    file.retry()
    assert len(said) == 1
    limited(1 << 30)
    file.retry()
    assert said[1:] == [f"{tmp_path}/watch.json: written again; nothing was lost"]
    file.close()
    assert sequence((tmp_path / "watch.json").read_bytes()) == [1, 2, 3, 4, 5]


def test_a_line_that_was_cut_by_a_full_disk_is_whole_in_the_rotated_file(
    tmp_path: Path, limited: Callable[[int], None]
) -> None:
    file = File(tmp_path / "watch.json", lambda _: None)
    file.write(record(1))
    size = (tmp_path / "watch.json").stat().st_size
    limited(size + size // 2)
    file.write(record(2))
    (tmp_path / "watch.json").rename(tmp_path / "watch.json.1")
    file.reopen()
    limited(1 << 30)
    file.retry()
    file.close()
    whole = (tmp_path / "watch.json.1").read_bytes().splitlines(keepends=True)[0]
    assert sequence(whole) == [1]
    assert sequence((tmp_path / "watch.json").read_bytes()) == [2]


def test_records_that_wait_too_long_are_counted_and_the_newest_are_kept(
    tmp_path: Path, limited: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    file = File(tmp_path / "watch.json", said.append)
    size = len(line(record(1)))
    monkeypatch.setattr(outlets, "PENDING_MAX", 3 * size)
    limited(size // 2)
    for number in range(1, 8):
        file.write(record(number))
    assert (file.pending, file.lost) == (3, 4)
    limited(1 << 30)
    file.retry()
    assert said[-1].endswith("written again; 4 records were lost")
    # The first was begun, so it is completed.
    assert sequence((tmp_path / "watch.json").read_bytes()) == [1, 6, 7]


def test_a_file_that_cannot_be_opened_again_stays_open(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "log").mkdir()
    file = File(tmp_path / "log" / "watch.json", said.append)
    (tmp_path / "log").rename(tmp_path / "old")
    file.reopen()
    file.write(record(1))
    assert said == [f"{tmp_path}/log/watch.json: No such file or directory; still writing to the file opened before"]
    assert sequence((tmp_path / "old" / "watch.json").read_bytes()) == [1]


@pytest.mark.parametrize("kind", [Journal, Syslog])
def test_a_log_daemon_that_restarts_gets_every_record(tmp_path: Path, kind: type[Journal | Syslog]) -> None:
    said: list[str] = []
    path = str(tmp_path / "socket")
    outlet: Outlet = kind(said.append, path)
    outlet.write(record(1))
    assert said[0].endswith("No such file or directory; records are kept, and written as soon as they can be")
    daemon = listening(path)
    outlet.retry()
    outlet.write(record(2))
    got = [daemon.recv(1 << 16) for _ in range(2)]
    daemon.close()
    outlet.write(record(3))
    os.unlink(path)
    daemon = listening(path)
    outlet.retry()
    got.append(daemon.recv(1 << 16))
    daemon.close()
    outlet.close()
    found = [json.loads(data[data.index(b'{"@') :].splitlines()[0])["event"]["sequence"] for data in got]
    assert found == [1, 2, 3]
    if kind is Syslog:
        assert got[0].startswith(f"<{10 * 8 + 5}>vmishim[{os.getpid()}]: ".encode())
    else:
        assert got[0].startswith(b"MESSAGE=web-1: text\nPRIORITY=5\nSYSLOG_IDENTIFIER=vmishim\nVMISHIM_GUEST=web-1\n")


def listening(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(path)
    made.settimeout(10)
    return made


def test_a_log_daemon_that_reads_nothing_delays_nobody(tmp_path: Path) -> None:
    daemon = listening(str(tmp_path / "socket"))
    outlet = Syslog(lambda _: None, str(tmp_path / "socket"))
    for number in range(1, 2000):
        outlet.write(record(number))
    assert outlet.pending > 0
    got: list[bytes] = []
    while len(got) < 1999:
        got.append(daemon.recv(1 << 16))
        outlet.retry()
    daemon.close()
    assert [json.loads(data.partition(b": ")[2])["event"]["sequence"] for data in got] == [*range(1, 2000)]


# Rounds, over sessions whose looks the test decides.


class Script:
    """In the place of a session: each look does what the test says."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        self.look, self.closed = look, 0

    def close(self) -> None:
        self.closed += 1


class Running:
    """Rounds in a thread, and what they told."""

    def __init__(self, interval: float) -> None:
        self.told: list[tuple[str, list[str], Seen]] = []
        self.rounds = Rounds(interval, self._tell)
        self._thread = threading.Thread(target=self.rounds.run, daemon=True)

    def _tell(self, guest: Guest, events: Sequence[Event], what: Seen) -> None:
        self.told.append((guest.name, [event.text for event in events], what))

    def looks(self, name: str) -> int:
        return sum(each == name for each, *_ in list(self.told))

    def start(self) -> None:
        self._thread.start()

    def do(self, task: Callable[[], object]) -> None:
        done = threading.Event()
        self.rounds.inbox.put(task)
        self.rounds.inbox.put(done.set)
        assert done.wait(20)

    def end(self) -> None:
        self.rounds.inbox.put(self.rounds.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Seen]]:
    """How a guest is looked at, by name; others are empty."""
    by_name: dict[str, Callable[[], Seen]] = {}
    monkeypatch.setattr(rounds, "reach", lambda domain: domain)

    def session(reach: Callable[[], Any], *_: object) -> Script:
        name = reach().thing.name
        return Script(lambda: by_name.get(name, lambda: seen(EMPTY))())

    monkeypatch.setattr(rounds, "Session", session)
    return by_name


def guests(*names: str) -> list[Domain]:
    return [Domain(name, agent=f"ipc:///{name}") for name in names]


def test_a_guest_that_hangs_delays_no_other_and_there_is_one_look_at_it(
    looks: dict[str, Callable[[], Seen]],
) -> None:
    released = threading.Event()
    hung = [f"hung-{number}" for number in range(40)]  # more than there are threads at first
    for name in hung:
        looks[name] = lambda: seen(EMPTY) if released.wait(60) else SILENT
    running = Running(0.02)
    running.rounds.watch(guests(*hung, "web-1"))
    running.start()
    until(lambda: running.looks("web-1") >= 50, what="50 looks at the guest that answers")
    assert not any(running.looks(name) for name in hung)
    released.set()
    until(lambda: all(running.looks(name) for name in hung), what="the others")
    running.end()
    skipped = {name: running.rounds.guests[name].schedule.skipped for name in ("web-1", "hung-0")}
    assert skipped["hung-0"] > 0


def test_a_silent_guest_is_said_once_and_delays_no_other(looks: dict[str, Callable[[], Seen]]) -> None:
    looks["web-1"] = lambda: SILENT
    running = Running(0.01)
    running.rounds.watch(guests("web-1", "web-2"))
    running.start()
    until(lambda: running.looks("web-1") >= 3 and running.looks("web-2") >= 20, what="looks at both")
    running.end()
    texts = [text for name, said, _ in running.told for text in said if name == "web-1"]
    assert texts == ["does not answer: nothing answered"]


def test_a_mistake_of_ours_that_a_guest_finds_ends_only_its_look() -> None:
    def broken() -> Any:
        raise ZeroDivisionError("by\nzero")

    what = Session(broken).look()
    assert (what.sight, what.problem, what.answered) == (None, "ZeroDivisionError: by; zero", True)


def test_sockets_that_take_long_are_read_less_often_and_stay_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    clock = [100.0]
    sockets: dict[changes.Key, Socket] = {(1,): LISTENER}

    def look(_: object, lists: Sequence[str]) -> Sight:
        asked.append(tuple(lists))
        clock[0] += 0.5 if "sockets" in lists else 0.001
        return Sight(tasks={KEY: SHELL}, sockets=sockets if "sockets" in lists else {})

    profile = SimpleNamespace(boot_id="first", release="6.1")
    monkeypatch.setattr(sessions, "look", look)
    monkeypatch.setattr(sessions, "Libvmi", SimpleNamespace(over=lambda reached: reached))
    monkeypatch.setattr(sessions, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    session = Session(lambda: nullcontext(SimpleNamespace(profile=profile, agent=None)), sockets_pace=10.0)
    for _ in range(12):
        what = session.look()
        assert what.sight
        assert what.sight.sockets == sockets
        clock[0] += 0.5
    with_sockets = [number for number, lists in enumerate(asked) if "sockets" in lists]
    assert with_sockets == [0, 10]  # every 5 s and more, for half a second
    session.close()
    session.look()
    assert "sockets" in asked[-1]  # another session knows none


def test_guests_come_and_go_and_one_that_changed_keeps_its_history(looks: dict[str, Callable[[], Seen]]) -> None:
    sights = {"web-1": BUSY}
    looks["web-1"] = lambda: seen(sights["web-1"])
    running = Running(0.01)
    assert running.rounds.watch(guests("web-1", "web-2"))["added"] == ["web-1", "web-2"]
    running.start()
    until(lambda: running.looks("web-1") and running.looks("web-2"), what="a look at both")
    before = dict(running.rounds.guests)
    changed = replace(guests("web-1")[0], timeout=9.0)
    said: list[Any] = []
    sights["web-1"] = EMPTY
    running.do(lambda: said.append(running.rounds.watch([changed, *guests("web-3")])))
    assert said == [{"added": ["web-3"], "removed": ["web-2"], "changed": ["web-1"]}]
    until(lambda: running.looks("web-3"), what="a look at the new one")
    until(lambda: all(guest.session.closed for guest in before.values()), what="sessions to be closed")  # type: ignore[attr-defined]
    looked = running.looks("web-1")
    until(lambda: running.looks("web-1") >= looked + 2, what="looks by the new session")
    running.end()
    ended = [text for name, texts, _ in running.told for text in texts if name == "web-1"]
    assert ended == ["7 sh, uid 1000, parent 1"]  # once, whichever session saw it


def test_threads_end_when_there_is_little_to_do(
    looks: dict[str, Callable[[], Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "SPARE", 0.05)
    barrier = threading.Barrier(20)
    many = [f"web-{number}" for number in range(20)]

    def together() -> Seen:
        if not barrier.broken:
            barrier.wait(20)  # only once every guest has a thread
            barrier.abort()
        return seen(EMPTY)

    def quietly() -> Seen:
        try:
            return together()
        except threading.BrokenBarrierError:
            return seen(EMPTY)

    looks |= dict.fromkeys(many, quietly)
    running = Running(0.5)
    running.rounds.watch(guests(*many))
    running.start()
    until(lambda: all(running.looks(name) for name in many), what="a look at all at the same time")
    looker: Any = running.rounds._looker
    until(lambda: looker.running < 10, what="threads to end")
    running.end()


# The command.


@pytest.fixture
def enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "domains.toml"
    monkeypatch.setenv("VMISHIM_CONFIG", str(path))
    path.write_text(entries("web-1", "web-2"))
    return path


def entries(*names: str) -> str:
    return "".join(f'[{name}]\nagent = "ipc:///{name}"\nagent_key = "k"\nkey = "/k"\n' for name in names)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--domains", "db-*"], 1, "no domain matches 'db-*'; list them with `vmishim domains`"),
        (["--domains", "*", "--metrics", "10.0.0.1:9464"], 1, "is not an address of this machine's loopback"),
        (["--domains", "*", "--metrics", "localhost:9464"], 1, "is not an address of this machine's loopback"),
        (["--domains", "*", "--output", "/nowhere/x.json"], 1, "/nowhere/x.json: No such file or directory"),
        (["--domains", "*", "--lists", "files"], 2, "'files' is not one of processes, modules, sockets"),
        (["web-1", "--journal"], 1, "go with --domains or --json"),
        (["web-1", "--domains", "*"], 2, "not allowed with argument"),
    ],
)
def test_a_watch_that_cannot_begin_is_one_line(
    enrolled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    try:
        ended = cli.main(["watch", *arguments])
    except SystemExit as error:
        ended = int(str(error.code))
    said = capsys.readouterr()
    assert (ended, said.out, said.err.count("\n")) == (status, "", 1)
    assert text in said.err


def test_duplicate_names_are_one_line_and_name_the_file(enrolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enrolled.write_text(entries("web-1", "web-1"))
    assert cli.main(["watch", "--domains", "*"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert str(enrolled) in said.err
    assert "web-1" in said.err


class Kept(Outlet):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("kept", lambda _: None)
        self.data = b""

    def _encode(self, record: records.Record) -> bytes:
        return line(record)

    def _send(self, data: memoryview) -> int:
        self.data += data
        return len(data)

    def actions(self) -> list[tuple[str, str]]:
        made = map(json.loads, self.data.splitlines())
        return [(each.get("host", {}).get("name", ""), each["event"]["action"]) for each in made]


def test_a_list_of_guests_is_read_again_and_one_that_is_wrong_changes_nothing(
    enrolled: Path, looks: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, kept = FleetWatch("web-*", 3600.0), Kept()
    watched.outlets.append(kept)
    watched.begin()
    enrolled.write_text(entries("web-1", "web-1"))
    watched.reread()
    assert set(watched.rounds.guests) == {"web-1", "web-2"}
    said = capsys.readouterr().err
    assert said.startswith("vmishim: the guests stay as they were: ")
    assert said.count("\n") == 1
    enrolled.write_text(entries("web-2", "web-3", "db-1"))
    watched.reread()
    assert set(watched.rounds.guests) == {"web-2", "web-3"}
    enrolled.write_text("")
    watched.reread()
    assert capsys.readouterr().err == "vmishim: no domain matches 'web-*' now; waiting for SIGHUP\n"
    watched.end()
    assert kept.actions() == [
        ("", "watch-started"),
        ("web-1", "guest-added"),
        ("web-2", "guest-added"),
        ("", "domains-invalid"),
        ("web-3", "guest-added"),
        ("web-1", "guest-removed"),
        ("web-2", "guest-removed"),
        ("web-3", "guest-removed"),
        ("", "watch-ended"),
    ]


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ("\x1b[B\r", ["down", "open"]),
        ("\x1bOA\x1bOB", ["up", "down"]),
        ("\x1bq", ["back", "quit"]),
        ("jx\x1b[5~\x1b[1;5Cn", ["down", "page up", "next"]),
    ],
)
def test_keys_that_arrive_together_are_all_pressed(data: str, keys: list[str]) -> None:
    assert watch_screen.meanings(data) == keys


def test_one_name_is_not_a_pattern() -> None:
    pattern = watch_fleet._escaped("a[1]*?")
    assert [fnmatchcase(name, pattern) for name in ("a[1]*?", "a1xx", "a[1]xx")] == [True, False, False]


def test_a_first_look_is_told_and_a_reader_that_goes_ends_the_watch(
    enrolled: Path, looks: dict[str, Callable[[], Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks["web-1"] = lambda: seen(BUSY, cost=Cost(3, 1, 2, 0.004))
    watched, kept = FleetWatch("web-1", 0.01), Kept()
    watched.outlets.append(kept)
    watched.begin()
    thread = threading.Thread(target=watched.rounds.run, daemon=True)
    thread.start()
    until(lambda: watched.rounds.guests["web-1"].looks["read"] >= 3, what="three looks")
    watched.rounds.inbox.put(watched.rounds.stop)
    thread.join(20)
    assert kept.actions().count(("web-1", "guest-watched")) == 1
    guest = watched.rounds.guests["web-1"]
    assert guest.cost.requests == 3 * guest.looks["read"]
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "write", lambda _, data: _write(writing, data))
    stream = Stream(lambda _: None)
    stream.write(record(1))
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        stream.write(record(2))
    os.close(writing)


_write = os.write


# Figures.


def test_prometheus_reads_what_the_watch_counted(
    enrolled: Path, looks: dict[str, Callable[[], Seen]], tmp_path: Path
) -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    import urllib.request

    looks["web-1"] = lambda: seen(Sight(tasks={KEY: SHELL}, deleted=frozenset([KEY])), cost=Cost(3, 10, 20, 0.004))
    looks["web-2"] = lambda: SILENT
    watched = FleetWatch("*", 0.01)
    watched.begin()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    thread = threading.Thread(target=watched.rounds.run, daemon=True)
    thread.start()
    until(lambda: all(guest.looks for guest in watched.rounds.guests.values()), what="a look at both")
    watched.rounds.inbox.put(watched.rounds.stop)
    thread.join(20)
    end = metrics.serve(("127.0.0.1", port), watched.figures)
    try:
        with pytest.raises(OSError, match="Address already in use") as taken:
            metrics.serve(("127.0.0.1", port), watched.figures)
        assert (taken.value.errno, taken.value.filename) == (errno.EADDRINUSE, f"--metrics 127.0.0.1:{port}")
        kind = "application/openmetrics-text; version=1.0.0"
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": kind})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            text = answer.read().decode()
    finally:
        end()
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    guest = watched.rounds.guests["web-1"]
    read, one = guest.looks["read"], ("guest", "web-1")
    assert read > 0
    assert found["vmishim_guest_up", one] == 1
    assert found["vmishim_guest_up", ("guest", "web-2")] == 0
    assert found["vmishim_looks_total", one, ("result", "read")] == read
    assert found["vmishim_findings_total", one, ("rule", "deleted-executable")] == 1
    assert found["vmishim_requests_total", one] == 3 * read
    assert found["vmishim_bytes_total", ("direction", "received"), one] == 20 * read
    assert found["vmishim_entries", one, ("list", "processes")] == 1
    assert 0 <= found["vmishim_last_look_age_seconds", one] < 60
    assert ("vmishim_last_look_age_seconds", ("guest", "web-2")) not in found
    assert found["vmishim_look_seconds_bucket", ("le", "0.005")] >= read


# The page.


def test_the_page_has_every_rule_action_metric_and_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for rule in RULES.values():
        severity = rule.severity.name.lower()
        assert f"| `{rule.id}` | {severity} | {rule.technique} |".replace("|  |", "| |") in page
    core = pytest.importorskip("prometheus_client.core")
    for family in metrics.Figures(list, []).collect():
        name = f"{family.name}_total" if isinstance(family, core.CounterMetricFamily) else family.name
        assert f"`{name}`" in page
    finding = Event("!", "socket", "x", changes.LISTENS, LINE)
    process = Event("+", "process", "7 sh", changes.BECAME_ROOT, SHELL)
    made = [*recorded(finding), *recorded(process), *recorded(Event("+", "module", "loop", entry=MODULE))]
    for field in {name for each in made for name in fields(each)}:
        assert f"`{field}`" in page, field


def fields(value: dict[str, Any], before: str = "") -> Iterator[str]:
    """The fields of a record, as the page names them."""
    for name, each in value.items():
        path = f"{before}{name}"
        if isinstance(each, dict) and path != "vmishim.finding":
            yield from fields(each, f"{path}.")
        else:
            yield path


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    pytest.importorskip("prometheus_client")
    text = (Path(metrics.__file__).parent / "vmishim-watch-grafana.json").read_text()
    known = {family.name for family in metrics.Figures(list, []).collect()}
    asked = {
        re.sub("_(total|bucket)$", "", name)
        for panel in json.loads(text)["panels"]
        for target in panel["targets"]
        for name in re.findall(r"vmishim_\w+", target["expr"])
    }
    assert asked
    assert asked <= known
