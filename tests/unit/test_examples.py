"""The programs of ``compat/examples`` and ``compat/ids``: what a guest calls its processes and files stays text."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.errors import FaultError
from vmishim.foreign import printable

COMPAT = Path(__file__).parents[2] / "compat"
BASE = 0xFFFF_8880_0000_1000
HOSTILE = [b"x\nFINDING: 1 y", b"\x1b[2J\x1b]0;x\x07", b"\xff\xfe", b"a\r\x9b1mb", "\u202egnp.exe\u200b".encode()]
"""Names that a process may choose; a ``comm`` has up to 15 bytes of them."""


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """The programs import each other, and ``libvmi``, by their bare names."""
    folders = [str(COMPAT), str(COMPAT / "ids"), str(COMPAT / "examples")]
    before = set(sys.modules)
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(COMPAT)):
            del sys.modules[name]


def program(name: str) -> ModuleType:
    return importlib.import_module(name)


class Memory:
    """Kernel memory from ``BASE`` on, with nothing mapped after it. Notes each read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read_va(self, address: int, pid: int, count: int) -> tuple[bytes, int]:
        self.reads.append((address, count))
        at = address - BASE
        if at < 0 or at + count > len(self.data):
            raise FaultError(address)
        return self.data[at : at + count], count


@pytest.mark.parametrize("at", [4096 - 5, 4096 - 16, 4096, 8192 - 9, 100])
def test_a_string_across_pages_is_whole_and_the_page_after_its_end_is_not_read(at: int) -> None:
    memory = Memory((b"\xaa" * at + b"deadbeef\0").ljust(8192, b"\xbb"))
    assert program("linux").Linux(memory, {}).string(BASE + at) == "deadbeef"
    assert all(address // 4096 == (address + count - 1) // 4096 for address, count in memory.reads)


def test_a_string_without_an_end_says_that_it_is_cut() -> None:
    memory = Memory(b"x" * 8192)
    assert program("linux").Linux(memory, {}).string(BASE + 4000) == "x" * 256 + "..."
    with pytest.raises(FaultError):
        program("linux").Linux(memory, {}).string(BASE + 8192 - 9)


@given(st.text())
def test_text_is_escaped_as_by_vmishim(text: str) -> None:
    assert program("report").printable(text) == printable(text)


def test_long_text_is_cut_as_by_vmishim() -> None:
    for text in ("x" * 2000, "x" * 2001, "\n" * 1999):
        assert program("report").printable(text) == printable(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_makes_no_finding_of_its_own_and_does_not_act(
    name: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = program("report")
    monkeypatch.setattr(report, "Libvmi", lambda _: nullcontext(argparse.Namespace(pause_vm=int, resume_vm=int)))
    comm = program("linux").Linux(Memory(name.ljust(16, b"\0")), {}).text(BASE, 16)
    entry = {"pid": 7, "comm": comm, "fd": 3, "path": f"/tmp/{comm}"}
    findings = [{"finding": f"7 {comm} runs /tmp/{comm}, which is deleted"}]
    options = argparse.Namespace(domain="x", offsets=None, json=False)
    assert report.run(options, lambda _: ([entry], findings), program("open_files").line) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert all(line.isprintable() for line in shown)
    assert [line.startswith("FINDING: ") for line in shown] == [False, True]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_with_a_guests_text_does_not_act(
    name: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = program("report")
    monkeypatch.setattr(report, "Libvmi", lambda _: nullcontext(argparse.Namespace(pause_vm=int, resume_vm=int)))

    def look(_: Any) -> Any:
        raise ValueError(f"another kernel: {name.decode(errors='backslashreplace')}")

    assert report.run(argparse.Namespace(domain="x", offsets=None, json=False), look) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.removesuffix("\n").isprintable()


def test_an_error_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = program("report")
    monkeypatch.setattr(report, "Libvmi", lambda _: nullcontext(argparse.Namespace(pause_vm=int, resume_vm=int)))
    options = argparse.Namespace(domain="web-1", offsets=None, json=False)
    look = program("linux").Linux(Memory(b""), {}).string
    assert report.run(options, lambda _: look(BASE)) == 2
    assert capsys.readouterr().err == f"web-1: VMI_FAILURE: no readable memory at {BASE:#x}\n"


@pytest.mark.parametrize("example", ["process_list", "module_list"])
@pytest.mark.parametrize("name", HOSTILE)
def test_an_example_lives_with_any_name(example: str, name: bytes) -> None:
    shown = program(example).text(name.ljust(56, b"\0"))
    assert shown == printable(name.decode(errors="backslashreplace"))
    assert shown.isprintable()
