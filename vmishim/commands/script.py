"""``vmishim run``: an unchanged LibVMI script, with vmishim as its ``libvmi``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.guests import domains
from vmishim.guests.domains import Domain
from vmishim.guests.target import Target
from vmishim.libvmi.constants import VMIInitData

COMPAT = Path(__file__).parents[1] / "compat"
"""The folder that holds our package named ``libvmi``."""

Opener = Callable[[Domain, Mapping[VMIInitData, str] | None], Target]


def run(options: argparse.Namespace) -> int:
    """Run a script.

    :raises CommandError: there is no such script
    :raises LinkError: with ``--local``: no agent can run here
    :raises SystemExit: the script ends so
    """
    if not Path(options.script).is_file():
        raise CommandError(f"there is no script {options.script}")
    meter = Meter(options.strategy)

    def reach(domain: Domain, init_data: Mapping[VMIInitData, str] | None) -> Target:
        target = domains.reach(domain, init_data, options.strategy)
        meter.add(target)
        return target

    with ExitStack() as stack:
        here = None
        if options.local:
            from vmishim.guests import local

            # Before the script, so that what is missing is told plainly.
            endpoint, key, public = stack.enter_context(local.agent())
            here = Domain("local", agent=endpoint, agent_key=public, key=str(key))
        if options.stats:
            stack.callback(meter.report)
        return execute(options.script, options.arguments, reach, here)


def execute(script: str, arguments: Sequence[str], reach: Opener, stand_in: Domain | None = None) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, but for ``import libvmi``, which is ours.

    :param reach: opens the domains that the script names
    :param stand_in: what every such name means, instead of its entry in ``domains.toml``
    :returns: 0; 1 after the traceback of what it raised, 130 if that was Ctrl-C
    :raises SystemExit: the script did
    """
    with _as_main(script, arguments), _detour(reach, stand_in):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit:
            raise
        except BrokenPipeError:
            raise
        except BaseException as error:
            trace = _from_script(error.__traceback__, script)
            sys.excepthook(type(error), error.with_traceback(trace), trace)
            return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


@contextmanager
def _detour(reach: Opener, stand_in: Domain | None) -> Iterator[None]:
    before = domains.detour, domains.stand_in
    domains.detour, domains.stand_in = reach, stand_in
    try:
        yield
    finally:
        domains.detour, domains.stand_in = before


@contextmanager
def _as_main(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as the script expects them, and ``libvmi`` imported from ``compat``.

    That folder is on the path only for this import: nothing else in it may hide a module of the script's own.
    """
    argv, path = sys.argv, sys.path
    sys.argv = [script, *arguments]
    rest = path if sys.flags.safe_path else path[1:]
    sys.path = [str(COMPAT), *rest]
    try:
        ours = sys.modules.get("libvmi")
        if ours is None or not str(getattr(ours, "__file__", "")).startswith(str(COMPAT)):
            _import_ours()
        sys.path = rest if sys.flags.safe_path else [os.path.dirname(os.path.abspath(script)), *rest]
        yield
    finally:
        sys.argv, sys.path = argv, path


def _import_ours() -> None:
    for name in [name for name in sys.modules if name == "libvmi" or name.startswith("libvmi.")]:
        del sys.modules[name]
    try:
        __import__("libvmi")
    except ModuleNotFoundError as error:
        if error.name != "libvmi":
            raise
        raise CommandError(f"this installation has no {COMPAT}/libvmi; install vmishim again") from None


def _from_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback from where the script begins; all of it when it never began, as for a syntax error."""
    whole = trace
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace or (None if isinstance(sys.exc_info()[1], SyntaxError) else whole)
