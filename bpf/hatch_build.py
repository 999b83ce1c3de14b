"""Build hook: compile the eBPF programs and put the objects where the agent looks for them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs ``make -C bpf`` before a wheel is built. Without a compiler the wheel still has the IDS's side: only the
    agent needs the objects, and it reports when they are missing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; ``build_data["force_include"]`` maps files into the wheel."""
        bpf = Path(self.root, "bpf")
        made = subprocess.run(["make", "-C", str(bpf)], capture_output=True, text=True, check=False)
        if made.returncode:
            self.app.display_warning(
                f"the eBPF programs were not built, so no agent can run from this wheel: {made.stderr.strip()}"
            )
        # What injected programs include.
        build_data["force_include"][str(bpf / "inject.h")] = "vmishim/include/inject.h"
        for built in sorted(bpf.glob(".output/*.bpf.o")):
            build_data["force_include"][str(built)] = f"guest_agent/objects/{built.name}"
