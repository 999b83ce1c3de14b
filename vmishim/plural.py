"""Counts of things, in words."""

from __future__ import annotations


def counted(count: int, what: str, many: str = "") -> str:
    """``1 process``, ``2,000 processes``.

    :param what: the thing, in the singular
    :param many: its plural, if that is not ``what`` and an s
    """
    return f"{count:,} {what if count == 1 else many or f'{what}s'}"
