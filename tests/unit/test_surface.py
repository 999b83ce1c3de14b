"""Every public name of the genuine bindings is there, with the same parameters; the document of them is current."""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vmishim.libvmi import Libvmi

ROOT = Path(__file__).parents[2]
SURFACE: dict[str, dict[str, Any]] = json.loads((ROOT / "compat" / "surface.json").read_text())


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_of_libvmi", ROOT / "compat" / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports of ``libvmi`` get ours."""
    for name in [name for name in sys.modules if name.split(".")[0] == "libvmi"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(ROOT / "compat"))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] == "libvmi"]:
        sys.modules.pop(name)


def _default(value: Any) -> Any:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else value


def _parameters(function: Any) -> list[list[Any]]:
    return [
        [parameter.name] if parameter.default is parameter.empty else [parameter.name, _default(parameter.default)]
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SURFACE.items() for name in names])
def test_name(ours: Any, module: str, name: str) -> None:
    theirs, mine = SURFACE[module][name], getattr(ours(module), name)
    match theirs:
        case {"enum": members}:
            assert {member: value.value for member, value in mine.__members__.items()} == members
        case {"constant": value}:
            assert mine == value
        case {"function": signature}:
            assert _parameters(mine) == signature["parameters"]
        case {"class": {"methods": methods, "properties": properties, "bases": bases}}:
            assert {base.__name__ for base in mine.__mro__} >= set(bases)
            for method, signature in methods.items():
                # None is how a missing pointer of the C library is written in Python.
                expected = [[None if part == "NULL" else part for part in entry] for entry in signature["parameters"]]
                assert _parameters(getattr(mine, method)) == expected, method
            attributes = set(dir(mine)) | _set_by_constructor(mine)
            assert attributes >= set(properties), name


def _set_by_constructor(kind: type) -> set[str]:
    makers = [vars(owner).get("__init__") for owner in kind.__mro__]
    sources = [inspect.getsource(maker) for maker in makers if inspect.isfunction(maker)]
    return {line.split("=")[0].split(":")[0].strip()[5:] for line in "\n".join(sources).splitlines() if "self." in line}


RESULTS = {
    "page_info_t": "PageLookup",
    "[PageInfo]": "list[PageInfo]",
    "(bytes, int)": "tuple[bytes, int]",
    "(VMIOS, int)": "tuple[VMIOS, int]",
    "events_pending": "int",
    "Constant": "str | None",
}


@pytest.mark.parametrize("call", list(SURFACE["libvmi"]["Libvmi"]["class"]["methods"]))
def test_result(call: str, coverage: ModuleType) -> None:
    theirs = SURFACE["libvmi"]["Libvmi"]["class"]["methods"][call]["result"]
    kind, _ = coverage.kinds()[call]
    annotation = getattr(Libvmi, call).__annotations__["return"]
    assert annotation in (RESULTS.get(theirs, theirs), "NoReturn" if kind == "refused" else None)


def _public() -> list[Any]:
    from vmishim import libvmi
    from vmishim.libvmi import event

    found: list[Any] = [libvmi, event]
    for module in (libvmi, event):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.append(value)
            if inspect.isclass(value) and value.__module__.startswith("vmishim") and not issubclass(value, enum.Enum):
                found += [member for key, member in inspect.getmembers(value) if callable(member) and key[0] != "_"]
    return found


def test_everything_public_is_documented() -> None:
    for value in _public():
        assert inspect.getdoc(value), value


def test_every_call_names_its_source() -> None:
    for call in SURFACE["libvmi"]["Libvmi"]["class"]["methods"]:
        value: Any = Libvmi if call == "__init__" else getattr(Libvmi, call)
        assert "Source: ``vmi_" in (value.__doc__ or ""), call


def test_the_document_is_up_to_date(coverage: ModuleType) -> None:
    hint = "run: python compat/coverage.py"
    text = coverage.DOCUMENT.read_text()
    assert coverage.table() in text, hint
    assert coverage.document(text) == text, hint


def test_the_import_name_offers_what_the_package_says(ours: Any) -> None:
    assert set(SURFACE["libvmi"]) <= set(ours("libvmi").__all__)
