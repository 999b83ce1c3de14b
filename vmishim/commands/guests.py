"""Guests, as options name them, and what reading them took."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmishim.guests import domains
from vmishim.guests.agent import Strategy
from vmishim.guests.target import Target
from vmishim.libvmi import Libvmi


class Meter:
    """Counts what all guests of a command take, from its making on."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._targets: list[Target] = []
        self._begun = time.perf_counter()

    def add(self, target: Target) -> None:
        """Count this guest too."""
        self._targets.append(target)

    def report(self) -> None:
        """Say it on standard error, in one line."""
        from vmishim.guests.agent import AgentGuest

        taken = time.perf_counter() - self._begun
        links = [target.link for target in self._targets if isinstance(target, AgentGuest)]
        requests, handshakes = (sum(getattr(link, name) for link in links) for name in ("requests", "handshakes"))
        carried = sum(link.bytes_sent + link.bytes_received for link in links)
        counted = ", ".join((_many(requests, "request"), _many(carried, "byte"), _many(handshakes, "handshake")))
        print(f"vmishim: {self._strategy}: {counted}, {taken:.3f} s", file=sys.stderr)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@contextmanager
def target(options: argparse.Namespace) -> Iterator[Target]:
    """The guest that ``options.domain`` or ``options.local`` names.

    :raises LibvmiError: no such domain
    :raises LinkError: its agent can't be reached, or none can run here
    """
    strategy: Strategy = getattr(options, "strategy", "batch")
    if getattr(options, "local", False):
        from vmishim.guests import local

        with local.guest(strategy) as guest:
            yield guest
        return
    reached = domains.reach(domains.find(options.domain), strategy=strategy)
    try:
        yield reached
    finally:
        reached.close()


@contextmanager
def libvmi(options: argparse.Namespace) -> Iterator[Libvmi]:
    """As `target`, through LibVMI's class; with ``options.stats`` it says in the end what was taken."""
    meter = Meter(options.strategy)
    with target(options) as reached:
        meter.add(reached)
        yield Libvmi.over(reached)
        if options.stats:
            meter.report()
