"""The commands of ``vmishim``, a module each; `vmishim.cli` imports the one that was called and no other.

A command is a function from the parsed options to the exit status: 0, or 1 when it found or met something wrong. What
it can't do at all it raises: the errors of `vmishim.errors`, `OSError`, or `CommandError`, whose text is the
whole message.
"""

from __future__ import annotations


class CommandError(Exception):
    """A command can't do what was asked. The text is one line: what was wrong, and what to do."""

    status = 1
    """The exit status that says so."""
