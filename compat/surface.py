"""Every public name of the genuine libvmi bindings: parameters, defaults, results. Prints ``compat/surface.json``.

``PYTHON compat/surface.py > compat/surface.json`` with the interpreter of an environment that has ``libvmi==3.7.1``.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

# This folder contains a libvmi package, and Python puts a script's folder first on the path.
sys.path = [folder for folder in sys.path if folder != str(Path(__file__).resolve().parent)]

MODULES = ("libvmi", "libvmi.libvmi", "libvmi.event")
NOT_THEIRS = {
    "Enum",
    "absolute_import",
    "bytes",
    "ctypes",
    "ffi",
    "generic_event_callback",
    "lib",
    "object",
    "raise_from",
    "str",
    "super",
}
"""Names that the bindings import, or that belong to their C library."""


def surface() -> dict[str, Any]:
    """A description of each public name, by module and name."""
    found: dict[str, Any] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found[name] = {
            public: _describe(value)
            for public, value in sorted(vars(module).items())
            if not public.startswith("_") and public not in NOT_THEIRS and not isinstance(value, ModuleType)
        }
    return found


def _describe(value: Any) -> dict[str, Any]:
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return {"enum": {name: member.value for name, member in value.__members__.items()}}
    if inspect.isclass(value):
        methods, properties = {}, []
        for owner in reversed(value.__mro__[:-1]):
            if owner.__module__ == "builtins":
                continue
            for name, member in vars(owner).items():
                if isinstance(member, FunctionType) and (name == "__init__" or not name.startswith("_")):
                    methods[name] = _signature(member)
                elif isinstance(member, property) and not name.startswith("_"):
                    properties.append(name)
        bases = [base.__name__ for base in value.__mro__[1:-1] if base.__name__ not in ("object", "newobject")]
        return {"class": {"bases": bases, "methods": methods, "properties": sorted(set(properties))}}
    if inspect.isfunction(value):
        return {"function": _signature(value)}
    return {"constant": value}


def _signature(function: FunctionType) -> dict[str, Any]:
    parameters = [
        [parameter.name] if parameter.default is parameter.empty else [parameter.name, _default(parameter.default)]
        for parameter in list(inspect.signature(function).parameters.values())
        if parameter.name != "self"
    ]
    return {"parameters": parameters, "result": _result(function)}


def _default(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | str):
        return value
    return "NULL"


def _result(function: FunctionType) -> str:
    """What the function returns, judged by its last return statement: the bindings have no annotations."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    returns = [node.value for node in ast.walk(body) if isinstance(node, ast.Return) and node.value is not None]
    if not returns:
        return "None"
    value = returns[-1]
    if isinstance(value, ast.Tuple):
        return f"({', '.join('int' if isinstance(item, ast.Subscript) else _form(item) for item in value.elts)})"
    return _form(value)


def _form(value: ast.expr) -> str:
    if isinstance(value, ast.Name):
        return {"buffer": "bytes", "page_info": "page_info_t", "va_pages": "[PageInfo]"}.get(value.id, value.id)
    if isinstance(value, ast.Subscript):
        return "int"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return {"decode": "str"}.get(value.func.attr, "int")
    return type(value).__name__


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1))
