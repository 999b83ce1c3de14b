"""The compiled eBPF programs that an installation carries: the agent loads them, ``vmishim bundle`` packs them."""

from __future__ import annotations

from importlib import resources

from vmishim.errors import LibvmiError

OBJECTS = ("memory", "locate", "sealed")
"""Each is ``bpf/NAME.bpf.c``, compiled."""
REMEDY = (
    "install make, libbpf-dev and clang 16 or newer (Debian 12: clang-16 llvm-16; later ones and Ubuntu 24.04: clang "
    "llvm), then build again: make -C bpf in a checkout, pip install --force-reinstall otherwise"
)
"""What to do if they were not compiled."""


def object_bytes(name: str) -> bytes:
    """One of `OBJECTS`. :raises LibvmiError: this installation was built without it; the text says why, if known"""
    folder = resources.files("guest_agent").joinpath("objects")
    try:
        return folder.joinpath(f"{name}.bpf.o").read_bytes()
    except OSError:
        pass
    try:
        why = f" ({folder.joinpath('not-built.txt').read_text().strip()})"  # of bpf/hatch_build.py
    except OSError:
        why = ""
    raise LibvmiError(f"the eBPF object {name}.bpf.o is not in this installation{why}; {REMEDY}")
