"""What is known of a guest from look to look, and what each look changes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmishim.inspection.changes import Event, Sight, changes, findings
from vmishim.watching.session import Seen

SILENT = "does not answer"
BACK = "answers again"
REBOOTED = "answers again; the guest was rebooted"
RENEWED = "made a new session: the agent was restarted, or the connection broke"
UNREADABLE = "its lists can't be read"


class History:
    """One guest's past, as far as the next look needs it.

    :ivar sight: the lists of the last look that could be read; None before the first, and after a reboot
    :ivar silent: it did not answer the last look
    :ivar unreadable: its lists could not be read the last time it answered
    """

    def __init__(self) -> None:
        self.sight: Sight | None = None
        self.silent = self.unreadable = False
        self._boot = ""
        self._damage: Sequence[str] = ()

    def take(self, seen: Seen) -> Iterator[Event]:
        """The events of one look, oldest first: a lost agent and unreadable lists are said once."""
        if not seen.answered:
            if not self.silent:
                yield Event("!", "agent", f"{SILENT}: {seen.problem}")
            self.silent = True
            return
        if self._boot and seen.boot and seen.boot != self._boot:
            self.sight = None  # another boot: nothing from before is still there
            yield Event("!", "agent", REBOOTED)
        elif seen.renewed:
            yield Event("!", "agent", RENEWED)
        elif self.silent:
            yield Event("!", "agent", BACK)
        self._boot = seen.boot or self._boot
        self.silent = False
        if seen.sight is None:
            if not self.unreadable:
                yield Event("!", "guest", f"{UNREADABLE}: {seen.problem}")
            self.unreadable = True
            return
        self.unreadable = False
        for mark in seen.sight.damage:
            if mark not in self._damage:
                yield Event("!", "guest", f"not read: {mark}")
        self._damage = seen.sight.damage
        yield from findings(seen.sight) if self.sight is None else changes(self.sight, seen.sight)
        self.sight = seen.sight
