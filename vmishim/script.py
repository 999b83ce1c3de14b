"""Run an unchanged LibVMI script in this process, with vmishim as its ``libvmi``."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmishim.errors import LibvmiError
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import ENROLLED, Resolver, reach, resolving, use

if TYPE_CHECKING:
    from vmishim.guests.agent import Strategy

COMPAT = Path(__file__).parent / "compat"
"""The folder that holds our package named ``libvmi``."""
CHILDREN = Path(__file__).parent / "children"
"""The folder that holds nothing but `libvmi` for the script's child processes."""
INHERITED = "VMISHIM_SCRIPT"
"""Environment variable that says to the script's child processes how to open guests, as JSON of `Inherited`."""


@dataclass(frozen=True)
class Inherited:
    """How a script's child processes open guests.

    :ivar strategy: how an agent is asked for memory
    :ivar entry: the settings of the entry that stands for every name; None: ``domains.toml`` counts
    """

    strategy: Strategy = "batch"
    entry: dict[str, Any] | None = None

    def resolver(self) -> Resolver:
        """As a resolver."""
        if self.entry is None:
            return Resolver(reach=lambda domain: reach(domain, self.strategy))
        entry = Domain(**self.entry)
        return Resolver(
            find=lambda name, _: replace(entry, name=name),
            reach=lambda domain: reach(replace(entry, name=domain.name), self.strategy),
        )


def inherit() -> None:
    """In a child process of a script: open guests as its parent does. Without a parent, as always."""
    if text := os.environ.get(INHERITED):
        use(Inherited(**json.loads(text)).resolver())


def execute(
    script: str,
    arguments: Sequence[str],
    resolver: Resolver = ENROLLED,
    inherited: Inherited | None = None,
    given: dict[str, Any] | None = None,
) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS`` would, except that ``import libvmi`` imports ours, in its child
    processes too.

    :param resolver: finds and opens the domains that the script names
    :param inherited: the same for child processes that do not share this one's memory
    :param given: global variables that the script has from the start
    :returns: 0; 1 after the traceback of what it raised, 130 if that was Ctrl-C
    :raises LibvmiError: this installation lacks that package
    :raises SystemExit: the script did
    """
    with (
        _as_main(script, arguments),
        resolving(resolver),
        _children(inherited or Inherited()),
        executed(script) as status,
    ):
        runpy.run_path(script, given, run_name="__main__")
    return status[0]


@contextmanager
def executed(script: str | None = None) -> Iterator[list[int]]:
    """Show what a user's code within the block raises as an interpreter would.

    :param script: its file: the traceback begins there
    :returns: a list with the exit status, known after the block: 0; 1 after a traceback, 130 if that was Ctrl-C
    """
    status = [0]
    try:
        yield status
    except (SystemExit, BrokenPipeError):
        raise
    except BaseException as error:
        trace = _from_script(error.__traceback__, script)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status[0] = 130 if isinstance(error, KeyboardInterrupt) else 1


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
        sys.path = [*([] if alone else [os.path.dirname(os.path.abspath(script))]), str(CHILDREN), *rest]
        yield
    finally:
        sys.argv, sys.path = argv, path


@contextmanager
def _children(inherited: Inherited) -> Iterator[None]:
    """For the length of the block, child processes find our ``libvmi``: those of multiprocessing by ``sys.path``, which
    it passes on, other interpreters by ``PYTHONPATH``."""
    theirs = os.environ.get("PYTHONPATH")
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHILDREN), theirs))),
        INHERITED: json.dumps(asdict(inherited)),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _import_ours() -> None:
    for name in [name for name in sys.modules if name == "libvmi" or name.startswith("libvmi.")]:
        del sys.modules[name]
    try:
        __import__("libvmi")
    except ModuleNotFoundError as error:
        if error.name != "libvmi":
            raise
        raise LibvmiError(f"this installation has no {COMPAT}/libvmi: install vmishim again") from None


def _from_script(trace: TracebackType | None, script: str | None) -> TracebackType | None:
    """The traceback from the script on, or from code that is in no file; none for a syntax error; all of it if the
    script was never entered."""
    whole = trace
    while trace is not None and trace.tb_frame.f_code.co_filename not in (script, "-e", "<stdin>"):
        trace = trace.tb_next
    return trace or (None if isinstance(sys.exc_info()[1], SyntaxError) else whole)
