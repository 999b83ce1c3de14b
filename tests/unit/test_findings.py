"""Findings, and the baselines that accept them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis.strategies import builds, dictionaries, lists, sampled_from, text

from vmishim.inspection.findings import Baseline, Finding, Severity, worst

FINDING = Finding("hidden-process", Severity.HIGH, "sleep", "7 sleep", "two lists", {"task_struct": 1 << 63}, pid=7)
FINDINGS = builds(Finding, text(), sampled_from(Severity), text(), text(), text())


@given(dictionaries(text(), lists(FINDINGS, max_size=4), max_size=4))
def test_a_baseline_accepts_what_it_was_made_of_and_nothing_else(found: dict[str, list[Finding]]) -> None:
    baseline = Baseline.parse(Baseline.of(found).text())
    assert all(baseline.unknown(domain, findings) == [] for domain, findings in found.items())
    assert baseline.unknown("a guest that is in no baseline" * 9, [FINDING]) == [FINDING]
    other = Finding("another id" * 9, Severity.LOW, "", "", "")
    assert all(baseline.unknown(domain, [other]) == [other] for domain in found)


def test_another_process_of_the_same_name_is_known_and_of_another_name_is_not() -> None:
    baseline = Baseline.of({"web-1": [FINDING]})
    again = Finding("hidden-process", Severity.HIGH, "sleep", "8 sleep", "two lists", {"task_struct": 1}, pid=8)
    other = Finding("hidden-process", Severity.HIGH, "sh", "7 sh", "two lists", {"task_struct": 1 << 63}, pid=7)
    assert baseline.unknown("web-1", [FINDING, again, other]) == [other]
    assert baseline.unknown("web-2", [FINDING]) == [FINDING]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a baseline of version 1"),
        ('{"vmishim_baseline": 2, "domains": {}}', "not a baseline of version 1"),
        ('{"vmishim_baseline": 1}', "'domains' is missing"),
        ('{"vmishim_baseline": 1, "domains": {"web-1": [["id"]]}}', "the findings of 'web-1'"),
        ('{"vmishim_baseline": 1, "domains": {"web-1": [["id", 1]]}}', "the findings of 'web-1'"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Baseline.parse(text)


def test_json_has_every_member_and_addresses_as_text() -> None:
    assert json.loads(json.dumps(FINDING.plain())) == {
        "check": "",
        "id": "hidden-process",
        "severity": "high",
        "subject": "sleep",
        "text": "7 sleep",
        "compared": "two lists",
        "evidence": {"task_struct": "0x8000000000000000"},
        "look_next": "",
        "technique": "",
        "pid": 7,
    }


def test_the_worst_finding_counts() -> None:
    low = Finding("raw-socket", Severity.LOW, "", "", "")
    assert worst([low, FINDING, low]) == Severity.HIGH
    assert worst([]) is None
