"""Makes calls of LibVMI's Python API for another process, whose own ``libvmi`` is not the one that is meant.

Run by the interpreter of an environment with the genuine bindings: ``python driver.py REQUESTS REPLIES`` with two file
descriptors; one JSON object a line each way. Needs nothing but the standard library and ``libvmi``, so both sides can
use it: the tests import ``encode`` and ``decode``.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

_PAGE_INFO = ("vaddr", "paddr", "size", "pt")
_ENTRIES = tuple(f"{level}_{what}" for level in ("pte", "pgd", "pdpte", "pml4e") for what in ("location", "value"))
_PAGE = ("vaddr", "dtb", "paddr", "size")


def encode(value: Any) -> Any:
    """A value as JSON, its type kept. What has no form of its own becomes its type's name."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": f"{type(value).__name__}.{value.name}"}
    if isinstance(value, int):
        return {"int": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if hasattr(value, "tr_mechanism"):
        fields = {name: encode(getattr(value, name)) for name in ("addr", "ksym", "dtb", "pid") if hasattr(value, name)}
        return {"ctx": {"tr_mechanism": encode(value.tr_mechanism), **fields}}
    if hasattr(value, "x86_ia32e"):
        fields = {name: encode(int(getattr(value, name))) for name in _PAGE_INFO}
        entries = {name: encode(int(getattr(value.x86_ia32e, name))) for name in _ENTRIES}
        return {"lookup": {**fields, **entries}}
    if all(hasattr(value, name) for name in _PAGE):
        return {"page": {name: encode(int(getattr(value, name))) for name in _PAGE}}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return {"list": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if hasattr(value, "py_callback"):
        return {"event": type(value).__name__}
    return {"object": type(value).__name__}


def decode(form: Any, lib: Any) -> Any:
    """What ``encode`` wrote, with the classes of ``lib``, a module such as ``libvmi``."""
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "enum":
        name, member = content.split(".")
        return getattr(lib, name)[member]
    if kind == "int":
        return int(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "ctx":
        return lib.AccessContext(**{name: decode(item, lib) for name, item in content.items()})
    if kind == "tuple":
        return tuple(decode(item, lib) for item in content)
    if kind == "list":
        return [decode(item, lib) for item in content]
    if kind == "dict":
        return {decode(key, lib): decode(item, lib) for key, item in content}
    if kind == "event":
        return _event(content, lib)
    if kind == "page":
        return SimpleNamespace(**{name: decode(item, lib) for name, item in content.items()})
    if kind == "lookup":
        known = {name: decode(item, lib) for name, item in content.items()}
        entries = SimpleNamespace(**{name: known.pop(name) for name in _ENTRIES})
        return SimpleNamespace(**known, x86_ia32e=entries)
    if kind == "object" and content == "Registers":
        return lib.Registers()
    return form


def _event(name: str, lib: Any) -> Any:
    """An event of this class, made for the occasion."""
    from importlib import import_module

    event = import_module(f"{lib.__name__.split('.')[0]}.event")
    access = {"MemEvent": ("MemAccess", "RW"), "RegEvent": ("RegAccess", "W")}.get(name)
    first = [lib.X86Reg.CR3] if name == "RegEvent" else [[0]] if name == "SingleStepEvent" else []
    if access:
        first.append(getattr(event, access[0])[access[1]])
    return getattr(event, name)(*first, lambda vmi, happened: None)


def main() -> None:
    """Answer requests until they end: ``{"new": kwargs}`` makes the ``Libvmi``, ``{"call": name, ...}`` calls it."""
    import libvmi

    requests, replies = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[1:], "rw", strict=True))
    vmi: Any = None
    for line in requests:
        request = json.loads(line)
        try:
            args = [decode(item, libvmi) for item in request.get("args", [])]
            kwargs = {name: decode(item, libvmi) for name, item in request.get("kwargs", {}).items()}
            if request["call"] == "Libvmi":
                vmi = libvmi.Libvmi(*args, **kwargs)
                reply: dict[str, Any] = {"value": None}
            else:
                reply = {"value": encode(getattr(vmi, request["call"])(*args, **kwargs))}
        except Exception as error:  # whatever it is, it is the answer
            reply = {"raises": type(error).__name__, "text": str(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
