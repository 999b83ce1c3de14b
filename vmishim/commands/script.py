"""``vmishim run``: an unchanged LibVMI script, with vmishim as its ``libvmi``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver, reach
from vmishim.guests.target import Target
from vmishim.script import Inherited, execute


def run(options: argparse.Namespace) -> int:
    """Run a script.

    :raises CommandError: no such script
    :raises LinkError: with ``--local``: no agent can run here
    :raises SystemExit: the script ends so
    """
    if not Path(options.script).is_file():
        raise CommandError(f"no such script: {options.script}")
    meter = Meter(options.strategy)

    def metered(domain: Domain) -> Target:
        target = reach(domain, options.strategy)
        meter.add(target)
        return target

    resolver, inherited = Resolver(reach=metered), Inherited(options.strategy)
    with ExitStack() as stack:
        if options.local:
            from vmishim.guests import local

            # Before the script starts, so that a missing requirement is one clear error.
            here = stack.enter_context(local.agent())
            resolver = Resolver(find=lambda name, _: replace(here, name=name), reach=metered)
            inherited = replace(inherited, entry=asdict(here))
        if options.stats:
            stack.callback(meter.report)
        return execute(options.script, options.arguments, resolver, inherited)
