"""Build hook: compile the eBPF programs and put the objects where the agent looks for them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs ``make -C bpf`` before a wheel is built.

    If that fails, the wheel has the IDS's side only. pip shows no warning of a build that succeeds, so the wheel itself
    has the reason: ``vmishim doctor``, ``vmishim bundle`` and ``--local`` show it.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; ``build_data["force_include"]`` maps files into the wheel."""
        bpf = Path(self.root, "bpf")
        included: dict[str, str] = build_data["force_include"]
        # What injected programs include.
        included[str(bpf / "inject.h")] = "vmishim/include/inject.h"
        failure = _build(bpf)
        if failure:
            self.app.display_warning(f"the eBPF programs were not built, so no agent can be made or run: {failure}")
            reason = Path(self.directory, "not-built.txt")
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{failure}\n")
            included[str(reason)] = "guest_agent/objects/not-built.txt"
            return
        # Not those of an earlier build, if this one failed: they may be of another version.
        for built in sorted(bpf.glob(".output/*.bpf.o")):
            included[str(built)] = f"guest_agent/objects/{built.name}"


def _build(bpf: Path) -> str:
    """Compile the programs. Returns why that failed, in one line; empty if it did not."""
    if shutil.which("make") is None:
        return "make is not installed"
    made = subprocess.run(["make", "-C", str(bpf)], capture_output=True, text=True, check=False)
    if not made.returncode:
        return ""
    said = [line.strip() for line in made.stderr.splitlines() if line.strip() and not line.startswith("make")]
    return said[0] if said else f"make ended with status {made.returncode}"
