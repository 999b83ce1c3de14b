"""What one input may cost a parser: memory, and CPU time. An input that costs more is a finding, as a crash is."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

MEMORY_MIB, CPU_S = 256, 4
"""Most resident memory that one input may add, and most CPU time of the process. Inputs are of 1 MiB at most, those
that describe more than they hold included."""
_HARD_MIB = 4 * MEMORY_MIB
"""Address space that an input may add: past this the kernel refuses, before the machine suffers."""


class OverBudgetError(BaseException):
    """An input costs too much. Not an ``Exception``, which what is fuzzed could mistake for an error of the input."""


class Spent(NamedTuple):
    """What an input cost."""

    mib: float
    seconds: float


INSTRUMENTED_S = 20
"""The same for code that a fuzzer has instrumented, which makes it several times slower."""


def within_budget(run: Callable[[], object], cpu_s: float = CPU_S) -> Spent:
    """Run it, in the main thread, and say what it cost.

    :param cpu_s: CPU time that it may take, seconds
    :raises OverBudgetError: more memory or time than an input may cost; too much time ends it at once
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used_before = signal.signal(signal.SIGPROF, _too_slow)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    resident, size = _status("VmRSS"), _status("VmSize")
    began = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + (_HARD_MIB << 20), hard))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        run()
    except MemoryError:
        raise OverBudgetError(f"more than {_HARD_MIB} MiB") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, used_before)
    spent = Spent((_status("VmHWM") - resident) / 2**20, time.process_time() - began)
    if spent.mib > MEMORY_MIB:
        raise OverBudgetError(f"{spent.mib:.0f} MiB of {MEMORY_MIB}")
    return spent


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise OverBudgetError("too much CPU time")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10
