"""The command line: its output, the files it writes, its exit status. None of this needs a guest."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmishim.acquire.shapes
import vmishim.guests.agent
import vmishim.inspection.changes
import vmishim.inspection.fleet
import vmishim.memory.lifetimes
from tests.unit.test_link import Served
from vmishim import cli
from vmishim.commands import CommandError, doctor, enrolment, inspection
from vmishim.foreign import printable
from vmishim.guests import domains
from vmishim.guests.resolver import reach
from vmishim.inspection.objects import Task
from vmishim.output import watched
from vmishim.wire.keys import generate, load_private, save_private, save_public
from vmishim.wire.sessions import Sessions

AGENT = generate().public
COMMANDS = (
    "ps", "lsmod", "ss", "watch", "scan", "run", "compare", "dump", "vol", "drgn",
    "keygen", "enroll", "forget", "domains", "config", "bundle", "offsets", "attest", "doctor", "completion",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder for the test."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "vmishim" / "domains.toml"))
    return tmp_path / "vmishim"


@pytest.fixture
def key(home: Path) -> Path:
    """Your private key in its default place."""
    home.mkdir()
    save_private(home / "key", generate())
    return home / "key"


def enroll(*more: str) -> int:
    return cli.main(["enroll", "web-1", "tcp://10.0.0.5:5555", AGENT.text, "--no-check", *more])


def run(*arguments: str | Path, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """``vmishim`` in a separate process."""
    command = [sys.executable, "-m", "vmishim.cli", *map(str, arguments)]
    root = str(Path(cli.__file__).parents[1])
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": root}, **more
    )


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    code = "import sys, vmishim.cli as cli; cli.parser(); print(*sys.modules)"
    # Without coverage, which loads some of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"zmq", "cryptography", "rich", "vmishim.libvmi", "tomllib"} & set(loaded)


def test_the_strategies_are_those_that_a_guest_has() -> None:
    options = cli.parser().parse_args(["ps", "--local"])
    assert options.strategy == "batch"
    for strategy in get_args(vmishim.guests.agent.Strategy):
        assert cli.parser().parse_args(["run", "--strategy", strategy, "script.py"]).strategy == strategy


def test_a_watch_looks_at_all_lists_unless_it_is_told_which() -> None:
    assert cli.parser().parse_args(["watch", "--local"]).lists == vmishim.inspection.changes.LISTS
    chosen = cli.parser().parse_args(["watch", "--local", "--lists", "sockets,processes"]).lists
    assert chosen == ("processes", "sockets")


def test_the_default_deadline_is_that_of_the_fleet() -> None:
    assert cli.parser().parse_args(["ps", "--local"]).deadline == vmishim.inspection.fleet.DEADLINE


def test_the_formats_of_a_dump_are_those_that_can_be_written() -> None:
    for format in vmishim.acquire.shapes.SHAPES:
        assert cli.parser().parse_args(["dump", "m", "-o", "f", "--format", format]).format == format
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["dump", "m", "-o", "f", "--format", "raw"])


def test_drgn_keeps_memory_as_long_as_the_page_cache() -> None:
    assert cli.parser().parse_args(["drgn", "web-1"]).keep == vmishim.memory.lifetimes.STALE


@pytest.mark.parametrize(
    ("words", "domain", "rest"),
    [
        (["web-1"], "web-1", []),
        (["web-1", "script.py", "-e", "--crash"], "web-1", ["script.py", "-e", "--crash"]),
        (["web-1", "--stats", "script.py"], "web-1", ["script.py"]),
        (["--local"], None, []),
        (["--local", "--", "script.py", "-x"], "script.py", ["-x"]),
        (["web-1", "--crash", "ps", "-m"], "web-1", ["ps", "-m"]),
        (["web-1", "-e", "1", "a", "-b"], "web-1", ["a", "-b"]),
    ],
)
def test_drgns_options_may_stand_before_and_after_the_domain(
    words: list[str], domain: str | None, rest: list[str]
) -> None:
    options = cli.parser().parse_args(["drgn", *words])
    assert (options.domain, options.words) == (domain, rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vmishim {command}")


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {command} " in shown or f"    {command}\n" in shown for command in COMMANDS)


def examples(text: str) -> list[list[str]]:
    """The words of each example in a help text, without redirections and the description."""
    lines = (line.strip().removeprefix("sudo ") for line in text.partition("examples:\n")[2].splitlines())
    return [shlex.split(re.split(" [>|]|  ", line)[0])[1:] for line in lines if line.startswith("vmishim ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_accepts_its_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    found = examples(capsys.readouterr().out)
    assert found, f"vmishim {command} --help shows no example"
    for words in found:
        assert cli.parser().parse_args(words).command == command


def test_the_examples_of_the_main_help_are_accepted() -> None:
    assert {cli.parser().parse_args(words).command for words in examples(cli.EXAMPLES)} <= set(COMMANDS)


def test_every_command_is_tested() -> None:
    (subparsers,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(subparsers.choices) == set(COMMANDS)


# Bad input: one line, which names what was wrong and what to do.


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["ps"], 2, "one of the arguments DOMAIN --local --domains is required"),
        (["ps", "--domains", "web-*"], 1, "no domain matches 'web-*'"),
        (["ps", "--domains", "web-*", "--tree"], 1, "leave out --tree or --domains"),
        (["ps", "web-1", "--local"], 2, "not allowed with argument"),
        (["drgn"], 2, "drgn needs a DOMAIN, or --local for this machine"),
        (["drgn", "web-9", "-e", "1"], 1, "no domain 'web-9'"),
        (["drgn", "web-1", "/nosuch.py"], 1, "no such script: /nosuch.py"),
        (["drgn", "web-1", "-e", "1", "--crash"], 2, "not allowed with argument"),
        (["drgn", "web-1", "--keep", "0"], 2, "--keep: 0 is not a number of seconds above 0"),
        (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
        (["ps", "web-1", "--strategy", "quick"], 2, "invalid choice: 'quick'"),
        (["ps", "web-9"], 1, "no domain 'web-9'"),
        (["lsmod", "web-9"], 1, "'vmishim enroll' adds one"),
        (["vol", "web-9", "linux.pslist"], 1, "no domain 'web-9'"),
        (["vol"], 2, "the following arguments are required: DOMAIN"),
        (["doctor", "web-9"], 1, "no domain 'web-9'"),
        (["attest", "web-9"], 1, "no domain 'web-9'"),
        (["ps", "web-1", "--json", "--tree"], 2, "--tree: not allowed with argument --json"),
        (["ps", "web-1", "--deadline", "-3"], 2, "--deadline: -3 is not a number of seconds above 0"),
        (["ss", "web-1", "--deadline", "nan"], 2, "--deadline: nan is not a number of seconds above 0"),
        (["lsmod", "web-1", "--deadline", "soon"], 2, "--deadline: invalid number of seconds value: 'soon'"),
        (["watch", "web-1", "--interval", "0"], 2, "--interval: 0 is not a number of seconds above 0"),
        (["compare", "--timeout", "inf", "x.py"], 2, "--timeout: inf is not a number of seconds above 0"),
        (["compare", "--runs", "0", "x.py"], 2, "--runs: 0 is not a number of 1 or more"),
        (["dump"], 2, "one of the arguments DOMAIN --local --verify --finish --signer-line is required"),
        (["dump", "web-1"], 1, "name the file to write: -o FILE"),
        (["dump", "web-1", "-o", "core.elf"], 1, "no domain 'web-1'"),
        (["dump", "web-1", "-o", "core.elf", "--rate", "0"], 2, "--rate: 0 is not a number of MiB above 0"),
        (["dump", "--verify", "no-such-dump"], 1, "no-such-dump.manifest.json: No such file"),
        (["dump", "--finish", "no-such-dump"], 1, "there is no unfinished dump no-such-dump"),
        (["run"], 2, "the following arguments are required: SCRIPT; see"),
        (["compare"], 2, "the following arguments are required: SCRIPT; see"),
        (["forget"], 2, "the following arguments are required: DOMAIN; see"),
        (["forget", "web-9"], 1, "has no entry 'web-9'; it has none"),
        (["attest"], 1, "give the name of a guest with an agent, or a file: --report FILE"),
        (["attest", "--report", "no-such-report"], 1, "no-such-report: No such file"),
        (["attest", "--report", "/dev/null"], 1, "a report must have 1184 bytes, not 0"),
        (["config", "--export", "web-9"], 1, "no domain 'web-9'"),
        (["run", "no-such-script.py"], 1, "no such script: no-such-script.py"),
        (["enroll", "a", "tcp://h:1", AGENT.text], 1, "make one with `vmishim keygen`"),
        (["keygen", "/proc/no/key"], 1, "/proc/no: "),
        (["bundle", "-o", "/"], 1, "is a folder"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ended = cli.main(arguments)
    except SystemExit as exit_:
        ended = int(str(exit_.code))
    said = capsys.readouterr()
    assert (ended, said.out) == (status, "")
    assert said.err.startswith("vmishim")
    assert said.err.count("\n") == 1
    assert told in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("vmishim-public-v1 AAAA", "44 characters"),
        ("ssh-ed25519 AAAA", "not a public key"),
        ("vmishim-private-v1 AAAA", "must not leave its machine"),
    ],
)
@pytest.mark.usefixtures("key")
def test_a_wrong_agent_key_is_not_enrolled(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["enroll", "web-1", "tcp://10.0.0.5:5555", words]) == 1
    assert told in capsys.readouterr().err
    assert not domains.path().exists()


@pytest.mark.usefixtures("key")
def test_a_wrong_endpoint_is_not_enrolled(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["enroll", "web-1", "10.0.0.5", AGENT.text]) == 1
    assert "'10.0.0.5' is not a valid endpoint: use tcp://HOST:PORT or ipc://PATH" in capsys.readouterr().err
    assert not domains.path().exists()
    assert [path.name for path in domains.path().parent.iterdir()] == ["key"]


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("tcp://10.0.0.5", "has no port: use tcp://10.0.0.5:5555"),
        ("tcp://10.0.0.5:70000", "has no valid port"),
        ("tcp://10.0.0.5:0", "has no valid port"),
        ("inproc://x", "is not a valid endpoint"),
        ("tcp://", "is not a valid endpoint"),
        ("ipc://" + 108 * "x", "too long"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--no-check"]])
@pytest.mark.usefixtures("key")
def test_an_endpoint_that_cannot_work_is_not_enrolled(
    endpoint: str, told: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["enroll", "web-1", endpoint, AGENT.text, *more]) == 1
    assert told in capsys.readouterr().err
    assert not domains.path().exists()


@pytest.mark.parametrize("name", ["", "a\nb", "-x", " web", "web-*", "we?", "[web]", 101 * "x", "web\u200b"])
@pytest.mark.usefixtures("key")
def test_a_name_that_cannot_be_used_is_not_enrolled(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["enroll", "--no-check", "--", name, "tcp://10.0.0.5:5555", AGENT.text]) == 1
    assert "cannot be a domain's name: " in capsys.readouterr().err
    assert not domains.path().exists()


def enrolled(monkeypatch: pytest.MonkeyPatch, endpoint: str, *more: str) -> int:
    """Enrol an agent, with a short deadline."""
    monkeypatch.setattr(domains, "TIMEOUT", 0.3)
    monkeypatch.setattr(enrolment, "reach", lambda domain: reach(replace(domain, timeout=0.3)))
    return cli.main(["enroll", "web-1", endpoint, AGENT.text, *more])


@pytest.mark.usefixtures("key")
def test_a_host_without_an_address_is_not_enrolled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enrolled(monkeypatch, "tcp://no-such-host.invalid:5555") == 1
    told = capsys.readouterr().err
    assert "web-1 was not added (--no-check adds it): no address was found for 'no-such-host.invalid'" in told
    assert not domains.path().exists()


def test_an_agent_with_another_key_is_not_enrolled(
    key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = Sessions(generate(), {load_private(key).public})
    with Served("tcp://127.0.0.1:0", sessions=sessions) as served:
        assert enrolled(monkeypatch, served.endpoint) == 1
        assert "was not added" in capsys.readouterr().err
        assert not domains.path().exists()
        assert enrolled(monkeypatch, served.endpoint, "--no-check") == 0
        before = domains.path().read_text()
        assert enrolled(monkeypatch, served.endpoint, "--replace") == 1
        assert domains.path().read_text() == before


@pytest.mark.usefixtures("key")
def test_an_agent_that_does_not_answer_yet_is_enrolled(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enrolled(monkeypatch, f"ipc://{home}/nobody") == 1
    assert "web-1 was added, but can't be reached yet: nothing answered" in capsys.readouterr().err
    assert list(domains.load()) == ["web-1"]


FORGOTTEN = """\
# my guests

