"""Build hook: compile the eBPF programs and ``libvmi.so.0``, and put them where they are looked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs ``make -C bpf`` and ``compat/capi/build.py`` before a wheel is built.

    If the first fails, the wheel has the IDS's side only. pip shows no warning of a build that succeeds, so the wheel
    itself has the reason: ``vmishim doctor``, ``vmishim bundle`` and ``--local`` show it. If the second fails, or
    ``VMISHIM_CAPI=no`` forbids it, the wheel is for every Python; ``vmishim doctor`` says how to build the library.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; ``build_data["force_include"]`` maps files into the wheel."""
        bpf = Path(self.root, "bpf")
        included: dict[str, str] = build_data["force_include"]
        # What injected programs include.
        included[str(bpf / "inject.h")] = "vmishim/include/inject.h"
        if version != "editable" and os.environ.get("VMISHIM_CAPI") != "no":
            self._library(build_data)
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

    def _library(self, build_data: dict[str, Any]) -> None:
        """``libvmi.so.0`` for the Python that builds, which is then the only one that the wheel suits."""
        source = Path(self.root, "compat", "capi", "build.py")
        if not source.is_file():
            return
        library = Path(self.directory, "libvmi.so.0")
        command = [sys.executable, "-I", str(source), str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(done.stderr.strip())
            return
        build_data["force_include"][str(library)] = "vmishim/compat/capi/libvmi.so.0"
        build_data.update(pure_python=False, infer_tag=True)


def _build(bpf: Path) -> str:
    """Compile the programs. Returns why that failed, in one line; empty if it did not."""
    if shutil.which("make") is None:
        return "make is not installed"
    made = subprocess.run(["make", "-C", str(bpf)], capture_output=True, text=True, check=False)
    if not made.returncode:
        return ""
    said = [line.strip() for line in made.stderr.splitlines() if line.strip() and not line.startswith("make")]
    return said[0] if said else f"make ended with status {made.returncode}"
