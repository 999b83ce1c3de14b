"""What becomes of every call of LibVMI's Python API: writes ``docs/libvmi-api.md`` and ``vmishim/scalars.pyi``.

``python compat/coverage.py`` writes both; ``tests/unit/test_surface.py`` holds them true.
"""

from __future__ import annotations

from pathlib import Path

from vmishim import scalars

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "vmishim" / "scalars.pyi"
TABLE = ROOT / "docs" / "libvmi-api.md"
SURFACE = ROOT / "compat" / "surface.json"
CLASSES = ROOT / "compat" / "coverage.json"


def stub() -> str:
    """Text of ``vmishim/scalars.pyi``."""
    lines = [
        "# Written by compat/coverage.py from the table in scalars.py: change that.",
        "from typing import NoReturn",
        "",
        "from vmishim.libvmi import AccessContext",
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


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
