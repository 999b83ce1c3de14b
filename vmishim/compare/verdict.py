"""Whether two runs of a script got the same answers. Values in, values out.

A script that gets the same answers asks the same questions. So runs are compared question by question: what did the
n-th call with these arguments return? Where the answers differ, either one of them is wrong, or the guest's memory
changed in between. A change is accepted only if another backend saw it: one that gave two answers to that same question
in different runs. Questions that only one run asked follow from an answer that differed; if none did, the script itself
is not deterministic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

Question = tuple[str, str, int]
"""Name of a call, its arguments, and how many times they were asked before."""

_NO_QUESTIONS = {"Libvmi", "destroy", "pause_vm", "resume_vm"}
SHOWN = 20
"""Differences that are kept to show; all are counted."""


@dataclass(frozen=True)
class Run:
    """One run of the script.

    :ivar seconds: the whole run, without the interpreter's start
    :ivar connecting: seconds of these in ``Libvmi(...)``
    :ivar failed: why the run itself failed, which leaves the rest empty
    """

    calls: Sequence[tuple[str, Any, Any]] = ()
    output: str = ""
    errors: str = ""
    status: int = 0
    seconds: float = 0.0
    connecting: float = 0.0
    requests: int | None = None
    carried: int | None = None
    failed: str = ""

    def answers(self) -> Iterator[tuple[Question, Any]]:
        """Each question and its answer, in the order they were asked."""
        asked: dict[tuple[str, str], int] = {}
        for name, arguments, result in self.calls:
            key = name, json.dumps(arguments)
            asked[key] = asked.get(key, -1) + 1
            yield (*key, asked[key]), result

    @property
    def asked(self) -> bool:
        """Whether the script asked the guest anything: opening, closing and pausing it is no question."""
        return any(name not in _NO_QUESTIONS for name, *_ in self.calls)

    @property
    def reads(self) -> int:
        """Calls that read memory."""
        return sum(name.startswith("read") for name, *_ in self.calls)

    @property
    def pages(self) -> int:
        """Distinct 4 KiB pages that the script read. A symbol counts as one page."""
        return len({place for call in self.calls if call[0].startswith("read") for place in _places(*call)})


@dataclass(frozen=True)
class Difference:
    """One question with two answers. None: it was not asked, or has no answer."""

    call: str
    reference: str | None
    other: str | None
    explained: bool


@dataclass(frozen=True)
class Verdict:
    """The result of comparing two runs.

    :ivar differences: the first of them
    :ivar total: how many there are
    :ivar unexplained: how many of these are not explained by changed memory
    """

    differences: Sequence[Difference] = field(default_factory=tuple)
    total: int = 0
    unexplained: int = 0

    @property
    def word(self) -> str:
        """In one word: ``same``, ``moved`` (memory changed between the runs), ``differ``."""
        return "differ" if self.unexplained else "moved" if self.total else "same"


def compare(reference: Run, other: Run, moving: frozenset[Question] | set[Question] = frozenset()) -> Verdict:
    """Compare two runs.

    :param moving: questions whose answers are known to change, see `moved`
    """
    there, here = dict(reference.answers()), dict(other.answers())
    values = {question for question, result in here.items() if question in there and there[question] != result}
    # Questions that only one run asked, and the output, follow from the answers.
    follows = bool(values) and values <= moving
    found: list[Difference] = []
    for question in there:
        if question not in here:
            found.append(Difference(described(question), _shown(there[question]), None, follows))
        elif question in values:
            explained = question in moving
            found.append(Difference(described(question), _shown(there[question]), _shown(here[question]), explained))
    found += [
        Difference(described(question), None, _shown(here[question]), follows)
        for question in here
        if question not in there
    ]
    found += _printed(reference, other, follows)
    first = sorted(found, key=lambda difference: difference.explained)
    return Verdict(first[:SHOWN], len(found), sum(not difference.explained for difference in found))


def moved(runs: Iterable[Run]) -> set[Question]:
    """Questions that got different answers in runs on the same backend."""
    known: dict[Question, Any] = {}
    found = set()
    for run in runs:
        for question, result in run.answers():
            if known.setdefault(question, result) != result:
                found.add(question)
    return found


def described(question: Question) -> str:
    """A question in readable form: ``read_addr_va(0xffff888003a00000, 0)``."""
    name, arguments, before = question
    words = ", ".join(map(_shown, json.loads(arguments)))
    return f"{name}({words}){f', asked for the {_ordinal(before + 1)} time' if before else ''}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _printed(reference: Run, other: Run, explained: bool) -> Iterator[Difference]:
    """The first line of output that differs, and the exit status if it differs."""
    lines = zip_longest(reference.output.splitlines(), other.output.splitlines())
    for number, (theirs, ours) in enumerate(lines, 1):
        if theirs != ours:
            yield Difference(f"line {number} of the output", theirs, ours, explained)
            break
    if reference.status != other.status:
        yield Difference("exit status", str(reference.status), str(other.status), explained)


def _shown(result: Any) -> str:
    if isinstance(result, bool) or not isinstance(result, int | dict | list):
        return json.dumps(result, ensure_ascii=False)
    if isinstance(result, int):
        return str(result) if abs(result) < 1 << 16 else f"{result:#x}"
    if isinstance(result, list):
        return f"[{', '.join(map(_shown, result))}]"
    ((kind, content),) = result.items()
    if kind == "tuple":
        return f"({', '.join(map(_shown, content))})"
    if kind in ("enum", "raises", "object"):
        return f"{'raises ' if kind == 'raises' else ''}{content}"
    if kind == "bytes":
        return content if len(content) <= 64 else f"{content[:64]}... ({len(content) // 2} bytes)"
    if kind == "named":
        return ", ".join(f"{name}={_shown(value)}" for name, value in content)
    pairs = content.items() if isinstance(content, dict) else content
    return f"{kind}({', '.join(f'{name}={_shown(value)}' for name, value in pairs)})"


_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "addr": 8}


def _places(name: str, arguments: Sequence[Any], result: Any) -> Iterator[tuple[Any, int]]:
    """(address space, page) of all that one read touched."""
    positional = [each for each in arguments if not (isinstance(each, dict) and "named" in each)]
    named = dict(pair for each in arguments if isinstance(each, dict) for pair in each.get("named", ()))
    first = positional[0] if positional else next((named[key] for key in _FIRST if key in named), None)
    if isinstance(first, dict):  # an AccessContext
        context = first.get("ctx", {})
        mechanism = context.get("tr_mechanism", {}).get("enum", "")
        space: Any = mechanism, context.get("dtb", 0), context.get("pid", 0)
        first = context.get("ksym", context.get("addr"))
    elif name.endswith("_pa"):
        space = "physical"
    else:
        space = positional[1] if len(positional) > 1 and name.endswith("_va") else named.get("pid", 0)
    if isinstance(first, str):
        yield first, 0
    elif isinstance(first, int):
        last = first + max(_length(name, result), 1) - 1
        yield from ((json.dumps(space), page) for page in range(first >> 12, (last >> 12) + 1))


_FIRST = ("vaddr", "paddr", "addr", "symbol", "ctx")


def _length(name: str, result: Any) -> int:
    width = _WIDTHS.get(name.split("_")[1]) if name.count("_") else None
    if width is not None:
        return width
    if isinstance(result, dict) and "tuple" in result:
        result = result["tuple"][0]
    if isinstance(result, dict) and "bytes" in result:
        return len(result["bytes"]) // 2
    return len(result.encode()) + 1 if isinstance(result, str) else 0
