"""``libvmi.conf`` as LibVMI's own grammar reads it. Longer: ``python -m trials.configs``."""

from __future__ import annotations

import json
from pathlib import Path

from trials.configs.compared import generated, genuine, ours

RECORDED = Path(__file__).parents[1] / "unit" / "data" / "configs.json"


def test_configurations_are_read_as_by_libvmi(genuine_too: bool) -> None:
    recorded = [(text.encode("latin-1"), theirs) for text, theirs in json.loads(RECORDED.read_text())]
    cases = dict(recorded)
    if genuine_too:
        texts = [*cases, *generated(500, seed=2)]
        cases = dict(zip(texts, genuine(texts), strict=True))
    assert [text for text, theirs in cases.items() if ours(text) != theirs] == []
    assert all(cases[text] == theirs for text, theirs in recorded)
