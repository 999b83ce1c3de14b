"""Write ``behaviour.json``: what the genuine bindings do in every case. Entries keep what they say of ours.

``python -m tests.contract.record`` from the top of the repository.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.contract.cases import cases
from tests.contract.genuine import CrashError
from tests.contract.outcome import VARIES, kind, outcome
from tests.contract.scene import scene

FILE = Path(__file__).with_name("behaviour.json")


def main() -> None:
    """Boot, ask, write."""
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"reasons": {}, "cases": {}}
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder)) as lab:
        lab.vm.pause()
        genuine, ours = lab.genuine(), lab.ramfile()
        for case in cases():
            entry = recorded[case.name] = dict(known["cases"].get(case.name, {}))
            if entry.get("genuine") == VARIES:
                continue
            try:
                entry["genuine"] = kind(outcome(genuine, case, lab.places))
            except CrashError:
                entry["genuine"] = "crashes"
                genuine = lab.genuine()
            mine = kind(outcome(ours, case, lab.places))
            if mine != entry.get("ours", entry["genuine"]):
                print(
                    f"{case.name}: genuine {entry['genuine']}, ours {mine}: fix, or explain with 'ours' and 'because'"
                )
            if entry.get("ours") == entry["genuine"]:
                del entry["ours"], entry["because"]
    FILE.write_text(json.dumps({"reasons": known["reasons"], "cases": recorded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
