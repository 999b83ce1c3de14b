"""``libvmi.so.0`` without a compiler and without a guest: what it declares, how a program is started by it, what its
Python half refuses, and what reads of many pages ask for."""

from __future__ import annotations

import json
import os
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from vmishim import capi, cli, isolated, program
from vmishim.errors import FaultError
from vmishim.libvmi.profiles import JsonProfile
from vmishim.memory.pages import AHEAD_MAX, Pages
from vmishim.memory.reader import KERNEL, PAGE_SIZE, PHYSICAL
from vmishim.script import Inherited

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "compat" / "capi"
FUNCTIONS: dict[str, list[str]] = json.loads((ROOT / "tests/unit/data/libvmi-functions.json").read_text())
"""The functions that LibVMI's five headers declare, development branch of 2025, by header."""
WIDTHS = ("8", "16", "32", "64", "addr")


def expanded(text: str) -> set[str]:
    """The names of LibVMI's functions in C text, with ours of a macro for each width."""
    found = set(re.findall(r"\b((?:vmi|peparse)_[a-z0-9_]+)\(", text))
    for stem, end in re.findall(r"\b(vmi_(?:read|write)_)##NAME(?:##(_\w+))?\(", text):
        found |= {f"{stem}{width}{end}" for width in WIDTHS}
    return found


def test_the_headers_have_173_functions() -> None:
    assert {header: len(names) for header, names in FUNCTIONS.items()} == {
        "libvmi.h": 134,
        "events.h": 16,
        "libvmi_extra.h": 9,
        "slat.h": 8,
        "peparse.h": 6,
    }


def test_all_functions_of_the_headers_are_declared() -> None:
    declared = expanded((SOURCES / "libvmi.h").read_text())
    # LibVMI's library has this one under another name than its header.
    assert declared == {*chain(*FUNCTIONS.values()), "vmi_get_struct_field_type_name"}


@pytest.mark.parametrize("name", ["process-list", "sh"])
def test_a_program_is_told_from_a_script(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = tmp_path / name
    compiled.write_bytes(b"\x7fELF" + bytes(60))
    compiled.chmod(0o755)
    script = tmp_path / "script.py"
    script.write_text("print(1)\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program.find(str(compiled)) == program.find(name) == str(compiled)
    assert program.find(str(script)) is None
    assert program.find("no-such-program") is None


def test_without_the_library_a_program_is_not_started_and_the_text_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "LIBRARY", tmp_path / "libvmi.so.0")
    command = " ".join(isolated.file(program.FOLDER / "build.py"))
    assert cli.main(["run", "--", "/bin/true", "web-1"]) == 1
    assert capsys.readouterr().err == (
        "vmishim: libvmi.so.0, for compiled programs, is not built; with gcc and python3-dev installed, run: "
        f"{command}\n"
    )


def test_a_program_gets_the_library_the_interpreter_and_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LIBRARY", tmp_path / "libvmi.so.0")
    (tmp_path / "libvmi.so.0").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    before = dict(os.environ)
    found = program.environment(Inherited("page"), program.Settings("0.14", poll=True, stats=True))
    assert {name: value for name, value in found.items() if before.get(name) != value} == {
        "LD_LIBRARY_PATH": f"{program.FOLDER}:/opt/lib",
        "VMISHIM_PYTHON": sys.executable,
        "VMISHIM_SCRIPT": '{"strategy": "page", "entry": null}',
        "VMISHIM_LIBVMI_ABI": "0.14",
        "VMISHIM_LIBVMI_EVENTS": "poll",
        "VMISHIM_LIBVMI_STATS": "1",
    }


@pytest.mark.parametrize(("words", "status"), [("exit 7", 7), ("kill -TERM $$", 143)])
def test_a_programs_exit_status_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, status: int
) -> None:
    monkeypatch.setattr(program, "LIBRARY", tmp_path / "libvmi.so.0")
    (tmp_path / "libvmi.so.0").touch()
    assert program.run("/bin/sh", ["-c", words], Inherited(), program.Settings()) == status


def test_options_of_programs_are_refused_for_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "ids.py"
    script.touch()
    assert cli.main(["run", "--abi", "0.14", str(script)]) == 1
    assert capsys.readouterr().err == (
        f"vmishim: --abi and --poll-events are for compiled programs, and {script} is none\n"
    )


def test_the_command_line_knows_every_abi() -> None:
    for abi in capi.ABIS:
        assert cli.parser().parse_args(["run", "--abi", abi, "program"]).abi == abi
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["run", "--abi", "0.13", "program"])


