"""The lab's cache: its folder, the locks of those who build in it, the keys of what was built, and what goes again."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lab.steps import Progress

KEPT_DAYS: Final = 14
"""Days that an image nobody uses stays in the cache."""


def cache() -> Path:
    """Return the cache folder (``VMISHIM_CACHE``), created if need be."""
    given = os.environ.get("VMISHIM_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "vmishim" / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file; says so when it has to wait."""
    # Never through a link, and never cut short: another user may have made what has this name.
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(f"image: waiting for another build (lock {path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(recipe: object) -> str:
    """Return the key of what is built by a recipe, a value of JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def prune() -> None:
    """Remove from the cache what was not used for long, or left half built.

    The caller holds the lock of builds.
    """
    old = time.time() - KEPT_DAYS * 86400
    for path in cache().iterdir():
        unused = path.name.startswith(("image-", "base-", "accelerator-")) and path.stat().st_mtime < old
        if unused or path.name.startswith("building-"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
