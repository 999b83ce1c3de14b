"""Runs a script and records every call it makes to LibVMI's API: name, arguments, result or error.

The interpreter with the genuine bindings runs it, ``python recorder.py TASK.json``; `ours` imports it. It needs only
the standard library, and the ``libvmi`` that it records.

The class itself is patched, so calls are recorded however the script imported it. Only calls from outside count: a
method that calls another one is one call.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAILURES = {"LibvmiError", "FaultError", "UnknownNameError", "ConfigError"}
"""Names of the errors that correspond to ``LibvmiError`` in the genuine bindings."""

Call = tuple[str, Any, Any]
"""Name, arguments and result, each as `form` gives it."""


def form(value: Any) -> Any:
    """A value as JSON that keeps Python's types apart. Other objects become the name of their type."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": f"{type(value).__name__}.{value.name}"}
    if isinstance(value, int):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, tuple):
        return {"tuple": [form(item) for item in value]}
    if isinstance(value, list):
        return [form(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[form(key), form(item)] for key, item in value.items()]}
    if hasattr(value, "tr_mechanism"):
        names = ("tr_mechanism", "addr", "ksym", "dtb", "pid")
        return {"ctx": {name: form(getattr(value, name)) for name in names if hasattr(value, name)}}
    if all(hasattr(value, name) for name in ("vaddr", "paddr", "size")):
        return {"page": {name: int(getattr(value, name)) for name in ("vaddr", "paddr", "size")}}
    return {"object": type(value).__name__}


class Recording:
    """The recorded calls of one run.

    :ivar calls: in the order in which they ended
    :ivar connecting: seconds spent in ``Libvmi(...)``
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.connecting = 0.0
        self._inside = threading.local()

    @contextlib.contextmanager
    def of(
        self, kind: type, calls: bool = True, rename: Callable[[Any], Any] | None = None, name: str | None = None
    ) -> Iterator[None]:
        """Record all use of the class ``kind`` within a block.

        :param calls: if false, measure only the constructor's time, which costs nothing
        :param rename: gives the domain to pass to the constructor instead of the script's
        :param name: what ``get_name`` returns instead of the real name
        """
        names = [each for each, _ in inspect.getmembers(kind, inspect.isfunction) if not each.startswith("_")]
        if not calls:
            names = ["get_name"] if name is not None else []
        before = {each: vars(kind).get(each) for each in ("__init__", *names)}
        self._wrap_constructor(kind, calls, rename)
        for each in names:
            setattr(kind, each, self._wrapped(getattr(kind, each), name if each == "get_name" else None))
        try:
            yield
        finally:
            for each, method in before.items():
                if method is None:  # inherited
                    delattr(kind, each)
                else:
                    setattr(kind, each, method)

    def _wrap_constructor(self, kind: Any, calls: bool, rename: Callable[[Any], Any] | None) -> None:
        construct = kind.__init__

        @functools.wraps(construct)
        def __init__(vmi: Any, domain: Any, *args: Any, **kwargs: Any) -> None:
            given = domain if rename is None else rename(domain)
            begun = time.perf_counter()
            self._inside.depth = 1
            error: BaseException | None = None
            try:
                construct(vmi, given, *args, **kwargs)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._inside.depth = 0
                self.connecting += time.perf_counter() - begun
                if calls:
                    self._note("Libvmi", (domain, *args), kwargs, None, error)

        kind.__init__ = __init__

    def _wrapped(self, method: Callable[..., Any], instead: str | None) -> Callable[..., Any]:
        inside, note, name = self._inside, self._note, method.__name__

        @functools.wraps(method)
        def call(vmi: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "depth", 0):
                return method(vmi, *args, **kwargs)
            inside.depth = 1
            try:
                value = method(vmi, *args, **kwargs)
                if inspect.isgenerator(value):
                    value = list(value)
                if instead is not None:
                    value = instead
            except BaseException as error:
                note(name, args, kwargs, None, error)
                raise
            else:
                note(name, args, kwargs, value, None)
                return value
            finally:
                inside.depth = 0

        return call

    def _note(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, error: BaseException | None
    ) -> None:
        arguments = [form(each) for each in args]
        if kwargs:
            arguments.append({"named": [[key, form(each)] for key, each in sorted(kwargs.items())]})
        if error is None:
            result = form(value)
        elif type(error).__name__ in FAILURES:
            # The text after the failure's name is vmishim's own, for people.
            result = {"raises": f"LibvmiError {str(error).partition(':')[0]}"}
        else:
            result = {"raises": type(error).__name__}
        self.calls.append((name, arguments, result))

    def write(self, path: str, **more: Any) -> None:
        """Write the recording to a file: one line of figures, then one line per call."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"connecting": self.connecting, **more}) + "\n")
            for call in self.calls:
                file.write(json.dumps(call) + "\n")


def main() -> None:
    """Run a script on the genuine bindings, as ``python SCRIPT ARGUMENTS`` would.

    The task has ``script``, ``arguments``; ``record``, whether to record calls; ``output``, the file to write;
    ``domain``, the guest's name; ``memory``, its RAM file; ``home``, the folder with ``etc/libvmi.conf``.
    """
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script = task["script"]
    sys.path[0] = os.path.dirname(
        os.path.abspath(script)
    )  # instead of this folder, whose modules the script must not import
    import libvmi

    genuine: Any = libvmi.Libvmi
    recording = Recording()

    def rename(domain: Any) -> str:
        # LibVMI looks for its configuration in the user's home; meanwhile that is the task's home.
        os.environ["HOME"] = task["home"]
        return str(task["memory"])

    home, sudo = os.environ.get("HOME", ""), os.environ.pop("SUDO_USER", None)
    construct = genuine.__init__

    @functools.wraps(construct)
    def at_home(vmi: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(vmi, *args, **kwargs)
        finally:
            os.environ["HOME"] = home
            if sudo is not None:
                os.environ["SUDO_USER"] = sudo

    genuine.__init__ = at_home
    sys.argv = [script, *task["arguments"]]
    begun = time.perf_counter()
    try:
        with recording.of(genuine, task["record"], rename, task["domain"]):
            runpy.run_path(script, run_name="__main__")
    finally:
        recording.write(task["output"], seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
