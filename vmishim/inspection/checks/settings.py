"""Programs that the kernel itself starts as root: at a crash, to load a module, at an event."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.inspection.checks.view import View
from vmishim.inspection.findings import Finding, Severity

SIZES = {"core_pattern": 128, "modprobe_path": 256, "poweroff_cmd": 256, "uevent_helper": 256}
"""Bytes that are read of each, as the kernel has them (``CORENAME_MAX_SIZE``, ``KMOD_PATH_LEN``, ...)."""
CRASH_PROGRAMS = (
    *("/usr/lib/systemd/systemd-coredump", "/lib/systemd/systemd-coredump"),
    *("/usr/share/apport/apport", "/usr/libexec/abrt-hook-ccpp"),
)
USUAL = {
    "modprobe_path": (
        *("", "/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe"),
        "/run/current-system/sw/bin/modprobe",  # NixOS
    ),
    "poweroff_cmd": ("/sbin/poweroff", "/usr/sbin/poweroff"),
    "uevent_helper": ("",),
}
WHEN = {
    "core_pattern": "when a program crashes",
    "modprobe_path": "to load a module",
    "poweroff_cmd": "to power off",
    "uevent_helper": "when a device changes",
}


def kernel_programs(view: View) -> Iterator[Finding]:
    """Programs that the kernel starts, where they are not those of a distribution."""
    for name, size in SIZES.items():
        if not view.has_symbol(name):
            continue
        at = view.symbol(name)
        with view.marking(name):
            value = view.text(at, size)
            if name == "core_pattern":
                # Without "|" it is the name of a file.
                words = value[1:].split()
                usual = not value.startswith("|") or bool(words and words[0] in CRASH_PROGRAMS)
            else:
                usual = value in USUAL[name]
            if not usual:
                yield Finding(
                    "kernel-program",
                    Severity.MEDIUM if name == "core_pattern" else Severity.HIGH,
                    f"{name}={value}",
                    f"{name} is {value!r}: the kernel starts it as root {WHEN[name]}",
                    "its value with those of the distributions",
                    {name: at},
                    "that program, and who wrote the setting",
                    "T1546",
                )
