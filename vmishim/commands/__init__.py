"""The commands of ``vmishim``, one module each; `vmishim.cli` imports only the one that runs.

A command is a function from the parsed options to the exit status: 0, or 1 if it found a problem. If it cannot do its
work, it raises an error of `vmishim.errors`, `OSError`, or `CommandError`, whose text is the whole message.
"""

from __future__ import annotations


class CommandError(Exception):
    """A command failed. The text is one line: what went wrong, and what to do."""

    status = 1
    """The exit status."""
