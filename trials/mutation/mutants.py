"""Mutants of a module: its syntax tree with one security check made wrong."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
"""Comparisons, each with what takes its place: an inequality moves its limit by one, the others turn around."""
_TOLD = ("__repr__", "__str__")
"""Functions that only describe."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    :ivar line: in the original
    :ivar what: the change
    :ivar source: the line
    :ivar tree: the whole module with the change
    """

    module: str
    line: int
    what: str
    source: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """The same for the same change as long as the line keeps its text."""
        return f"{self.module}:{self.line}: {self.what}: {self.source}"


def mutants(module: str, text: str) -> Iterator[Mutant]:
    """All mutants of a module's source, from its beginning to its end."""
    tree, lines = ast.parse(text), text.splitlines()
    for number, node in enumerate(ast.walk(tree)):
        node.number = number  # type: ignore[attr-defined]
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in _TOLD]:
        for node in ast.walk(function):
            node.told = True  # type: ignore[attr-defined]
    found = []
    for node in ast.walk(tree):
        if hasattr(node, "told"):
            continue
        for kind, (what, _) in enumerate(_changes(copy.deepcopy(node))):
            found.append((getattr(node, "lineno", 0), getattr(node, "number"), kind, what))  # noqa: B009
    for line, number, kind, what in sorted(found):
        changed = copy.deepcopy(tree)
        _apply(changed, number, kind)
        yield Mutant(module, line, what, lines[line - 1].strip(), ast.fix_missing_locations(changed))


def _changes(node: ast.AST) -> list[tuple[str, ast.AST]]:
    """What may be wrong about a node: the change in words, and the node that takes its place."""
    changes: list[tuple[str, ast.AST]] = []
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        negated = copy.deepcopy(node)
        negated.test = ast.UnaryOp(ast.Not(), negated.test)
        changes.append(("negate the condition", negated))
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            if type(operator) in SWAPS:
                other = copy.deepcopy(node)
                other.ops[at] = SWAPS[type(operator)]()
                changes.append((f"{type(operator).__name__} becomes {type(other.ops[at]).__name__}", other))
    if isinstance(node, ast.BoolOp):
        other_op = copy.deepcopy(node)
        other_op.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        changes.append(("swap and/or", other_op))
        for at in range(len(node.values)):
            left = copy.deepcopy(node.values[:at] + node.values[at + 1 :])
            rest = left[0] if len(left) == 1 else ast.BoolOp(copy.deepcopy(node.op), left)
            changes.append((f"drop operand {at + 1}", ast.copy_location(rest, node)))
    if isinstance(node, ast.Raise):
        changes.append(("drop the raise", ast.copy_location(ast.Pass(), node)))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        changes.append(("drop the call", ast.copy_location(ast.Pass(), node)))
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool):
        flipped = copy.deepcopy(node)
        flipped.value = ast.Constant(not node.value.value)
        changes.append(("return the opposite", flipped))
    if isinstance(node, ast.Assign) and _is_limit(node):
        more = copy.deepcopy(node)
        more.value = ast.BinOp(more.value, ast.Add(), ast.Constant(1))
        changes.append(("the limit is one more", more))
    return changes


def _is_limit(node: ast.Assign) -> bool:
    target = node.targets[0]
    return (
        isinstance(target, ast.Name)
        and target.id.strip("_").isupper()
        and isinstance(node.value, (ast.Constant, ast.BinOp))
        and not any(isinstance(part, ast.Constant) and not isinstance(part.value, int) for part in ast.walk(node.value))
        and ("MAX" in target.id or "PER_" in target.id or target.id.endswith("_S"))
    )


def _apply(tree: ast.AST, number: int, kind: int) -> None:
    """Put a change in place of the node with this number."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST) and getattr(value, "number", None) == number:
                setattr(parent, field, _changes(value)[kind][1])
                return
            if isinstance(value, list):
                for at, each in enumerate(value):
                    if getattr(each, "number", None) == number:
                        value[at] = _changes(each)[kind][1]
                        return
    raise AssertionError("a node of the tree")
