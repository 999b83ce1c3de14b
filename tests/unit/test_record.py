"""What is recorded of LibVMI's own bindings: it is of today's cases, complete, and no matter of chance."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract import record
from tests.contract.cases import Case, cases
from tests.contract.outcome import kind

RECORD = record.load()


def test_the_record_is_of_these_cases_and_this_version() -> None:
    """Until it is, the contract asks the genuine bindings as well."""
    assert record.fits(RECORD), "what is asked of LibVMI has changed; ask it: python -m tests.contract.record"


@pytest.mark.parametrize("changed", ["genuine", "ours", "because"])
def test_an_entry_changed_by_hand_is_noticed(changed: str) -> None:
    entries = RECORD["cases"] | {"read_va: kernel": {**RECORD["cases"]["read_va: kernel"], changed: "int"}}
    assert not record.fits({**RECORD, "cases": entries})


def test_every_difference_has_a_reason() -> None:
    for name, entry in RECORD["cases"].items():
        assert ("ours" in entry) == ("because" in entry), name
        assert entry.get("because", next(iter(RECORD["reasons"]))) in RECORD["reasons"], name
    assert {case.name for case in cases()} == RECORD["cases"].keys()
    assert RECORD["reasons"].keys() == {entry["because"] for entry in RECORD["cases"].values() if "because" in entry}


WIDTHS = ("8", "16", "32", "64", "addr")
NUMBERS = [f"read_{width}{place}" for width in WIDTHS for place in ("", "_ksym", "_va", "_pa")]


@pytest.mark.parametrize("call", NUMBERS)
def test_a_number_read_from_memory_is_a_number_whatever_it_is(call: str) -> None:
    assert {kind(Case("any", call, (), {}), {"value": {"int": text}}) for text in ("0", "1", "255")} == {"int"}


def test_a_case_that_reads_a_number_is_recorded_as_that() -> None:
    recorded = {case.call: RECORD["cases"][case.name]["genuine"] for case in cases() if case.call in NUMBERS}
    assert recorded.keys() == set(NUMBERS)
    numbers = {RECORD["cases"][case.name]["genuine"] for case in cases() if case.call in NUMBERS}
    assert {number for number in numbers if not number.startswith("raises ")} == {"int"}


@pytest.mark.parametrize(
    ("call", "result", "expected"),
    [
        ("get_num_vcpus", {"value": {"int": "0"}}, "int 0"),
        ("are_events_pending", {"value": {"int": "-1"}}, "int -1"),
        ("get_memsize", {"value": {"int": "4096"}}, "int"),
        ("read_va", {"value": {"tuple": [{"bytes": "00ff"}, {"int": "2"}]}}, "(2 bytes, 2)"),
        ("read_str_va", {"value": "swapper/0"}, "str"),
        ("read_str_va", {"value": ""}, "str"),
        ("read_8_va", {"raises": "LibvmiError", "text": "VMI_FAILURE"}, "raises LibvmiError VMI_FAILURE"),
        ("read_8_va", {"raises": "TypeError"}, "raises TypeError"),
        ("get_va_pages", {"value": {"list": []}}, "empty list"),
        ("get_va_pages", {"value": {"list": [{"page": {"vaddr": {"int": "0"}}}]}}, "list of page"),
        ("pause_vm", {"value": None}, "None"),
        ("get_ostype", {"value": {"enum": "VMIOS.LINUX"}}, "VMIOS.LINUX"),
    ],
)
def test_a_kind_keeps_types_lengths_and_errors(call: str, result: dict[str, Any], expected: str) -> None:
    assert kind(Case("any", call, (), {}), result) == expected
