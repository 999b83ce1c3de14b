"""``vmishim vol``: Volatility 3 on a guest."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver, reach, resolving
from vmishim.guests.target import Target

PLUGINS = Path(__file__).parents[1] / "compat" / "volatility"
"""The folder of the file that Volatility loads, which is under Volatility's own licence."""


def vol(options: argparse.Namespace) -> int:
    """Start Volatility as its own command does, with a guest as its file. What it prints is its own.

    :raises CommandError: Volatility is not installed
    :raises LibvmiError: no such domain, or its kernel lacks what Volatility needs
    :raises LinkError: the guest's agent can't be reached, or none can run here
    :raises SystemExit: Volatility ends so
    """
    words: list[str] = options.words
    try:
        from volatility3.framework import constants
    except ImportError:
        raise CommandError("Volatility is not installed: pip install 'vmishim[vol]'") from None
    from vmishim.volatility import guest as guests

    meter = Meter("batch")

    def metered(entry: Domain) -> Target:
        target = reach(entry)
        meter.add(target)
        return target

    with ExitStack() as stack:
        resolver = Resolver(reach=metered)
        if options.local:
            from vmishim.guests import local

            here = stack.enter_context(local.agent())
            resolver = Resolver(find=lambda name, _: replace(here, name=name), reach=metered)
        stack.enter_context(resolving(resolver))
        location = f"{guests.SCHEME}://{options.domain}"
        if {"-h", "--help"}.isdisjoint(words):
            # Before Volatility starts, so that what is wrong with the guest is one clear error.
            guests.guest(location)
        if options.stats:
            stack.callback(meter.report)
        constants.PLUGINS_PATH.append(str(PLUGINS))
        sys.argv = ["vol", "-f", location, *words]
        from volatility3 import cli

        cli.main()
    return 0
