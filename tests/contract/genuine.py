"""The genuine bindings in a process of their own: an object that looks like a ``Libvmi``."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.contract import driver
from vmishim import libvmi
from vmishim.errors import LibvmiError


class CrashError(AssertionError):
    """The process with the genuine bindings ended in the middle of a call."""


class Genuine:
    """A ``Libvmi`` of the genuine bindings, by its methods.

    :param python: the interpreter that has them
    :param log: file for what LibVMI writes to standard error
    :param args: of its constructor, as are ``kwargs``
    :raises LibvmiError: the genuine constructor raised it
    """

    def __init__(self, python: str, log: Path, *args: Any, **kwargs: Any) -> None:
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        self._log = log
        # One allocator arena: what a hostile length does should not depend on the host.
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [python, driver.__file__, str(theirs_in), str(theirs_out)],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._lines = os.fdopen(self._replies, "r")
        try:
            self._call("Libvmi", *args, **kwargs)
        except BaseException:
            self.close()
            raise

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        request = {
            "call": name,
            "args": [driver.encode(value) for value in args],
            "kwargs": {key: driver.encode(value) for key, value in kwargs.items()},
        }
        os.write(self._requests, json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            status = self._process.wait()
            words = self._log.read_text(errors="replace")[-2000:]
            raise CrashError(f"the genuine bindings ended with status {status} in {name}{args}\n{words}")
        reply = json.loads(line)
        if "raises" not in reply:
            return driver.decode(reply["value"], libvmi)
        if reply["raises"] == "LibvmiError":
            raise LibvmiError(reply["text"])
        kind = getattr(builtins, reply["raises"])
        if kind is UnicodeDecodeError:
            raise UnicodeDecodeError("utf-8", b"", 0, 0, reply["text"])
        raise kind(reply["text"])

    def close(self) -> None:
        """End the process."""
        os.close(self._requests)
        self._lines.close()
        self._process.wait()
