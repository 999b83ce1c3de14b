"""The border for text of others: guests, agents, files of memory, certificates, reports, workers of a cluster.

Such text may be written by an attacker. On a terminal, in a log or in a web page it must neither act (escape sequences,
carriage returns), nor hide or reorder what stands around it (bidirectional marks, zero-width characters), nor flood it.
JSON needs none of this: `json.dumps` escapes all but ASCII.
"""

from __future__ import annotations

LONGEST = 2000
"""Characters of one text that are shown: far more than any honest one has, and half a screen."""

"\0".encode("unicode_escape")  # Python loads this codec when it is first used; a confined agent could not


def printable(text: str, longest: int = LONGEST) -> str:
    """``text`` on one line, with every unprintable character escaped as in a Python string, and cut after ``longest``
    characters. Printable text that is not too long stays as it is."""
    # Cut first: escaping makes up to ten characters of one.
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: longest + 1]
    )
    return escaped if len(escaped) <= longest else f"{escaped[: longest - 3]}..."


def paragraph(text: str, longest: int = 1 << 20) -> str:
    """Text of several lines, such as a traceback or a log, each as by `printable`; tabs become spaces."""
    return "\n".join(map(printable, text[:longest].expandtabs().split("\n")))
