"""``libvmi.conf`` and JSON profiles as LibVMI's own code reads them. Longer: ``python -m trials.configs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trials.configs.__main__ import KINDS
from trials.configs.compared import genuine

RECORDED = Path(__file__).parents[1] / "unit" / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_as_by_libvmi(kind: str, genuine_too: bool) -> None:
    made, read = KINDS[kind]
    recorded = [
        (text.encode("latin-1"), theirs) for text, theirs in json.loads((RECORDED / f"{kind}.json").read_text())
    ]
    cases = dict(recorded)
    if genuine_too:
        texts = [*cases, *made(500, 2)]
        cases = dict(zip(texts, genuine(texts, kind), strict=True))
    assert [text for text, theirs in cases.items() if read(text) != theirs] == []
    assert all(cases[text] == theirs for text, theirs in recorded)
