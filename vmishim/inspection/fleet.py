"""One list of many guests at once. A guest that does not answer never delays the others: its error is its answer.

`over` asks from threads of this process, which only wait for agents; `vmishim.inspection.cluster.by_dask` from the
workers of an existing Dask cluster. Both call `ask` for each guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from queue import Empty, SimpleQueue
from typing import TypeVar

from vmishim.errors import LibvmiError
from vmishim.guests import domains
from vmishim.guests.agent import Strategy
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.inspection import objects
from vmishim.inspection.lists import Damage, Listed, whole
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.libvmi import Libvmi

Entry = Task | Module | Socket
Told = TypeVar("Told")

WIDTH = 32
"""Guests that one process asks at the same time."""
DEADLINE = 30.0
"""Seconds after which a guest that has not answered has failed."""
LISTS: dict[str, Callable[[Libvmi, Damage], Iterator[Entry]]] = {
    "ps": objects.tasks,
    "threads": objects.threads,
    "lsmod": objects.modules,
    "ss": objects.sockets,
}
"""Readers of lists, by the command that shows the list; ``threads`` is ``ps --threads``."""


@dataclass(frozen=True)
class Answer:
    """One guest's list, or why it could not be read.

    :ivar entries: its list; empty after a failure
    :ivar error: the reason of the failure, on one line; empty if there was none
    :ivar damage: a sentence for each thing of the list that could not be read
    """

    domain: str
    entries: Sequence[Entry] = ()
    error: str = ""
    damage: Sequence[str] = ()


def matching(pattern: str) -> list[Domain]:
    """The enrolled guests whose names match a pattern such as ``web-*``, in the order of the file.

    :raises LibvmiError: ``domains.toml`` is not valid
    """
    return [domain for name, domain in domains.load().items() if fnmatchcase(name, pattern)]


def ask(domain: Domain, what: str, strategy: Strategy = "batch") -> Listed[Entry]:
    """One list of one guest, read within one hold, and what of it could not be read.

    :param what: a key of `LISTS`
    :raises LibvmiError: it can't be reached, or read
    """
    with Libvmi.over(reach(domain, strategy=strategy)) as vmi:
        return whole(vmi, LISTS[what])


def over(
    fleet: Sequence[Domain], what: str, strategy: Strategy = "batch", deadline: float = DEADLINE
) -> Iterator[Answer]:
    """Ask guests from this process; gives answers as they come, exactly one per guest.

    :param deadline: seconds for all of them together
    """

    def one(domain: Domain) -> Answer:
        entries, damage = ask(domain, what, strategy)
        return Answer(domain.name, entries, damage=damage)

    return asked(fleet, one, failed, lambda domain: late(domain, deadline), deadline)


def asked(
    fleet: Sequence[Domain],
    one: Callable[[Domain], Told],
    failed: Callable[[Domain, BaseException], Told],
    late: Callable[[Domain], Told],
    deadline: float = DEADLINE,
) -> Iterator[Told]:
    """What ``one`` tells of each guest, asked from threads of this process; as it comes, exactly one per guest.

    :param failed: tells instead of a guest that could not be read
    :param late: the same, of one that did not answer in time
    :param deadline: seconds for all of them together
    """
    until = time.monotonic() + deadline
    waiting: SimpleQueue[Domain] = SimpleQueue()
    answers: SimpleQueue[tuple[str, Told]] = SimpleQueue()
    for domain in fleet:
        waiting.put(domain)

    def work() -> None:
        while time.monotonic() < until:
            try:
                domain = waiting.get_nowait()
            except Empty:
                return
            try:
                answer = one(domain)
            except Exception as error:  # no error may stop this thread, which still has guests to ask
                answer = failed(domain, error)
            answers.put((domain.name, answer))

    # Daemon threads: one that hangs beyond the deadline does not keep the process alive.
    for number in range(min(WIDTH, len(fleet))):
        threading.Thread(target=work, name=f"fleet-{number}", daemon=True).start()
    missing = {domain.name: domain for domain in fleet}
    while missing:
        try:
            name, answer = answers.get(timeout=max(until - time.monotonic(), 0))
        except Empty:
            break
        del missing[name]
        yield answer
    for domain in missing.values():
        yield late(domain)


def failed(domain: Domain, error: BaseException) -> Answer:
    """The answer for a guest that could not be read."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return Answer(domain.name, error=text if isinstance(error, LibvmiError) else f"{type(error).__name__}: {text}")


def late(domain: Domain, deadline: float) -> Answer:
    """The answer for a guest that did not answer in time."""
    return Answer(domain.name, error=f"no answer within {deadline:g} s")
