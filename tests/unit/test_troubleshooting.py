"""docs/troubleshooting.md explains each message by which the doctor or the agent names a problem; the code has them."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmishim.wire.session import _SAYS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
DOCTOR = ROOT / "vmishim" / "commands" / "doctor.py"
AGENT = [*sorted((ROOT / "guest_agent").glob("*.py")), ROOT / "vmishim" / "wire" / "keys.py"]
AFTER_A_CODE = ("InjectionError", "Failure")
"""Errors whose first argument is a code for programs; their text is the second."""


class Source:
    """Source of some modules, in which a name or a call may stand for a text."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
        self.functions = {node.name: node for node in self.nodes if isinstance(node, ast.FunctionDef)}
        self._within = {node: function for function in self.functions.values() for node in ast.walk(function)}

    def calls(self, *names: str) -> Iterator[ast.Call]:
        """Calls of functions with these names, in order."""
        return (node for node in self.nodes if isinstance(node, ast.Call) and _name(node) in names)

    def raised(self) -> Iterator[ast.Call]:
        """Raised errors that are not built into Python."""
        for node in self.nodes:
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and not hasattr(builtins, _name(node.exc))
            ):
                yield node.exc

    def texts(self, node: ast.AST, depth: int = 4) -> Iterator[str]:
        """The texts that an expression can be; ``{}`` stands for what is known only at run time."""
        match node:
            case ast.Constant(value=str(text)):
                yield re.sub("%[sd]", "{}", text)
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            case ast.IfExp(body=one, orelse=other):
                yield from self.texts(one, depth)
                yield from self.texts(other, depth)
            case ast.Name(id=name) if depth:
                inside = self._within.get(node)
                local = list(ast.walk(inside)) if inside else []
                for value in _assigned(local, name) or _assigned(self.nodes, name):
                    yield from self.texts(value, depth - 1)
            case ast.Call() if depth and _name(node) in self.functions:
                for each in ast.walk(self.functions[_name(node)]):
                    if isinstance(each, ast.Return) and each.value is not None:
                        yield from self.texts(each.value, depth - 1)


def _assigned(nodes: Sequence[ast.AST], name: str) -> list[ast.expr]:
    wanted = [node for node in nodes if isinstance(node, ast.Assign)]
    return [node.value for node in wanted if any(isinstance(t, ast.Name) and t.id == name for t in node.targets)]


def _name(call: ast.Call) -> str:
    """The called name, or its last part; empty if there is none."""
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def doctors() -> set[str]:
    """The doctor's findings that are bad or worth a note: subject and text."""
    source, found = Source([DOCTOR]), set()
    for call in source.calls("Finding"):
        about, verdict, *rest = call.args
        if {"bad", "note"} & set(source.texts(verdict)):
            found |= {f"**{text}**" for text in source.texts(about)}
            found |= {text for argument in rest[:1] for text in source.texts(argument)}
    return found


def agents() -> set[str]:
    """The agent's messages when it does not start, ends, or refuses a request."""
    source = Source(AGENT)
    said = [*source.raised(), *source.calls("Failure", "Rejected", "error", "warning")]
    places = [(call, 1 if _name(call) in AFTER_A_CODE else 0) for call in said]
    return {text for call, at in places if len(call.args) > at for text in source.texts(call.args[at])}


def missing(messages: set[str]) -> set[str]:
    """The messages that the page lacks, compared by the parts that are the same in every run."""
    page = " ".join(PAGE.read_text().split())
    return {text for text in messages if not all(part in page for part in _stretches(text))}


def _stretches(text: str) -> list[str]:
    parts = [" ".join(part.split()) for part in text.split("{}")]
    return [part for part in parts if re.search(r"\w{3}", part)]


def test_the_page_has_what_the_doctor_says() -> None:
    messages = doctors()
    assert {"**lockdown**", "2: symbols are hidden from all users"} <= messages  # so they are found at all
    assert not missing(messages), "add these to docs/troubleshooting.md"


def test_the_page_has_what_the_agent_says() -> None:
    messages = agents()
    assert {"cannot listen on {}: {}", "libbpf is not installed ({}): apt install libbpf1"} <= messages
    assert any("loading needs root" in text for text in messages)
    assert not missing(messages), "add these to docs/troubleshooting.md"


def test_the_page_has_what_a_refusal_says() -> None:
    assert not missing({re.sub(r"\d+", "{}", text) for text in _SAYS.values()}), "add these to docs/troubleshooting.md"


def test_a_message_that_the_page_lacks_is_noticed() -> None:
    assert missing({"libbpf is not installed ({}): or so it seems"}) == {"libbpf is not installed ({}): or so it seems"}
