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

from vmishim import domains
from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.constants import VMIInitData
from vmishim.guest import Way
from vmishim.target import Target

COMPAT = Path(__file__).parents[2] / "compat"
"""Where our package named ``libvmi`` is."""

Opener = Callable[[str, Mapping[VMIInitData, str] | None, bool], Target]


def run(options: argparse.Namespace) -> int:
    """Run a script.

    :raises CommandError: there is no such script
    :raises LinkError: with ``--local``: no agent can run here
    :raises SystemExit: the script ends so
    """
    if not Path(options.script).is_file():
        raise CommandError(f"there is no script {options.script}")
    meter = Meter(options.way)
    with ExitStack() as stack:
        reach = _local(stack, options.way) if options.local else _enrolled(options.way)

        def counted(name: str, init_data: Mapping[VMIInitData, str] | None, by_id: bool) -> Target:
            target = reach(name, init_data, by_id)
            meter.add(target)
            return target

        if options.stats:
            stack.callback(meter.report)
        return execute(options.script, options.arguments, counted)


def execute(script: str, arguments: Sequence[str], reach: Opener) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, but for ``import libvmi``, which is ours.

    :param reach: opens the domains that the script names
    :returns: 0; 1 after the traceback of what it raised, 130 if that was Ctrl-C
    :raises SystemExit: the script did
    """
    with _as_main(script, arguments), _detour(reach):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit:
            raise
        except BrokenPipeError:
            raise
        except BaseException as error:
            sys.excepthook(type(error), error, _from_script(error.__traceback__, script))
            return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _local(stack: ExitStack, way: Way) -> Opener:
    """This machine under any name. The agent starts before the script, so that what it lacks is told plainly."""
    from vmishim import local
    from vmishim.guest import connect
    from vmishim.wire.keys import PublicKey, load_private

    endpoint, key, public = stack.enter_context(local.agent())

    def reach(name: str, init_data: object, by_id: bool) -> Target:
        return connect(name, endpoint, load_private(key), PublicKey.from_text(public), way=way)

    return reach


def _enrolled(way: Way) -> Opener:
    def reach(name: str, init_data: Mapping[VMIInitData, str] | None, by_id: bool) -> Target:
        return domains.reach(domains.find(name, by_id), init_data, way)

    return reach


@contextmanager
def _detour(reach: Opener) -> Iterator[None]:
    before, domains.detour = domains.detour, reach
    try:
        yield
    finally:
        domains.detour = before


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
