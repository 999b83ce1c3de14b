"""Run an unchanged LibVMI script in this process, with vmishim as its ``libvmi``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from vmishim.errors import LibvmiError
from vmishim.guests.resolver import ENROLLED, Resolver, resolving

COMPAT = Path(__file__).parent / "compat"
"""The folder that holds our package named ``libvmi``."""


def execute(script: str, arguments: Sequence[str], resolver: Resolver = ENROLLED) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, except that ``import libvmi`` imports ours.

    :param resolver: finds and opens the domains that the script names
    :returns: 0; 1 after the traceback of what it raised, 130 if that was Ctrl-C
    :raises LibvmiError: this installation lacks that package
    :raises SystemExit: the script did
    """
    with _as_main(script, arguments), resolving(resolver):
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
def _as_main(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Set ``sys.argv`` and ``sys.path`` as the script expects them, and import ``libvmi`` from ``compat``.

    That folder is on the path for this import only: nothing else in it may hide a module of the script.
    """
    argv, path = sys.argv, sys.path
    sys.argv = [script, *arguments]
    rest = path if sys.flags.safe_path else path[1:]
    # `isolated.script_runner` makes the path safe for our own modules; for the script, only the user decides.
    alone = bool(os.environ.get("PYTHONSAFEPATH")) and not sys.flags.ignore_environment
    sys.path = [str(COMPAT), *rest]
    try:
        ours = sys.modules.get("libvmi")
        if ours is None or not str(getattr(ours, "__file__", "")).startswith(str(COMPAT)):
            _import_ours()
        sys.path = rest if alone else [os.path.dirname(os.path.abspath(script)), *rest]
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
        raise LibvmiError(f"this installation has no {COMPAT}/libvmi: install vmishim again") from None


def _from_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback from the script on; none for a syntax error; all of it if the script was never entered."""
    whole = trace
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace or (None if isinstance(sys.exc_info()[1], SyntaxError) else whole)
