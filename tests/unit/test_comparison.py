"""Comparing backends, with invented recordings: differences, their explanations, and the output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ground.images import lime
from trials.fuzz import ram
from trials.fuzz.bombs import btf_blob, btf_struct
from vmishim import cli
from vmishim.commands import compare as compare_command
from vmishim.compare import backends, engine, report, verdict
from vmishim.compare.backends import Missing
from vmishim.compare.engine import Job, Round, assemble, judge
from vmishim.compare.recorder import Recording, form
from vmishim.compare.verdict import Run, compare, moved
from vmishim.errors import LibvmiError
from vmishim.guests import domains
from vmishim.guests.domains import Domain
from vmishim.libvmi.constants import VMIOS
from vmishim.wire.keys import generate

HEAD, FIRST, SECOND = 0xFFFF_8880_0000_1000, 0xFFFF_8880_0000_2000, 0xFFFF_8880_0000_3000
JOB = Job("list.py", ["lab"], "lab", "6.1.0-1-amd64", runs=3)


def listing(*entries: int, output: str = "", **more: Any) -> Run:
    """A run of a script that follows a list."""
    ring = [HEAD, *entries, HEAD]
    calls = [("read_addr_va", [at, 0], following) for at, following in pairwise(ring)]
    return Run(calls, output or "".join(f"{entry:#x}\n" for entry in entries), **more)


# Recording.


class Dummy:
    """Stands in for a ``Libvmi``."""

    def __init__(self, domain: str, partial: bool = False) -> None:
        self.domain = domain

    def get_name(self) -> str:
        return self.domain

    def read_va(self, vaddr: int, pid: int, count: int) -> tuple[bytes, int]:
        return self.read_8_va(vaddr, pid).to_bytes(1, "little") * count, count

    def read_8_va(self, vaddr: int, pid: int) -> int:
        if vaddr == 0:
            raise LibvmiError("VMI_FAILURE: more words")
        return 65

    def pages(self) -> Iterator[int]:
        yield from range(3)


def test_calls_are_recorded_as_the_script_makes_them(tmp_path: Path) -> None:
    before, recording = dict(vars(Dummy)), Recording()
    with recording.of(Dummy, rename=lambda name: f"/run/{name}", name="lab"):
        vmi = Dummy("lab", partial=True)
        assert vmi.domain == "/run/lab"
        assert vmi.get_name() == "lab"
        assert vmi.read_va(1, 0, count=2) == (b"AA", 2)
        with pytest.raises(LibvmiError):
            vmi.read_8_va(0, 0)
        assert list(vmi.pages()) == [0, 1, 2]
    assert recording.calls == [
        ("Libvmi", ["lab", {"named": [["partial", True]]}], None),
        ("get_name", [], "lab"),
        ("read_va", [1, 0, {"named": [["count", 2]]}], {"tuple": [{"bytes": "4141"}, 2]}),
        ("read_8_va", [0, 0], {"raises": "LibvmiError VMI_FAILURE"}),
        ("pages", [], [0, 1, 2]),
    ]
    assert dict(vars(Dummy)) == before
    recording.write(str(tmp_path / "run"), seconds=1.5)
    head, *calls = (tmp_path / "run").read_text().splitlines()
    assert json.loads(head) == {"connecting": recording.connecting, "seconds": 1.5}
    assert [tuple(json.loads(call)) for call in calls] == recording.calls


def test_only_connecting_is_timed_when_calls_are_not_wanted() -> None:
    recording = Recording()
    with recording.of(Dummy, calls=False):
        Dummy("lab").read_8_va(1, 0)
    assert recording.calls == []
    assert recording.connecting > 0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.binary() | st.text(), st.lists, max_leaves=10))
def test_different_values_have_different_forms(value: Any) -> None:
    assert json.loads(json.dumps(form(value))) == form(value)
    assert form((value,)) != form([value])
    assert form(VMIOS.LINUX) == {"enum": "VMIOS.LINUX"}


# Verdicts.


@pytest.mark.parametrize("calls", [[], [("Libvmi", ["lab"], None), ("pause_vm", [], None), ("destroy", [], None)]])
def test_a_script_that_asked_nothing_did_not_agree(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(calls, errors="Traceback\nImportError: no numpy\n", status=1)
    runs = {"ramfile": run, "agent-batch": run}
    made = assemble(JOB, Round("ramfile", runs, run), judge([Round("ramfile", runs, run)], False), {})
    assert made["result"] == "nothing"
    assert compare_command.EXIT[made["result"]] == 2
    report.table(made)
    told = capsys.readouterr().out
    assert "the same" not in told
    assert told.splitlines()[-2:] == [
        "ImportError: no numpy",
        "The script asked the guest nothing, so there is nothing to compare.",
    ]
    assert "nothing was asked" in report.page(made)


def test_one_question_without_a_read_is_enough() -> None:
    run = Run([("Libvmi", ["lab"], None), ("get_memsize", [], 5)])
    runs = {"ramfile": run, "agent-batch": run}
    made = assemble(JOB, Round("ramfile", runs, run), judge([Round("ramfile", runs, run)], False), {})
    assert made["result"] == "agreed"


def test_one_of_a_thing_is_not_many(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = Run([("read_8_va", [HEAD, 0], 1)]), Run([("read_8_va", [HEAD, 0], 2)])
    runs = {"ramfile": one, "agent-batch": other}
    made = assemble(JOB, Round("ramfile", runs, one), judge([Round("ramfile", runs, one)], True), {})
    report.table(made)
    told = capsys.readouterr().out
    assert "in 1 place; it made 1 call:" in told
    assert re.search(r"\b1 \w+s\b", told.replace("1 CPUs", "")) is None


def test_the_same_answers_agree() -> None:
    found = compare(listing(FIRST, SECOND), listing(FIRST, SECOND))
    assert (found.word, found.total, found.differences) == ("same", 0, [])


def test_a_different_answer_is_found_and_the_first_read_is_named() -> None:
    found = compare(listing(FIRST, SECOND), listing(FIRST))
    assert (found.word, found.unexplained) == ("differ", found.total)
    first = found.differences[0]
    assert first.call == f"read_addr_va({FIRST:#x}, 0)"
    assert (first.reference, first.other) == (f"{SECOND:#x}", f"{HEAD:#x}")
    assert [each.call for each in found.differences[1:]] == [f"read_addr_va({SECOND:#x}, 0)", "line 2 of the output"]


def test_memory_that_others_saw_change_explains_a_difference_and_what_follows() -> None:
    before, other, after = listing(FIRST, SECOND), listing(FIRST), listing(FIRST)
    found = compare(before, other, moved([before, after]))
    assert (found.word, found.unexplained, found.total) == ("moved", 0, 3)


def test_a_backend_cannot_explain_its_own_difference() -> None:
    rounds = [
        Round("ramfile", {"ramfile": listing(FIRST), "agent-page": page}, listing(FIRST))
        for page in (listing(SECOND), listing(FIRST, SECOND))
    ]
    assert judge(rounds, stopped=False)["agent-page"].word == "differ"


def test_a_difference_on_a_stopped_guest_is_not_excused() -> None:
    now, then = listing(FIRST), listing(SECOND)
    taken = Round("native", {"native": now, "ramfile": then, "agent-batch": then}, then)
    assert {name: each.word for name, each in judge([taken], True).items()} == {
        "ramfile": "differ",
        "agent-batch": "moved",
    }
    assert {each.word for each in judge([taken], False).values()} == {"moved"}


def test_a_script_that_asks_other_questions_differs() -> None:
    more = Run([*listing(FIRST).calls, ("read_8_ksym", ["jiffies"], 1)], listing(FIRST).output)
    found = compare(listing(FIRST), more)
    assert (found.word, found.differences[0].call) == ("differ", 'read_8_ksym("jiffies")')
    assert found.differences[0].reference is None


@pytest.mark.parametrize("other", [listing(FIRST, output="else\n"), listing(FIRST, status=1)])
def test_output_and_exit_status_count(other: Run) -> None:
    assert compare(listing(FIRST), other).word == "differ"


def test_a_repeated_question_is_compared_separately() -> None:
    twice = Run([("read_64_ksym", ["jiffies"], 1), ("read_64_ksym", ["jiffies"], 2)])
    other = Run([("read_64_ksym", ["jiffies"], 1), ("read_64_ksym", ["jiffies"], 3)])
    assert compare(twice, twice).word == "same"
    (difference,) = compare(twice, other).differences
    assert difference.call == 'read_64_ksym("jiffies"), asked for the 2nd time'


@given(st.lists(st.sampled_from([FIRST, SECOND]), max_size=6), st.lists(st.sampled_from([FIRST, SECOND]), max_size=6))
def test_only_equal_runs_are_the_same(one: list[int], two: list[int]) -> None:
    first, second = listing(*one), listing(*two)
    assert (compare(first, second).word == "same") == (first == second)
    assert compare(first, second, moved([first, second])).word != "differ"


def test_reads_and_pages_are_counted() -> None:
    context = {"ctx": {"tr_mechanism": {"enum": "TranslateMechanism.PROCESS_PID"}, "addr": 0x5000, "dtb": 0, "pid": 7}}
    run = Run(
        [
            ("translate_ksym2v", ["init_task"], HEAD),
            ("read_addr_va", [HEAD, 0], FIRST),
            ("read_32_va", [HEAD + 0xFFE, 0], 1),  # crosses into the next page
            ("read_va", [HEAD, 0, 8192], {"tuple": [{"bytes": "00" * 8192}, 8192]}),
            ("read_str_va", [{"named": [["vaddr", HEAD + 5], ["pid", 0]]}], "abc"),
            ("read_8_ksym", ["jiffies"], 1),
            ("read_8_pa", [0x5000], 1),
            ("read_8", [context], 1),
        ]
    )
    assert (run.reads, run.pages) == (7, 5)


# Output.


def made(**agent: Any) -> dict[str, Any]:
    """A report of three backends; the arguments set the last one."""
    runs = {
        "native": listing(FIRST, SECOND, seconds=0.5, connecting=0.48),
        "ramfile": listing(FIRST, SECOND, seconds=0.4, connecting=0.39),
        "agent-batch": listing(FIRST, SECOND, seconds=0.08, connecting=0.07, requests=2, carried=5000),
    }
    runs["agent-batch"] = Run(**{**vars(runs["agent-batch"]), **agent})
    taken = Round("native", runs, runs["native"])
    missing = [Missing("agent-page", "no <agent>", "make one")]
    return assemble(JOB, taken, judge([taken], True), {name: [run] * 3 for name, run in runs.items()}, missing)


class Parsed(HTMLParser):
    """The open elements, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_times_are_medians_and_ratios_to_native() -> None:
    rows = {row["name"]: row for row in made()["backends"]}
    assert list(rows) == ["native", "ramfile", "agent-batch"]
    batch = rows["agent-batch"]
    assert (batch["connecting"], batch["whole"], batch["requests"], batch["bytes"]) == (70.0, 80.0, 2, 5000)
    assert (batch["reading_ratio"], batch["whole_ratio"]) == (0.5, 0.16)
    assert (rows["native"]["answers"], batch["answers"], batch["reads"]) == ("reference", "same", 3)


