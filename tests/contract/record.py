"""``behaviour.json``: what the genuine bindings do in every case, and what it was recorded of.

``python -m tests.contract.record``, from the top of the repository, boots a guest, asks them, and writes it. Entries
keep what they say of ours.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

from lab.environment import LIBVMI
from tests.contract import driver, outcome
from tests.contract.cases import Context, Place, cases
from tests.contract.genuine import CrashError
from tests.contract.outcome import VARIES, kind
from tests.contract.scene import scene

FILE = Path(__file__).with_name("behaviour.json")
SURFACE = Path(__file__).parents[2] / "compat" / "surface.json"

Record = dict[str, Any]


def load() -> Record:
    """The record as it is."""
    found: Record = json.loads(FILE.read_text())
    return found


def stamp(record: Record) -> str:
    """A hash of all that decides what the genuine bindings are asked and what was recorded of it."""
    asked = [[case.name, case.call, _form(case.args), _form(case.kwargs)] for case in cases()]
    rules = [inspect.getsource(rule) for rule in (outcome.outcome, outcome.kind, outcome._kind)]
    parts = [LIBVMI, asked, rules, Path(driver.__file__).read_text(), SURFACE.read_text(), record["cases"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fits(record: Record) -> bool:
    """Whether the record is of these cases, this driver, these rules and this version of LibVMI."""
    return bool(record["stamp"] == stamp(record))


def _form(value: Any) -> Any:
    if isinstance(value, Context):
        return [str(value.mechanism), _form(value.fields)]
    if isinstance(value, dict):
        return [[key, _form(item)] for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [_form(item) for item in value]
    if value is None or isinstance(value, Place | enum.Enum | int | float | str | bytes):
        return repr(value)
    return type(value).__name__


def main() -> None:
    """Boot, ask, write."""
    known = load()
    recorded: Record = {}
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder)) as lab:
        lab.vm.pause()
        genuine, ours = lab.genuine(), lab.ramfile()
        for case in cases():
            entry = recorded[case.name] = dict(known["cases"].get(case.name, {}))
            if entry.get("genuine") == VARIES:
                continue
            try:
                entry["genuine"] = kind(case, outcome.outcome(genuine, case, lab.places))
            except CrashError:
                entry["genuine"] = "crashes"
                genuine = lab.genuine()
            mine = kind(case, outcome.outcome(ours, case, lab.places))
            if mine != entry.get("ours", entry["genuine"]):
                print(
                    f"{case.name}: genuine {entry['genuine']}, ours {mine}: fix, or explain with 'ours' and 'because'"
                )
            if entry.get("ours") == entry["genuine"]:
                del entry["ours"], entry["because"]
    record: Record = {"stamp": "", "reasons": known["reasons"], "cases": recorded}
    record["stamp"] = stamp(record)
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
