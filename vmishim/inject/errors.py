"""Why a program was not compiled, not loaded or not run."""

from __future__ import annotations

from vmishim.errors import LibvmiError
from vmishim.foreign import paragraph, printable


class InjectError(LibvmiError):
    """A program was refused, or cannot be run. The text is one line; ``log`` is everything that was said about it: the
    verifier's log, or the compiler's messages."""

    def __init__(self, text: str, log: str = "") -> None:
        super().__init__(printable(text))
        self.log = paragraph(log)


class CompileError(InjectError):
    """A program's source does not compile, or the tools to compile it are missing."""