def test_the_page_is_self_contained_and_well_formed() -> None:
    text = report.page(made())
    page = Parsed(text)
    assert page.open == []
    assert {"table", "figure"} <= page.seen
    assert not {"script", "link", "img"} & page.seen
    # Where a page is too narrow for columns, each cell names its own.
    assert text.count("data-title='requests'") == len(made()["backends"])
    assert "times native's" in page.words
    assert "ratio" not in " ".join(page.words)
    assert "://" not in text
    assert "prefers-color-scheme: dark" in text
    said = "".join(page.words)
    assert "All backends gave the same answers." in said
    assert "no <agent>" in said


def test_differences_are_on_the_page_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = [("read_str_va", [HEAD, 0], "\x1b[2J<script>")]
    differs = made(calls=[*listing(FIRST, SECOND).calls, *hostile])
    assert differs["result"] == "differ"
    text = report.page(differs)
    assert "script" not in Parsed(text).seen
    report.table(differs)
    said = capsys.readouterr().out
    assert "\x1b" not in said + text
    assert f"read_str_va({HEAD:#x}, 0): nothing, here" in said
    assert "The answers differ." in said
    assert "no agent-page: no <agent>" in said


def test_a_backend_that_failed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    failed = made(calls=[], failed="it ended with signal SIGSEGV")
    assert failed["result"] == "error"
    assert "SIGSEGV" in report.page(failed)
    report.table(failed)
    assert "agent-batch failed: it ended with signal SIGSEGV" in capsys.readouterr().out


