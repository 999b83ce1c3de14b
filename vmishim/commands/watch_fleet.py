"""``vmishim watch --domains``: many guests, each looked at again and again over a session that stays open.

A terminal shows a table of guests; other outputs get records (`vmishim.watching.records`). SIGHUP reads the list of
guests again, and opens the output file again; SIGTERM and Ctrl-C end the watch after what is known is written.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from vmishim.commands import CommandError, watch_screen
from vmishim.inspection import cluster
from vmishim.watching import metrics, outlets
from vmishim.watching.fleet import FleetWatch

INTERVAL = 1.0
"""Seconds between two looks at a guest."""


def watch(options: argparse.Namespace) -> int:
    """Watch until SIGTERM, Ctrl-C, or ``q`` on a terminal.

    :raises CommandError: no guest's name matches
    :raises LibvmiError: ``domains.toml`` is not valid
    :raises OSError: an output can't be opened
    """
    scheduler = cluster.scheduler_of(options.engine, options.engine_tls) if options.engine else None
    watched = FleetWatch(
        options.domains or _escaped(options.domain), options.interval or INTERVAL, options.lists, scheduler
    )
    on_terminal = sys.stdout.isatty() and sys.stdin.isatty() and not options.json
    with ExitStack() as stack:
        at = metrics.address(options.metrics) if options.metrics else None
        if options.output:
            watched.outlets.append(outlets.File(Path(options.output), watched.say))
        if options.journal:
            watched.outlets.append(outlets.Journal(watched.say))
        if options.syslog:
            watched.outlets.append(outlets.Syslog(watched.say))
        if not watched.outlets and not on_terminal:
            watched.outlets.append(outlets.Stream(watched.say))
        if at:
            stack.callback(metrics.serve(at, watched.figures))
        stack.enter_context(_signals(watched))
        if not watched.matching():
            raise CommandError(f"no domain matches {watched.pattern!r}; list them with `vmishim domains`")
        watched.begin()
        try:
            if on_terminal:
                watch_screen.run(watched)
            else:
                watched.rounds.run()
        finally:
            watched.end()
    return 0


@contextmanager
def _signals(watched: FleetWatch) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP become tasks of the rounds."""

    def later(task: Callable[[], object]) -> Callable[[int, FrameType | None], None]:
        return lambda *_: watched.rounds.inbox.put(task)

    stop = later(watched.rounds.stop)
    wanted = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: later(watched.reread)}
    before = {number: signal.signal(number, each) for number, each in wanted.items()}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def _escaped(name: str) -> str:
    """The pattern that matches one name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
