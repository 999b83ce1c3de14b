"""Fuzz one target, or all of them in turn, with atheris (libFuzzer for Python)."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import atheris

from vmishim import isolated

with atheris.instrument_imports(include=["vmishim", "guest_agent"]):
    from trials.fuzz.bombs import BOMBS
    from trials.fuzz.budget import INSTRUMENTED_S, MEMORY_MIB, within_budget
    from trials.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
SLOWEST_S, LONGEST = 60, 65536
"""Limits for one input, beside its budget: its time on a busy machine, and its size in bytes."""


def main() -> int:
    """Fuzz. Does not return for a single target: libFuzzer ends the process, with status 0 if it found nothing."""
    parser = argparse.ArgumentParser(prog="python -m trials.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"], help="what to fuzz")
    parser.add_argument("--time", type=int, default=60, metavar="S", help="seconds per target (%(default)s)")
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FOLDER",
        help="folder to load inputs from, and to keep those that reach new code in",
    )
    parser.add_argument("--runs", type=int, default=-1, metavar="N", help="stop after this many inputs")
    options = parser.parse_args()
    if options.target == "all":
        failed = [name for name in TARGETS if _alone(name, sys.argv[2:])]
        print(f"fuzz: {len(TARGETS)} targets, failed: {', '.join(failed) or 'none'}")
        return 1 if failed else 0
    logging.disable()
    for name, bomb in BOMBS.items():
        if bomb.target == options.target:
            print(f"fuzz: {name}", flush=True)
            within_budget(partial(bomb.parse, bomb.make()), INSTRUMENTED_S)
    target = TARGETS[options.target]
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate(target.seeds()):
            Path(seeds, str(number)).write_bytes(seed)
        limits = [f"-max_total_time={options.time}", f"-runs={options.runs}", f"-max_len={LONGEST}"]
        limits += [f"-timeout={SLOWEST_S}", f"-rss_limit_mb={8 * MEMORY_MIB}", "-print_final_stats=1"]
        folders = [str(options.corpus)] if options.corpus else []
        run = partial(_run, target)
        atheris.Setup([sys.argv[0], *limits, *folders, seeds], run)
        atheris.Fuzz()
    return 0


def _run(target: Target, data: bytes) -> None:
    within_budget(partial(target.run, data), INSTRUMENTED_S)


def _alone(name: str, arguments: list[str]) -> bool:
    """Fuzz a target in a process of its own; return whether that found a failure."""
    print(f"fuzz: {name}", flush=True)
    command = isolated.module("trials.fuzz", name, *arguments, folder=str(ROOT))
    return bool(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
