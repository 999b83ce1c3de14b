"""The kernels of ``ci/kernels.toml``."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Final

from lab.steps import ImageError

KERNELS: Final = Path(__file__).resolve().parents[1] / "ci" / "kernels.toml"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry of ``ci/kernels.toml``."""

    name: str
    package: str


def kernels() -> dict[str, Kernel]:
    """Return the kernels of ``ci/kernels.toml`` by name, in its order."""
    entries = tomllib.loads(KERNELS.read_text())["kernel"]
    return {entry["name"]: Kernel(**entry) for entry in entries}


def default_kernel() -> str:
    """Return the name of the kernel to use when none is asked for."""
    name = tomllib.loads(KERNELS.read_text())["default"]
    assert isinstance(name, str)
    return name


def find_kernel(name: str | None = None) -> Kernel:
    """Return the kernel of that name; ``None`` is the default one.

    Raises ImageError if ``ci/kernels.toml`` has no such kernel.
    """
    known = kernels()
    wanted = default_kernel() if name is None else name
    if wanted not in known:
        raise ImageError(f"no kernel {wanted!r} in {KERNELS}; there are {', '.join(known)}")
    return known[wanted]
