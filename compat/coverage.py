"""Writes ``docs/libvmi-api.md``: what each call of LibVMI's Python API does here.

Run ``python compat/coverage.py`` from the top of the repository; ``tests/unit/test_surface.py`` fails if the document
is out of date. Whether a call is exact, an extension or refused comes from ``tests/contract/behaviour.json``, which is
recorded from the genuine bindings and tested on all backends.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path = [folder for folder in sys.path if folder != str(ROOT / "compat")]

from vmishim.libvmi import Libvmi  # noqa: E402

DOCUMENT = ROOT / "docs" / "libvmi-api.md"
SURFACE = ROOT / "compat" / "surface.json"
BEHAVIOUR = ROOT / "tests" / "contract" / "behaviour.json"

BY_HAND = {
    "__init__": ("extension", "needs no configuration; `domain` is a name of `domains.toml`"),
    "destroy": ("exact", ""),
    "get_access_mode": ("extension", "access mode"),
    "init_os": ("extension", "needs no configuration"),
    "init_paging": ("extension", "returns the page mode at once; LibVMI's file driver only after `init_os`"),
}
"""Calls that depend on names of guests or change the object they are called on; they have tests of their own."""

KINDS = {
    "exact": "does what the genuine bindings do, values and errors alike",
    "extension": "does that, and also works where the genuine bindings or LibVMI's file driver fail",
    "refused": "fails as LibVMI's file driver does, with the same error",
}

BEGIN, END = "<!-- written by compat/coverage.py -->", "<!-- until here -->"
"""The document is generated between these two lines."""


def calls() -> list[str]:
    """Every public method of the genuine ``Libvmi``, and its constructor."""
    surface = json.loads(SURFACE.read_text())
    return list(surface["libvmi"]["Libvmi"]["class"]["methods"])


def kinds() -> dict[str, tuple[str, str]]:
    """(kind, note) of each call."""
    cases: dict[str, list[dict[str, str]]] = {}
    for name, entry in json.loads(BEHAVIOUR.read_text())["cases"].items():
        cases.setdefault(name.split(": ")[0], []).append(entry)
    return {call: BY_HAND.get(call) or _kind(call, cases[call]) for call in calls()}


def _kind(call: str, entries: list[dict[str, str]]) -> tuple[str, str]:
    ours = [entry.get("ours", entry["genuine"]) for entry in entries]
    # Writing no bytes succeeds, but writes nothing.
    if all(came.startswith("raises") or (call.startswith("write") and came == "int 0") for came in ours):
        return "refused", ""
    reasons = sorted({entry["because"] for entry in entries if "because" in entry})
    return ("extension", ", ".join(reasons)) if reasons else ("exact", "")


def table() -> str:
    """The generated part of the document."""
    behaviour: dict[str, Any] = json.loads(BEHAVIOUR.read_text())
    rows = kinds()
    totals = Counter(kind for kind, _ in rows.values())
    lines = [
        BEGIN,
        f"{len(rows)} calls, compared with the genuine bindings in {len(behaviour['cases'])} recorded cases:",
        "",
    ]
    lines += [f"- **{totals[kind]}/{len(rows)} {kind}**: {meaning}" for kind, meaning in KINDS.items()]
    lines += ["", "| call | kind | what it does |", "|---|---|---|"]
    for call, (kind, note) in rows.items():
        text = (Libvmi if call == "__init__" else getattr(Libvmi, call)).__doc__ or ""
        summary = " ".join(text.split("\n\n")[0].split()).split(" Source:")[0].replace("``", "`")
        lines.append(f"| `{call}` | {kind} | {summary}{f' (*{note}*)' if note else ''} |")
    lines += ["", "What the notes mean. In the recorded cases, nothing else differs from the genuine bindings:", ""]
    lines += [f"- *{name}*: {text}." for name, text in behaviour["reasons"].items()]
    return "\n".join([*lines, END])


def document(text: str) -> str:
    """The document's text with the generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


def main() -> None:
    """Write the generated part of the document, and print how many calls there are of each kind."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    for kind, count in Counter(kind for kind, _ in kinds().values()).items():
        print(f"{count:4} {kind}")


if __name__ == "__main__":
    main()
