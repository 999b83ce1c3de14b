"""The same list of many guests at once. One that does not answer never holds the others up: its error is its answer.

On this machine by threads, since all of it is waiting for agents (`over`); by more machines on a Dask cluster that is
there already (`by_dask`). What is done for one guest, `ask`, is the same function.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any

from vmishim.errors import LibvmiError, LinkError
from vmishim.guests import domains
from vmishim.guests.agent import Strategy
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.inspection import objects
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.libvmi import Libvmi

Entry = Task | Module | Socket

WIDTH = 32
"""Guests asked at the same time by one process."""
DEADLINE = 30.0
"""Seconds after which a guest that has not answered has failed."""
RETRIES = 3
"""Workers of a cluster that may die over one guest before it has failed."""
LISTS: dict[str, Callable[[Libvmi], Iterator[Entry]]] = {
    "ps": objects.tasks,
    "lsmod": objects.modules,
    "ss": objects.sockets,
}
"""By the commands that show them."""


@dataclass(frozen=True)
class Answer:
    """What one guest said.

    :ivar entries: its list; empty if it failed
    :ivar error: why it failed, on one line; empty if it did not
    """

    domain: str
    entries: Sequence[Entry] = ()
    error: str = ""


def matching(pattern: str) -> list[Domain]:
    """The enrolled guests whose names match, such as ``web-*``, in the order of the file.

    :raises LibvmiError: ``domains.toml`` is wrong
    """
    return [domain for name, domain in domains.load().items() if fnmatchcase(name, pattern)]


def ask(domain: Domain, what: str, strategy: Strategy = "batch") -> list[Entry]:
    """One list of one guest, read within one hold.

    :param what: a key of `LISTS`
    :raises LibvmiError: it can't be reached, or read
    """
    with Libvmi.over(reach(domain, strategy=strategy)) as vmi:
        return objects.whole(vmi, LISTS[what])


def over(
    fleet: Sequence[Domain], what: str, strategy: Strategy = "batch", deadline: float = DEADLINE
) -> Iterator[Answer]:
    """Ask guests from this process; answers as they come, each guest's exactly once.

    :param deadline: seconds for all of them together
    """
    until = time.monotonic() + deadline
    waiting: SimpleQueue[Domain] = SimpleQueue()
    answers: SimpleQueue[Answer] = SimpleQueue()
    for domain in fleet:
        waiting.put(domain)

    def work() -> None:
        while time.monotonic() < until:
            try:
                domain = waiting.get_nowait()
            except Empty:
                return
            try:
                answer = Answer(domain.name, ask(domain, what, strategy))
            except Exception as error:  # whatever it is, it must not stop this thread: others are to be asked
                answer = failed(domain, error)
            answers.put(answer)

    # Daemons: one that hangs beyond the deadline does not keep the process.
    for number in range(min(WIDTH, len(fleet))):
        threading.Thread(target=work, name=f"fleet-{number}", daemon=True).start()
    missing = {domain.name: domain for domain in fleet}
    while missing:
        try:
            answer = answers.get(timeout=max(until - time.monotonic(), 0))
        except Empty:
            break
        del missing[answer.domain]
        yield answer
    for domain in missing.values():
        yield late(domain, deadline)


def by_dask(
    address: str, fleet: Sequence[Domain], what: str, strategy: Strategy = "batch", deadline: float = DEADLINE
) -> Iterator[Answer]:
    """Ask guests from the workers of a Dask cluster; otherwise as `over`.

    A worker that dies is replaced by another. Workers need this version of vmishim, a network path to the agents, and
    the private keys where the entries say they are.

    :param address: of its scheduler, ``HOST:PORT``
    :raises LinkError: there is no cluster, or ``vmishim[dask]`` is not installed
    """
    try:
        # It is typed in part only.
        distributed: Any = import_module("distributed")
    except ModuleNotFoundError:
        raise LinkError("an engine dask:// needs Dask: pip install 'vmishim[dask]'") from None
    until = time.monotonic() + deadline
    try:
        client = distributed.Client(f"tcp://{address}", timeout=min(deadline, 10), set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise LinkError(f"no Dask scheduler answers at {address}: {error}") from None
    with client:
        waiting = {client.submit(ask, each, what, strategy, pure=False, retries=RETRIES): each for each in fleet}
        try:
            left = max(until - time.monotonic(), 0.1)
            for future in distributed.as_completed(list(waiting), loop=client.loop, timeout=left):
                domain = waiting.pop(future)
                went_wrong = future.exception()
                yield failed(domain, went_wrong) if went_wrong else Answer(domain.name, future.result())
        except TimeoutError:
            client.cancel(list(waiting))
        for domain in waiting.values():
            yield late(domain, deadline)


def failed(domain: Domain, error: BaseException) -> Answer:
    """The answer of a guest that could not be asked."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return Answer(domain.name, error=text if isinstance(error, LibvmiError) else f"{type(error).__name__}: {text}")


def late(domain: Domain, deadline: float) -> Answer:
    """The answer of a guest that gave none in time."""
    return Answer(domain.name, error=f"no answer within {deadline:g} s")


def engine(named: str) -> Callable[..., Iterator[Answer]]:
    """The one that is named: nothing, for this process, or ``dask://HOST:PORT``.

    :raises LinkError: it is none of these
    """
    if not named:
        return over
    scheme, _, address = named.partition("://")
    if scheme != "dask" or not address:
        raise LinkError(f"there is no engine {named!r}; there is dask://HOST:PORT")

    def asked(*arguments: Any, **more: Any) -> Iterator[Answer]:
        return by_dask(address, *arguments, **more)

    return asked
