"""What comes out of a call, in a form that can be compared and written down."""

from __future__ import annotations

from typing import Any

from tests.contract import driver
from tests.contract.cases import Case, Places
from tests.contract.genuine import CrashError
from vmishim.errors import LibvmiError

VARIES = "varies"
"""Behaviour of the genuine bindings that is not the same from one call to the next."""


def outcome(vmi: Any, case: Case, places: Places) -> dict[str, Any]:
    """Make the call; ``{"value": ...}`` with ``driver``'s encoding, or ``{"raises": ..., "text": ...}``."""
    args, kwargs = case.put(places)
    try:
        return {"value": driver.encode(getattr(vmi, case.call)(*args, **kwargs))}
    except LibvmiError as error:
        return {"raises": "LibvmiError", "text": str(error)}
    except CrashError:
        raise
    except Exception as error:  # whatever it is, it is what comes out
        return {"raises": type(error).__name__}


def kind(case: Case, result: dict[str, Any]) -> str:
    """An outcome without what differs from guest to guest: types, lengths, names, errors.

    A number that is a result by itself, such as a count or an error, is told from others if it is 0 or negative. One
    that was read from memory is not: what memory holds is no part of the contract.
    """
    if "raises" in result:
        return " ".join(["raises", result["raises"], *([result["text"]] if "text" in result else [])])
    value = result["value"]
    if case.call.startswith("read_") and isinstance(value, dict) and "int" in value:
        return "int"
    return _kind(value)


def _kind(form: Any) -> str:
    if not isinstance(form, dict):
        return "str" if isinstance(form, str) else repr(form)
    ((tag, content),) = form.items()
    if tag == "tuple":
        return f"({', '.join(item['int'] if 'int' in item else _kind(item) for item in content)})"
    if tag == "list":
        return f"list of {_kind(content[0])}" if content else "empty list"
    if tag == "bytes":
        return f"{len(content) // 2} bytes"
    if tag == "int":
        return f"int {content}" if int(content) <= 0 else "int"
    if tag == "enum":
        return str(content)
    return str(tag)