[old]
agent = "tcp://10.0.0.1:5555"  # no port is missing here
agent_key = "vmishim-public-v1 AAAA"
key = "k"

[old.attestation]
debug = "no such setting"

# the web server
["web 2"]
ramfile = '/run/ram'

[bad]
agent = "tcp://nowhere"
"""


@pytest.mark.parametrize("names", [["old"], ["web 2"], ["bad"], ["bad", "old"], ["old", "web 2", "bad"]])
def test_forget_removes_entries_and_keeps_every_other_line(
    key: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an entry is wrong, so that no other command takes the file."""
    file = key.with_name("domains.toml")
    file.write_text(FORGOTTEN)
    file.chmod(0o640)
    assert cli.main(["forget", *names]) == 0
    assert capsys.readouterr().out == f"removed {', '.join(names)} from {file}\n"
    before = tomllib.loads(FORGOTTEN)
    assert tomllib.loads(file.read_text()) == {name: entry for name, entry in before.items() if name not in names}
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == [
        "# my guests",
        "# the web server",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("text", ['web-1 = {agent = "tcp://h:1"}\n', 'web-1.agent = "tcp://h:1"\n'])
@pytest.mark.usefixtures("key")
def test_an_entry_that_is_not_found_in_the_text_is_not_forgotten(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    domains.path().write_text(text)
    assert cli.main(["forget", "web-1"]) == 1
    assert "edit the file yourself" in capsys.readouterr().err
    assert domains.path().read_text() == text


def test_forget_names_what_is_there(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key.with_name("domains.toml").write_text(FORGOTTEN)
    assert cli.main(["forget", "web-2", "old"]) == 1
    assert "has no entry 'web-2'; known are old, web 2, bad" in capsys.readouterr().err
    assert key.with_name("domains.toml").read_text() == FORGOTTEN


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_the_doctor_has_one_remedy_for_a_key_that_others_can_read(
    key: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enroll() == 0
    key.chmod(mode)
    capsys.readouterr()
    assert cli.main(["doctor", "web-1", "--json"]) == 1
    last = json.loads(capsys.readouterr().out)[-1]
    assert last == {
        "about": "our key",
        "verdict": "bad",
        "text": f"{key}: other users can access this private key",
        "remedy": f"chmod 600 {key}",
    }


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "tcp://no-such-host.invalid:1"])
def test_the_doctor_does_not_send_you_to_the_doctor(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["enroll", "web-1", endpoint, AGENT.text, "--no-check"]) == 0
    with domains.path().open("a") as file:
        file.write("timeout = 0.3\n")
    capsys.readouterr()
    assert cli.main(["doctor", "web-1"]) == 1
    told = capsys.readouterr().out
    assert ("no address was found for 'no-such-host.invalid'" in told) == (endpoint != "tcp://127.0.0.1:1")
    assert "vmishim doctor" not in told


def test_a_key_that_others_can_read_is_refused(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key.chmod(0o644)
    assert enroll() == 1
    assert f"chmod 600 {key}" in capsys.readouterr().err


def test_an_unreachable_agent_is_reported_and_stays_enrolled(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"ipc://{key.parent}/nobody"
    file = enrolment.write("gone", {"agent": nowhere, "agent_key": AGENT.text, "key": str(key)})
    file.write_text(file.read_text() + "timeout = 0.2\n")
    assert cli.main(["ps", "gone"]) == 1
    said = capsys.readouterr().err
    assert nowhere in said
    assert said.count("\n") == 1


# Keys and names.


def test_keygen_makes_a_private_file_and_keeps_an_existing_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keygen"]) == 0
    first = capsys.readouterr().out
    assert first == load_private(home / "key").public.text + "\n"
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert cli.main(["keygen"]) == 0
    assert capsys.readouterr().out == first


FILE = """\
# my guests
[old]   # the first one
agent = "tcp://10.0.0.1:5555"
agent_key = "vmishim-public-v1 AAAA"   # not checked before it is used
key = "~/.config/vmishim/key"

# the web server
["web 2"]
ramfile = '/run/ram'
"""


def test_enroll_keeps_every_other_line(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = key.with_name("domains.toml")
    file.write_text(FILE)
    file.chmod(0o640)
    assert enroll() == 0
    text = file.read_text()
    assert text.startswith(FILE)
    assert tomllib.loads(text)["web-1"] == {
        "agent": "tcp://10.0.0.5:5555",
        "agent_key": AGENT.text,
        "key": str(key),
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert enroll() == 1
    assert "--replace" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize("name", ["old", "web 2", "web-1"])
def test_replacing_an_entry_changes_no_other(key: Path, name: str) -> None:
    file = key.with_name("domains.toml")
    file.write_text(FILE)
    assert enroll() == 0
    before = tomllib.loads(file.read_text())
    entry = {"agent": "tcp://[::1]:1", "agent_key": AGENT.text, "key": "k"}
    enrolment.write(name, entry, replace=True)
    after = tomllib.loads(file.read_text())
    assert after == before | {name: entry}
    assert "# my guests" in file.read_text()
    assert "# the web server" in file.read_text()


@given(st.text(min_size=1, max_size=30))
def test_any_name_can_be_enrolled_or_is_refused(name: str) -> None:
    entry = {"agent": "tcp://h:1", "agent_key": AGENT.text, "key": "k"}
    domains.path().unlink(missing_ok=True)
    try:
        file = enrolment.write(name, entry)
    except CommandError:
        assert not name.isprintable()
        return
    assert tomllib.loads(file.read_text()) == {name: entry}


@pytest.mark.usefixtures("key")
def test_the_agents_key_may_be_a_file_or_several_words(tmp_path: Path) -> None:
    save_public(tmp_path / "agent.pub", AGENT)
    assert cli.main(["enroll", "one", "tcp://h:1", str(tmp_path / "agent.pub"), "--no-check"]) == 0
    assert cli.main(["enroll", "two", "tcp://h:1", *AGENT.text.split(), "--no-check"]) == 0
    found = domains.load()
    assert found["one"].agent_key == found["two"].agent_key == AGENT.text


@pytest.mark.usefixtures("key")
def test_domains_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["domains"]) == 0
    assert "no guest is enrolled yet" in capsys.readouterr().err
    assert enroll() == 0
    capsys.readouterr()
    assert cli.main(["domains", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert list(entry) == ["name", "id", "agent", "ramfile", "key"]
    assert cli.main(["domains", "--names"]) == 0
    assert capsys.readouterr().out == "web-1\n"
    assert cli.main(["domains"]) == 0
    assert AGENT.fingerprint in capsys.readouterr().out


# Output.


@given(st.text())
def test_text_from_a_guest_never_controls_the_terminal(text: str) -> None:
    assert printable(text).isprintable()


def task(pid: int, ppid: int, comm: str = "x") -> Task:
    return Task(pid, pid, ppid, 0, comm, "running", 0xFFFF_8880_0000_0000 + pid * 0x2000)


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 30)))
def test_the_tree_has_every_task_exactly_once_for_any_guest(parents: dict[int, int]) -> None:
    tasks = [task(pid, ppid) for pid, ppid in parents.items()]
    assert sorted(found.pid for _, found in inspection.tree(tasks)) == sorted(parents)


def test_a_tree_that_is_one_long_branch() -> None:
    tasks = [task(pid, pid - 1) for pid in range(5000)]
    assert [found.pid for _, found in inspection.tree(tasks)] == list(range(5000))


def test_children_are_below_their_parents_in_order() -> None:
    tasks = [task(0, 0, "a"), task(1, 0, "b"), task(2, 0, "c"), task(3, 1, "d"), task(9, 7, "e")]
    drawn = [branch + found.comm for branch, found in inspection.tree(tasks)]
    assert [line[-1] for line in drawn] == ["a", "b", "d", "c", "e"]
    assert [len(line) for line in drawn] == [1, 4, 7, 4, 1]


def test_progress_yields_every_item() -> None:
    assert list(watched(range(5), "numbers")) == [0, 1, 2, 3, 4]


# Exit status.


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(enrolment, "domains", interrupted)
    assert cli.main(["domains"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_output_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "vmishim.cli", "completion", "bash"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> NoReturn:
        raise KeyError("bug")

    monkeypatch.setattr(enrolment, "domains", broken)
    with pytest.raises(KeyError):
        cli.main(["domains"])


# The rest.


def test_doctor_without_a_guest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "all well" not in said  # no guest is enrolled, which is worth a note
    assert said.splitlines()[-1].startswith("nothing to fix; ")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(entry) for entry in found} == {("about", "verdict", "text", "remedy")}
    assert {"vmishim", "Python", "pyzmq", "cryptography", "domains"} <= {entry["about"] for entry in found}


def test_doctor_names_the_command_that_sudo_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "CapEff:\t0000000000000000\n")
    for argv, named in (("/home/ida/vmi/bin/vmishim", "/home/ida/vmi/bin/vmishim"), ("-c", "vmishim")):
        monkeypatch.setattr(sys, "argv", [argv, "doctor", "--local"])
        assert doctor._privilege().remedy == f"run it as root: sudo {named} ..."


def test_doctor_names_a_wrong_configuration(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key.with_name("domains.toml").write_text("[web-1]\nagnt = 1\n")
    assert cli.main(["doctor"]) == 1
    assert "unknown setting 'agnt'" in capsys.readouterr().out


REPORTS = Path(__file__).parent / "data" / "attestation"
GENOA = ["--report", f"{REPORTS}/genoa-v3.bin", "--chain", f"{REPORTS}/genoa-v3.vcek.pem"]


def test_a_saved_report_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = (REPORTS / "genoa-v3.bin").read_bytes()
    arguments = ["attest", *GENOA, "--chain", f"{REPORTS}/genoa.pem", "--save", f"{tmp_path}/copy"]
    assert cli.main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["measurement"] == raw[0x90:0xC0].hex()
    assert (facts["processor"], facts["policy allows"]) == ("Genoa", "smt")
    assert said.err.splitlines() == [
        "vmishim: the report is genuine, but no agent key was given to check it against",
        "vmishim: the report is genuine, but no requirements are set for it",
        "vmishim: the report is genuine, but the platform's reported TCB is too old: "
        "snp 23 (minimum 27), microcode 84 (minimum 86)",
    ]
    assert (tmp_path / "copy").read_bytes() == raw
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(value in shown for value in facts.values())


def test_a_saved_report_without_its_chain_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attest", *GENOA]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "the issuer of the certificate of SEV-VCEK is missing: CN=SEV-Genoa" in said.err


def test_a_saved_report_is_checked_against_a_domains_entry(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert enroll() == 0
    chain = [f"{REPORTS}/genoa-v3.vcek.pem", f"{REPORTS}/genoa.pem"]
    table = f"[web-1.attestation]\nmeasurement = ['{'00' * 48}']\nchain = {chain}\n"
    key.with_name("domains.toml").open("a").write(table)
    capsys.readouterr()
    # The report vouches for no agent's key: it was made for something else.
    assert cli.main(["attest", "web-1", "--report", f"{REPORTS}/genoa-v3.bin"]) == 1
    assert f"the report vouches for another key than the agent's, {AGENT.fingerprint}" in capsys.readouterr().err


def test_requirements_stay_when_a_guest_is_enrolled_again(key: Path) -> None:
    assert enroll() == 0
    table = f"[web-1.attestation]\nmeasurement = ['{'00' * 48}']\n"
    key.with_name("domains.toml").open("a").write(table)
    assert domains.load()["web-1"].attestation
    assert cli.main(["enroll", "web-1", "tcp://h:1", generate().public.text, "--no-check", "--replace"]) == 0
    found = domains.load()["web-1"]
    assert found.agent == "tcp://h:1"
    assert found.attestation
    assert found.attestation.measurement == {bytes(48)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    made = capsys.readouterr().out
    assert all(command in made for command in COMMANDS)
    assert "vmishim domains --names" in made


@pytest.mark.usefixtures("key")
def test_completion_in_bash(tmp_path: Path) -> None:
    assert enroll() == 0
    made = run("completion", "bash").stdout
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vmishim").write_text(f'#!/bin/sh\nexec {sys.executable} -m vmishim.cli "$@"\n')
    (tmp_path / "bin" / "vmishim").chmod(0o755)
    asked = 'COMP_WORDS=(vmishim ps we); COMP_CWORD=2; _shtab_vmishim; echo "${COMPREPLY[@]}"'
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        ["bash", "-c", f"{made}\n{asked}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": root},
    )
    assert done.stdout == "web-1\n"
