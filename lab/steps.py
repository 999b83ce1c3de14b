"""The steps of a build: tools that are run, progress that is printed, and the error of a step that failed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Progress = Callable[[str], None]


class ImageError(Exception):
    """An image cannot be built; the text says what to do about it."""


class StepError(ImageError):
    """A tool failed; with what it wrote."""

    def __init__(self, tool: str, status: int, lines: list[str]) -> None:
        super().__init__(f"{tool} failed with status {status}:\n  " + "\n  ".join(lines[-20:]))
        self.lines = lines


def say(line: str) -> None:
    """Print one line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(what: str, progress: Progress) -> Iterator[None]:
    """Print how long a step took, when it is done."""
    begun = time.monotonic()
    yield
    progress(f"image: {what} ({time.monotonic() - begun:.1f} s)")


def command(*argv: str | Path, env: Mapping[str, str] | None = None) -> None:
    """Run a tool quietly; raise ImageError with its last words if it fails."""
    done = subprocess.run(
        [str(word) for word in argv],
        env=None if env is None else os.environ | dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise StepError(str(argv[0]), done.returncode, done.stdout.decode(errors="replace").splitlines())
