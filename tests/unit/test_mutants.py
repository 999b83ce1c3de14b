"""Mutants that are written by hand still fit the code that they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from trials.mutation.freshness import REPLACEMENTS, TESTS, Replacement

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", REPLACEMENTS, ids=lambda mutant: mutant.what)
def test_each_changes_its_module(mutant: Replacement) -> None:
    text = ROOT.joinpath(*mutant.module.split(".")).with_suffix(".py").read_text()
    assert mutant.applied(text) != text


def test_a_mutant_that_fits_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="stands in the module 0 times, not once"):
        Replacement("module", "what", "old", "new").applied("new = 1\n")


def test_the_tests_that_must_notice_are_there() -> None:
    assert [name for name in TESTS if not (ROOT / "tests/unit" / name).is_file()] == []
