#!/usr/bin/env python3
"""List the processes of a Linux guest. Plain LibVMI: runs on the libvmi bindings and on vmishim alike."""

import argparse
import contextlib
import sys

from libvmi import VMIOS, Libvmi, LibvmiError

COMM = 16
"""Bytes of task_struct.comm (TASK_COMM_LEN)."""


@contextlib.contextmanager
def paused(vmi):
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()


def processes(vmi):
    """Address, pid and name of every task in the kernel's list, in its order."""
    tasks = vmi.get_offset("linux_tasks")
    pid = vmi.get_offset("linux_pid")
    name = vmi.get_offset("linux_name")
    head = vmi.translate_ksym2v("init_task") + tasks
    entry = head
    while True:
        task = entry - tasks
        yield task, vmi.read_32_va(task + pid, 0), text(vmi.read_va(task + name, 0, COMM)[0])
        entry = vmi.read_addr_va(entry, 0)
        if entry == head:
            return


def text(data):
    """A name in the guest's memory as text that is safe to print.

    Names are any bytes up to a NUL: a process chooses its own. read_str_va() raises UnicodeDecodeError for one that is
    not UTF-8, and characters that do not print could act on your terminal.
    """
    name = data.split(b"\0")[0].decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)


def main():
    parser = argparse.ArgumentParser(description="List the processes of a Linux guest.")
    parser.add_argument("domain", help="name of the guest")
    domain = parser.parse_args().domain
    try:
        with Libvmi(domain) as vmi:
            if vmi.get_ostype() != VMIOS.LINUX:
                sys.exit(f"{domain} does not run Linux")
            with paused(vmi):
                for task, pid, comm in processes(vmi):
                    print(f"[{pid:>5}] {comm} (struct addr {task:#x})")
    except LibvmiError as error:
        # vmishim adds why to LibVMI's bare VMI_FAILURE.
        sys.exit(": ".join([domain, str(error), *getattr(error, "__notes__", [])]))


if __name__ == "__main__":
    main()
