"""``vmishim run``: an unchanged LibVMI script or program, with vmishim as its ``libvmi`` or ``libvmi.so.0``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from vmishim import program
from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver, reach
from vmishim.guests.target import Target
from vmishim.script import Inherited, execute


def run(options: argparse.Namespace) -> int:
    """Run a script, or a compiled program.

    :raises CommandError: no such script; an option does not suit it
    :raises LibvmiError: a program needs ``libvmi.so.0``, and it is not built
    :raises LinkError: with ``--local``: no agent can run here
    :raises SystemExit: the script ends so
    """
    found = program.find(options.script)
    if found is not None:
        return _program(found, options)
    if options.abi or options.poll_events:
        raise CommandError(f"--abi and --poll-events are for compiled programs, and {options.script} is none")
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


def _program(path: str, options: argparse.Namespace) -> int:
    """Run a compiled program."""
    settings = program.Settings(options.abi or "", options.poll_events, options.stats)
    inherited = Inherited(options.strategy)
    if not options.local:
        program.become(path, options.arguments, inherited, settings)
    from vmishim.guests import local

    with local.agent() as here:
        return program.run(path, options.arguments, replace(inherited, entry=asdict(here)), settings)