def test_numbers_are_short() -> None:
    assert [report.number(count) for count in (None, 0, 1234)] == ["-", "0", "1,234"]
    assert [report.milliseconds(time) for time in (None, 0.1234, 12.34, 1234.5)] == [
        "-",
        "0.12 ms",
        "12.3 ms",
        "1,234 ms",
    ]
    assert [report.ratio(of) for of in (None, 0.163, 12.34, 123.4)] == ["-", "0.16x", "12.3x", "123x"]
    assert verdict.described(("read_va", "[4096, 0, 16]", 0)) == "read_va(4096, 0, 16)"


# The command, when there is nothing to compare.


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with enrolled guests."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    monkeypatch.delenv("VMISHIM_GENUINE_PYTHON", raising=False)
    (tmp_path / "script.py").write_text("import libvmi\n")
    return tmp_path


def test_an_entry_may_have_an_agent_and_a_ramfile(config: Path) -> None:
    entry = f'[lab]\nagent = "tcp://h:1"\nagent_key = "{generate().public.text}"\nkey = "k"\nramfile = "/run/ram"\n'
    (config / "domains.toml").write_text(entry)
    lab = domains.find("lab")
    assert (lab.agent, lab.ramfile) == ("tcp://h:1", "/run/ram")


@pytest.mark.parametrize(
    ("write", "expected"), [(bytes, "no interpreter"), (lambda memory: lime({0: memory}), "this LiME image has")]
)
def test_native_reads_no_file_that_has_memory_elsewhere(
    tmp_path: Path, write: Callable[[bytes], bytes], expected: str
) -> None:
    file = tmp_path / "memory"
    file.write_bytes(write(ram.guest(btf_blob(btf_struct(1, []), b"\0a\0"))))
    found = {each.name: each for each in backends.find(Domain("seized", ramfile=str(file)), tmp_path)}
    assert isinstance(found["ramfile"], backends.Backend)
    native = found["native"]
    assert isinstance(native, backends.Missing)
    assert expected in native.why


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such.py"], "no such script: no-such.py"),
        (["script.py"], "no domain is enrolled yet"),
        (["--domain", "web-9", "script.py"], "no domain 'web-9'"),
        (["--domain", "gone", "script.py"], "but none can be used; no agent-scalar: the entry gone has no agent"),
        (["--domain", "gone", "--only", "ramfile,nativ", "script.py"], "unknown backend nativ"),
        (["--domain", "gone", "--qmp", "nowhere", "script.py"], "no QEMU monitor answers there"),
        (["--only", "ramfile", "--domain", "gone", "script.py"], "none can be used"),
        (["script.py", "one", "two"], "name several guests"),
        (["script.py", "three"], "name no guest"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_status_2(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(config)
    if "gone" in arguments or "three" in arguments or "two" in arguments:
        names = ["gone"] if "gone" in arguments else ["one", "two"]
        (config / "domains.toml").write_text("".join(f'[{name}]\nramfile = "{config}/nothing"\n' for name in names))
    assert cli.main(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("vmishim: ")
    assert said.err.count("\n") == 1
    assert told in said.err
    assert not list(config.glob("compare.*"))


def test_the_reference_is_an_available_backend() -> None:
    assert set(engine.REFERENCE) == set(report.MEANING)
