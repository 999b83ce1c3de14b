"""``vmishim compare``: one unchanged script on every backend of a guest; answers and costs side by side."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vmishim import files
from vmishim.commands import CommandError
from vmishim.errors import LibvmiError
from vmishim.guests import domains
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach

EXIT = {"agreed": 0, "differ": 1, "error": 2, "nothing": 2}


class CompareError(CommandError):
    """The comparison cannot be made. The exit status is another one than that of answers that differ."""

    status = EXIT["error"]


def compare(options: argparse.Namespace) -> int:
    """Compare; 0 the answers agree, 1 they differ, 2 a backend failed or the script asked nothing.

    :raises CompareError: no such script or guest, fewer than two backends, or QEMU's monitor does not answer
    """
    from vmishim.compare import backends, engine, report

    if not Path(options.script).is_file():
        raise CompareError(f"no such script: {options.script}")
    written = [f"{options.output}.json", f"{options.output}.html"]
    for path in written:
        try:
            files.refuse_other_than_file(path)
        except OSError as error:
            raise CompareError(f"{path} {error.strerror}") from None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmishim-")))
        try:
            guest = _here(stack) if options.local else _guest(options)
            monitor = engine.Monitor(options.qmp) if options.qmp else None
            if monitor is not None:
                stack.callback(monitor.close)
                if not monitor.running:
                    raise CompareError("the guest is stopped, so no agent in it can answer: resume it")
            _say("looking for backends")
            genuine = options.genuine or os.environ.get("VMISHIM_GENUINE_PYTHON", "")
            found = list(backends.find(guest, folder, genuine, options.local))
            wanted = set(options.only.split(",")) if options.only else set(backends.NAMES)
            if unknown := wanted - set(backends.NAMES):
                raise CompareError(
                    f"unknown backend {', '.join(sorted(unknown))}; known are {', '.join(backends.NAMES)}"
                )
            there = [each for each in found if isinstance(each, backends.Backend) and each.name in wanted]
            missing = [each for each in found if isinstance(each, backends.Missing) and each.name in wanted]
            if len(there) < 2:
                why = "; ".join(f"no {each.name}: {each.why}" for each in missing)
                raise CompareError(
                    f"comparing needs two backends of {guest.name}, but {len(there) or 'none'} can be used; {why}"
                )
            job = engine.Job(
                options.script,
                options.arguments,
                guest.name,
                _release(guest),
                runs=options.runs,
                timeout=options.timeout,
            )
            made = engine.run(job, there, missing, monitor, _say)
        except LibvmiError as error:
            raise CompareError(str(error).partition(": ")[2] or str(error)) from None
        except engine.QmpError as error:
            raise CompareError(str(error)) from None
        _say("")
    for path, text in zip(written, (json.dumps(made, indent=1) + "\n", report.page(made)), strict=True):
        files.write(path, text.encode())
    report.table(made)
    print(f"wrote {' and '.join(written)}", file=sys.stderr)
    return EXIT[made["result"]]


def _guest(options: argparse.Namespace) -> Domain:
    """The guest to read: the one named, or the one that the script's arguments name, or the only one enrolled."""
    if options.domain:
        return domains.find(options.domain)
    known = domains.load()
    named = [known[word] for word in dict.fromkeys(options.arguments) if word in known]
    if len(named) == 1:
        return named[0]
    if not named and len(known) == 1:
        return next(iter(known.values()))
    if not known:
        raise CompareError(f"no domain is enrolled yet; `vmishim enroll` adds one to {domains.path()}")
    which = "several guests" if named else "no guest that is enrolled"
    raise CompareError(f"the script's arguments name {which}; name the guest by --domain, before the script")


def _here(stack: ExitStack) -> Domain:
    from vmishim.guests import local

    return stack.enter_context(local.agent())


def _release(guest: Domain) -> str:
    target = reach(guest, strategy="scalar")
    try:
        return target.profile.release
    finally:
        target.close()


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
