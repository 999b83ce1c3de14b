"""Guests, as the command line names them, and what reading them cost."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from vmishim.guests import domains
from vmishim.guests.agent import Strategy
from vmishim.guests.resolver import reach
from vmishim.guests.target import Target
from vmishim.libvmi import Libvmi
from vmishim.plural import counted


class Meter:
    """Counts what all guests of a command cost, from the moment it is made."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._targets: list[Target] = []
        self._begun = time.perf_counter()

    def add(self, target: Target) -> None:
        """Count this guest too."""
        self._targets.append(target)

    def report(self) -> None:
        """Print it on standard error, in one line."""
        taken = time.perf_counter() - self._begun
        links = [target.agent.link for target in self._targets if target.agent is not None]
        requests = sum(link.requests for link in links)
        handshakes = sum(link.handshakes for link in links)
        carried = sum(link.bytes_sent + link.bytes_received for link in links)
        cost = counted(requests, "request"), counted(carried, "byte"), counted(handshakes, "handshake")
        print(f"vmishim: {self._strategy}: {', '.join(cost)}, {taken:.3f} s", file=sys.stderr)


@contextmanager
def target(domain: str, local: bool = False, strategy: Strategy = "batch") -> Iterator[Target]:
    """A guest for the length of the block.

    :param domain: its name
    :param local: this machine instead
    :raises LibvmiError: no such domain
    :raises LinkError: its agent can't be reached, or none can run here
    """
    if local:
        from vmishim.guests import local as machine

        with machine.guest(strategy) as guest:
            yield guest
        return
    with closing(reach(domains.find(domain), strategy)) as reached:
        yield reached


@contextmanager
def libvmi(options: argparse.Namespace) -> Iterator[Libvmi]:
    """The guest that ``options`` name, through LibVMI's class; with ``options.stats``, says at the end what it took."""
    meter = Meter(options.strategy)
    with target(options.domain, options.local, options.strategy) as reached:
        meter.add(reached)
        yield Libvmi.over(reached)
        if options.stats:
            meter.report()
