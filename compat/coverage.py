"""What becomes of every call of LibVMI's Python API: writes ``docs/libvmi-api.md`` and ``vmishim/libvmi/scalars.pyi``.

``python compat/coverage.py`` from the top of the repository writes both; ``tests/unit/test_surface.py`` holds them
true.
What a call is comes from ``tests/contract/behaviour.json``, which is recorded from the genuine bindings and tested on
all
backends.
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

from vmishim.libvmi import Libvmi, scalars  # noqa: E402

STUB = ROOT / "vmishim" / "libvmi" / "scalars.pyi"
DOCUMENT = ROOT / "docs" / "libvmi-api.md"
SURFACE = ROOT / "compat" / "surface.json"
BEHAVIOUR = ROOT / "tests" / "contract" / "behaviour.json"

BY_HAND = {
    "__init__": ("extension", "needs no configuration; `domain` is a name of `domains.toml`"),
    "destroy": ("exact", ""),
    "get_access_mode": ("extension", "access mode"),
    "init_os": ("extension", "needs no configuration"),
    "init_paging": ("extension", "tells the page mode at once; LibVMI's file driver only after `init_os`"),
}
"""Calls that depend on names of guests, or change the object they are called on: these have tests of their own."""

KINDS = {
    "exact": "does what the genuine bindings do, values and errors alike",
    "extension": "does that, and something where the genuine bindings or LibVMI's file driver fail",
    "refused": "fails as LibVMI's file driver fails, with the same error",
}

BEGIN, END = "<!-- written by compat/coverage.py -->", "<!-- until here -->"
"""What is between these in the document is generated."""


def stub() -> str:
    """Text of ``vmishim/libvmi/scalars.pyi``."""
    lines = [
        "# Written by compat/coverage.py from the table in scalars.py: change that.",
        "from typing import NoReturn",
        "",
        "from vmishim.libvmi.values import AccessContext",
        "",
        "WIDTHS: dict[str, int]",
        "FORMS: dict[str, str]",
        "TYPES: dict[str, str]",
        "WHERE: dict[str, str]",
        "",
        "def read_doc(width: str, form: str) -> str: ...",
        "def write_doc(width: str, form: str) -> str: ...",
        "",
        "class Scalars:",
    ]
    for verb, document, result in (("read", scalars.read_doc, "int"), ("write", scalars.write_doc, "NoReturn")):
        for form, names in scalars.FORMS.items():
            for width in scalars.WIDTHS:
                parameters = names.split(", ") + ["value"] * (verb == "write")
                signature = ", ".join(f"{name}: {scalars.TYPES[name]}" for name in parameters)
                lines.append(f"    def {verb}_{width}{form}(self, {signature}) -> {result}:")
                first, *rest = document(width, form).splitlines()
                lines.append(f'        """{first}')
                lines += [f"        {line}".rstrip() for line in rest]
                lines += ['        """', ""]
    return "\n".join(lines)


def calls() -> list[str]:
    """Every public method of the genuine ``Libvmi``, and its constructor."""
    surface = json.loads(SURFACE.read_text())
    return list(surface["libvmi"]["Libvmi"]["class"]["methods"])


def kinds() -> dict[str, tuple[str, str]]:
    """By call: (what it is, a note)."""
    cases: dict[str, list[dict[str, str]]] = {}
    for name, entry in json.loads(BEHAVIOUR.read_text())["cases"].items():
        cases.setdefault(name.split(": ")[0], []).append(entry)
    return {call: BY_HAND.get(call) or _kind(call, cases[call]) for call in calls()}


def _kind(call: str, entries: list[dict[str, str]]) -> tuple[str, str]:
    ours = [entry.get("ours", entry["genuine"]) for entry in entries]
    # Writing no bytes works, and is no write.
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
        f"Of {len(rows)} calls, held to the genuine bindings by {len(behaviour['cases'])} recorded cases:",
        "",
    ]
    lines += [f"- **{totals[kind]}/{len(rows)} {kind}**: {meaning}" for kind, meaning in KINDS.items()]
    lines += ["", "| call | | what it does |", "|---|---|---|"]
    for call, (kind, note) in rows.items():
        text = (Libvmi if call == "__init__" else getattr(Libvmi, call)).__doc__ or ""
        summary = " ".join(text.split("\n\n")[0].split()).split(" Source:")[0].replace("``", "`")
        lines.append(f"| `{call}` | {kind} | {summary}{f' (*{note}*)' if note else ''} |")
    lines += ["", "What the notes mean, and all that is not as in the genuine bindings in those cases:", ""]
    lines += [f"- *{name}*: {text}." for name, text in behaviour["reasons"].items()]
    return "\n".join([*lines, END])


def document(text: str) -> str:
    """The document with its generated part renewed."""
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


def main() -> None:
    """Write what is generated."""
    STUB.write_text(stub(), encoding="utf-8")
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    for kind, count in Counter(kind for kind, _ in kinds().values()).items():
        print(f"{count:4} {kind}")


if __name__ == "__main__":
    main()
