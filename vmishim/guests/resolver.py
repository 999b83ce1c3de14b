"""From a name to a guest: what ``Libvmi("web-1")`` does, and how ``vmishim run`` does it differently for one script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmishim.guests import domains
from vmishim.guests.domains import Domain
from vmishim.guests.target import Target

if TYPE_CHECKING:
    from vmishim.guests.agent import Strategy


def reach(domain: Domain, strategy: Strategy = "batch") -> Target:
    """Open a guest: by its agent if its entry names one, otherwise by the file of its memory.

    :param strategy: how an agent is asked for memory; a RAM file is always read directly
    :raises LibvmiError: ``VM_NOT_FOUND``, ``OS``: its memory cannot be read, or holds no kernel that vmishim knows
    :raises AttestationError: its machine does not show what its entry requires
    :raises LinkError: its agent cannot be reached, or has another key than the one enrolled
    """
    # Imported here: each takes time, and one guest needs only one of them.
    if domain.agent:
        from vmishim.guests import agent

        return agent.connect(domain, strategy)
    from vmishim.guests.ramfile import RamFile

    return RamFile(domain.name, Path(domain.ramfile).expanduser(), symbols=domain.symbols or None)


@dataclass(frozen=True)
class Resolver:
    """How a name becomes a guest; by default as ``domains.toml`` says.

    :ivar find: the entry of a name, or of an ``id`` in digits if the second argument is true
    :ivar reach: opens the guest of an entry
    """

    find: Callable[[str, bool], Domain] = domains.find
    reach: Callable[[Domain], Target] = reach


ENROLLED = Resolver()

_of_context: ContextVar[Resolver | None] = ContextVar("vmishim resolver", default=None)
_blocks: list[Resolver] = []
"""Resolvers of all `resolving` blocks of this process, the innermost last."""


def current() -> Resolver:
    """The resolver that counts here: see `resolving`."""
    return _of_context.get() or (_blocks[-1] if _blocks else ENROLLED)


def use(resolver: Resolver) -> None:
    """Use ``resolver`` for every ``Libvmi(name)`` of this process outside of `resolving` blocks."""
    _blocks.insert(0, resolver)


@contextmanager
def resolving(resolver: Resolver) -> Iterator[None]:
    """Use ``resolver`` for every ``Libvmi(name)`` within the block.

    That includes threads that a script starts there: a new thread has an empty context, so a thread that has no
    resolver of its own uses that of the process's innermost block.
    """
    token = _of_context.set(resolver)
    _blocks.append(resolver)
    try:
        yield
    finally:
        del _blocks[next(at for at in reversed(range(len(_blocks))) if _blocks[at] is resolver)]
        _of_context.reset(token)
