"""``vmishim drgn``: drgn's prompt, scripts and crash-style commands on a guest."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vmishim.commands import CommandError
from vmishim.commands.guests import Meter
from vmishim.foreign import printable
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver, reach
from vmishim.guests.target import Target
from vmishim.script import Inherited, execute, executed

INIT = 1
"""The process that crash-style commands are about until you ``set`` another."""


def drgn(options: argparse.Namespace) -> int:
    """Open a guest in drgn, then run a script, an expression, or a crash command; or ask for statements.

    :raises CommandError: drgn is not installed, or there is no such script
    :raises LibvmiError: no such domain, or its kernel lacks what drgn needs
    :raises LinkError: the guest's agent can't be reached, or none can run here
    """
    domain, words = _words(options)
    if words and not options.crash and options.code is None and not Path(words[0]).is_file():
        raise CommandError(f"no such script: {words[0]}")
    try:
        import drgn as of_drgn

        from vmishim.drgn import close, program
    except ImportError as error:
        raise CommandError(str(error)) from None
    meter = Meter("batch")

    def metered(entry: Domain) -> Target:
        target = reach(entry)
        meter.add(target)
        return target

    resolver, inherited = Resolver(reach=metered), Inherited()
    with ExitStack() as stack:
        if options.local:
            from vmishim.guests import local

            here = stack.enter_context(local.agent())
            resolver = Resolver(find=lambda name, _: replace(here, name=name), reach=metered)
            inherited = replace(inherited, entry=asdict(here))
        prog = program(domain, options.keep, resolver=resolver)
        stack.callback(close, prog)
        if options.stats:
            stack.callback(meter.report)
        of_drgn.set_default_prog(prog)
        if options.crash:
            return _crash(prog, words)
        if options.code is None and words:
            return execute(words[0], words[1:], resolver, inherited, {"prog": prog})
        if options.code is None and sys.stdin is not None and sys.stdin.isatty():
            return _prompt(prog, domain)
        return _code(prog, options.code, words)


def _words(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The domain's name, and the words after it. :raises CommandError: no domain"""
    words: list[str] = options.words
    if options.local:
        return "local", [*([options.domain] if options.domain is not None else []), *words]
    if options.domain is None:
        options.parser.error("drgn needs a DOMAIN, or --local for this machine")
    return options.domain, words


def _crash(prog: Any, words: list[str]) -> int:
    """Run one crash-style command, or each line of standard input."""
    # Of a machine that it does not run on, drgn does not know which task to begin with.
    _crash_command(prog, f"set {INIT} >/dev/null")
    if words:
        # One word may be a whole command with pipes, as after a shell's -c.
        return 0 if _crash_command(prog, words[0] if len(words) == 1 else shlex.join(words)) else 1
    if sys.stdin is None:
        raise CommandError("standard input is closed, so there is nothing to run")
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401 # which lets you edit the line

        _crash_command(prog, "sys")
    good = True
    while (line := _line("%crash> " if asked else "")) is not None:
        if line in ("q", "exit"):
            break
        if line:
            good &= _crash_command(prog, line)
    return 0 if good or asked else 1


def _line(prompt: str) -> str | None:
    """The next line; None at the end."""
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            print("^C")


def _crash_command(prog: Any, text: str) -> bool:
    """Run a crash-style command. Not drgn's own prompt for them, which begins with the task that runs drgn or that
    crashed: here neither is known. False if it failed."""
    from drgn.cli import default_globals
    from drgn.commands import run_command

    failures: list[Exception] = []
    run_command(prog, f"crash {text}", globals=default_globals(prog), onerror=failures.append)
    sys.stdout.flush()
    for failure in failures:
        print(f"crash: {printable(str(failure))}", file=sys.stderr)
    return not failures


def _prompt(prog: Any, name: str) -> int:
    from drgn.cli import run_interactive, version_header

    print(version_header(), file=sys.stderr, flush=True)
    release = prog["UTS_RELEASE"].string_().decode()
    about = f"prog is {name!r}, Linux {release}; %crash has crash-style commands."
    run_interactive(prog, lambda banner: f"{about}\n{banner}")
    return 0


def _code(prog: Any, code: str | None, words: list[str]) -> int:
    from drgn.cli import default_globals

    if code is None and sys.stdin is None:
        raise CommandError("standard input is closed, so there is nothing to run")
    where = "<stdin>" if code is None else "-e"
    sys.argv = ["" if code is None else where, *words]
    sys.path.insert(0, "")
    with executed() as status:
        text = sys.stdin.read() if code is None else code
        exec(compile(text, where, "exec"), default_globals(prog))  # noqa: S102 # that is what you asked for
    return status[0]
