"""Change each kind of pointer in a guest's memory, one at a time, and run the commands and the IDS examples on it.

None may end with a traceback, say nothing of what it could not read, or take much longer than on the whole guest. The
guest is a RAM file or dump that does not change, or a lab VM that is booted for this and stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lab.vm import LabVM
from trials.damage.damaged import DamagedGuest, Place, Trace
from trials.damage.programs import Program, Said, programs
from vmishim.errors import LibvmiError
from vmishim.guests.ramfile import RamFile
from vmishim.guests.target import Target
from vmishim.memory.reader import KERNEL_FLOOR

READS_RATIO_MAX = 20.0
"""Reads of a damaged guest, as a multiple of those of the whole one: three tries, of each list forward and backward,
and all again where a finding is to be confirmed."""


@dataclass(frozen=True)
class Run:
    """One program on one damaged guest.

    :ivar outcome: ``same``, ``marked``, ``found`` (other findings), ``refused`` (an error that the program expects),
        ``silent`` or ``crashed``
    :ivar reads: as a multiple of those of the whole guest
    :ivar seconds: in the same way
    """

    program: str
    place: Place
    kind: str
    outcome: str
    reads: float
    seconds: float
    detail: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.outcome == "crashed":
            return "a traceback"
        if self.outcome == "silent":
            return "another output, and no word about it"
        return f"{self.reads:.1f} times the reads" if self.reads > READS_RATIO_MAX else ""


def trial(
    name: str, program: Program, guest: Target, chance: Random, each: int, most: int | None = None
) -> Iterator[Run]:
    """Run a program on guests with one pointer changed.

    :param each: pointers of each place in the program
    :param most: runs, if not all
    """
    traced = DamagedGuest(guest, tracing=True)
    program(traced)
    trace = Trace.of(traced.traced)
    sound = DamagedGuest(guest)
    begun = time.perf_counter()
    expected = program(sound)
    seconds = time.perf_counter() - begun
    if expected.marks:
        raise LibvmiError(f"{name} cannot read the whole guest: {expected.marks[0]}")
    damages = list(trace.damages(chance, each))
    for place, address, kind, value in chance.sample(damages, min(most or len(damages), len(damages))):
        damaged = DamagedGuest(guest, address, value)
        begun = time.perf_counter()
        outcome, detail = _outcome(program, damaged, expected)
        # Nothing can tell a null pointer where there may be one, or a pointer to another object of the kind, from
        # what the kernel wrote; a list's links can be told.
        known = 0 < value < KERNEL_FLOOR or place.is_link or (kind == "0" and place not in trace.nullable)
        if outcome == "silent" and not known:
            outcome = "like a guest's own"
        ratio = (time.perf_counter() - begun) / seconds
        yield Run(name, place, kind, outcome, damaged.reads / sound.reads, ratio, detail)


def _outcome(program: Program, guest: DamagedGuest, expected: Said) -> tuple[str, str]:
    try:
        said = program(guest)
    except LibvmiError as error:
        return "refused", str(error)
    except Exception as error:
        return "crashed", repr(error)
    if said.marks:
        return "marked", said.marks[0]
    if said.findings != expected.findings:
        return "found", ""
    return ("same" if said == expected else "silent"), ""


@contextmanager
def lab_guest() -> Iterator[Target]:
    """A lab VM with a few processes, stopped."""
    with LabVM.boot() as vm:
        vm.spawn("sleep", "infinity", count=8)
        vm.pause()
        guest = RamFile("lab", vm.ram)
        try:
            yield guest
        finally:
            guest.close()


def main() -> int:
    """Run it. Returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m trials.damage", description=__doc__)
    parser.add_argument(
        "ramfile", nargs="?", type=Path, metavar="FILE", help="RAM of a stopped guest (default: boot one)"
    )
    parser.add_argument("--only", metavar="PROGRAM", action="append", help="run only this program; may be repeated")
    parser.add_argument("--each", type=int, default=3, metavar="N", help="pointers of each place (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    logging.disable()
    guest_of = nullcontext(RamFile("file", options.ramfile)) if options.ramfile else lab_guest()
    faults = 0
    with guest_of as guest:
        for name, program in programs().items():
            if options.only and name not in options.only:
                continue
            runs = list(trial(name, program, guest, Random(options.seed), options.each))
            outcomes = Counter(run.outcome for run in runs)
            places = len({run.place for run in runs})
            if not runs:
                print(f"{name}: follows no pointers")
                continue
            slowest = max(runs, key=lambda run: run.reads)
            told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
            print(
                f"{name}: {places} places, {len(runs)} runs: {told}; at most {slowest.reads:.1f} times the reads "
                f"and {max(run.seconds for run in runs):.1f} times the time",
                flush=True,
            )
            for run in runs:
                if run.fault:
                    faults += 1
                    print(f"  {run.fault}: {run.place} {run.kind}: {run.detail}", flush=True)
    print(f"damage: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
