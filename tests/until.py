"""Wait for a condition, never for an amount of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], *, deadline_s: float = 30.0, what: str) -> T:
    """Wait until ``condition`` returns something true, and return that.

    :param deadline_s: seconds after which the wait fails
    :param what: what is waited for, for the failure's message
    :raises AssertionError: the condition did not hold in time
    """
    begun = time.monotonic()
    pause_s = 0.001
    while not (found := condition()):
        assert time.monotonic() - begun < deadline_s, f"waited {deadline_s:g} s for {what}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)
    return found
