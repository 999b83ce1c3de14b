"""Mutants of a module: its syntax tree with one security check made wrong."""

from __future__ import annotations

import ast
import copy
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

    :ivar line: in the original, as ``column``
    :ivar what: the change
    :ivar source: the line
    """

    module: str
    line: int
    column: int
    what: str
    source: str
    _number: int
    _kind: int

    @property
    def name(self) -> str:
        """Where and what."""
        return f"{self.module}:{self.line}:{self.column}: {self.what}: {self.source}"

    def tree(self, text: str) -> ast.Module:
        """The whole module with the change. :param text: the module's source"""
        tree = ast.parse(text)
        _apply(tree, list(ast.walk(tree))[self._number], self._kind)
        return ast.fix_missing_locations(tree)


def mutants(module: str, text: str) -> list[Mutant]:
    """All mutants of a module, from its beginning to its end."""
    tree, lines = ast.parse(text), text.splitlines()
    told = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in _TOLD
        for node in ast.walk(function)
    }
    found = [
        Mutant(module, node.lineno, node.col_offset, what, lines[node.lineno - 1].strip(), number, kind)  # type: ignore[attr-defined]
        for number, node in enumerate(ast.walk(tree))
        if id(node) not in told
        for kind, (what, _) in enumerate(_changes(node))
    ]
    return sorted(found, key=lambda each: (each.line, each.column))


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
    return changes


def _apply(tree: ast.AST, node: ast.AST, kind: int) -> None:
    """Put a change in place of a node."""
    change = _changes(node)[kind][1]
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, change)
                return
            if isinstance(value, list) and any(each is node for each in value):
                value[:] = [change if each is node else each for each in value]
                return
    raise AssertionError("a node of the tree")
