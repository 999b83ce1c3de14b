"""``vmishim offsets``: generate structure offsets from kernel headers, for a kernel without BTF."""

from __future__ import annotations

import argparse
import sys

# Members that vmishim ps, vmishim lsmod and LibVMI's examples read, beyond those that every guest is asked for.
LISTED = (
    *("task_struct real_parent", "task_struct cred", "task_struct exit_state", "task_struct __state"),
    *("task_struct state", "cred uid", "mm_struct exe_file", "file f_path.dentry", "dentry d_name.name"),
    *("dentry d_parent", "module mem", "module_memory", "module_memory base", "module_memory size"),
    *("module core_layout.base", "module core_layout.size", "module init_layout.size"),
)


def offsets(options: argparse.Namespace) -> int:
    """Print the offsets as JSON, and on standard error the requested members that the headers do not declare; then 1.

    :raises CompileError: bcc or headers are missing
    """
    from vmishim.guests.agent import MEMBERS
    from vmishim.inject.bcc import member_offsets
    from vmishim.readahead.catalogue import KNOWN

    known = {*MEMBERS, *LISTED, *(member for shape in KNOWN for member in shape.members)}
    found = member_offsets(options.headers, {*known, *options.members})
    print(found.to_json())
    missing = [name for name in options.members if name not in found.members]
    for name in missing:
        print(f"vmishim: the headers of Linux {found.release} declare no {name!r}", file=sys.stderr)
    return 1 if missing else 0