@pytest.mark.parametrize(
    ("variables", "flags", "code", "words"),
    [
        ({"VMISHIM_LIBVMI_ABI": "0.12"}, 1, 2, "VMISHIM_LIBVMI_ABI=0.12 is not one of 0.14, 0.15"),
        ({"VMISHIM_LIBVMI_EVENTS": "yes"}, 1, 6, "VMISHIM_LIBVMI_EVENTS=yes is not poll"),
        ({}, 5, 6, "vmishim has no events, and the program asked for them (VMI_INIT_EVENTS)"),
        ({}, 8, 1, "neither VMI_INIT_DOMAINNAME nor VMI_INIT_DOMAINID"),
        ({}, 1, 1, "nobody"),
        ({"VMISHIM_LIBVMI_EVENTS": "poll"}, 5, 1, "nobody"),
    ],
)
def test_what_cannot_be_opened_is_a_number_and_a_reason(
    variables: dict[str, str],
    flags: int,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert capi.opened("nobody", flags, None, False, 1, "{}") == code
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("libvmi.so.0 of vmishim ")
    assert said.count("\n") == 1


class Counted:
    """Memory from address 0 up, that counts requests as (address, bytes)."""

    def __init__(self, size: int, hole: range = range(0)) -> None:
        self.memory, self.hole = os.urandom(size), hole
        self.asked: list[tuple[int, int]] = []

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        self.asked.append((address, count))
        end = address + count
        for at in (address, self.hole.start):
            if address <= at < end and (at in self.hole or at >= len(self.memory)):
                raise FaultError(at, self.memory[address:at])
        if end > len(self.memory):
            raise FaultError(len(self.memory), self.memory[address:])
        return self.memory[address:end]


def test_physical_memory_read_in_ascending_order_is_fetched_ahead() -> None:
    memory = Counted(1000 * PAGE_SIZE)
    pages = Pages(memory, now=lambda: 0.0)
    for at in range(0, len(memory.memory), PAGE_SIZE):
        assert pages.read(at, PAGE_SIZE, PHYSICAL) == memory.memory[at : at + PAGE_SIZE]
    assert [count // PAGE_SIZE for _, count in memory.asked] == [
        1,
        4,
        16,
        64,
        AHEAD_MAX,
        AHEAD_MAX,
        AHEAD_MAX,
        AHEAD_MAX,
    ]


def test_reading_ahead_ends_at_a_hole_which_stays_one() -> None:
    hole = range(40 * PAGE_SIZE, 42 * PAGE_SIZE)
    memory = Counted(100 * PAGE_SIZE, hole)
    pages = Pages(memory, now=lambda: 0.0)
    for at in range(0, len(memory.memory), PAGE_SIZE):
        if at in hole:
            with pytest.raises(FaultError) as raised:
                pages.read(at, PAGE_SIZE, PHYSICAL)
            assert raised.value.address == at
        else:
            assert pages.read(at, PAGE_SIZE, PHYSICAL) == memory.memory[at : at + PAGE_SIZE]


def test_kernel_memory_is_not_fetched_ahead() -> None:
    memory = Counted(8 * PAGE_SIZE)
    pages = Pages(memory, now=lambda: 0.0)
    for at in range(0, len(memory.memory), PAGE_SIZE):
        pages.read(at, PAGE_SIZE)
    assert memory.asked == [(at, PAGE_SIZE) for at in range(0, len(memory.memory), PAGE_SIZE)]


def test_within_a_hold_what_is_fetched_ahead_replaces_no_answer() -> None:
    memory = Counted(8 * PAGE_SIZE)
    pages = Pages(memory, now=lambda: 0.0)
    pages.hold()
    first = pages.read(3 * PAGE_SIZE, PAGE_SIZE, PHYSICAL)
    memory.memory = os.urandom(len(memory.memory))
    for at in range(0, len(memory.memory), PAGE_SIZE):
        expected = first if at == 3 * PAGE_SIZE else memory.memory[at : at + PAGE_SIZE]
        assert pages.read(at, PAGE_SIZE, PHYSICAL) == expected


ISF = {
    "metadata": {},
    "symbols": {"init_task": {"address": 0xFFFFFFFF82000000}},
    "base_types": {"int": {"size": 4}},
    "enums": {},
    "user_types": {
        "flags": {
            "size": 8,
            "fields": {
                "low": {"offset": 0, "type": {"kind": "base", "name": "int"}},
                "few": {"offset": 4, "type": {"kind": "bitfield", "bit_position": 3, "bit_length": 2, "type": {}}},
            },
        }
    },
}
REKALL = {
    "$METADATA": {},
    "$CONSTANTS": {},
    "$STRUCTS": {"flags": [8, {"few": [4, ["BitField", {"start_bit": 3, "end_bit": 5}]], "low": [0, ["int"]]}]},
}


@pytest.mark.parametrize("profile", [ISF, REKALL], ids=["ISF", "Rekall"])
def test_bit_fields_of_json_profiles(profile: Any) -> None:
    found = JsonProfile("profile", profile)
    assert found.bits("flags", "few") == (4, 3, 5)
    for struct, member in (("flags", "low"), ("flags", "none"), ("none", "few")):
        with pytest.raises(KeyError):
            found.bits(struct, member)


def test_names_of_types_are_known_of_symbol_files() -> None:
    assert JsonProfile("profile", ISF).type_name("flags", "low") == "int"
    with pytest.raises(KeyError):
        JsonProfile("profile", ISF).type_name("flags", "few")
    with pytest.raises(KeyError):
        JsonProfile("profile", REKALL).type_name("flags", "low")
