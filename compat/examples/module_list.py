#!/usr/bin/env python3
"""List the kernel modules of a Linux guest. Plain LibVMI: runs on the libvmi bindings and on vmishim alike."""

import argparse
import contextlib
import sys

from libvmi import VMIOS, Libvmi, LibvmiError

# struct module begins with its state (an int, padded to 8 bytes), its list links, and its name.
LIST = 8
NAME = 24
NAME_LENGTH = 56
"""MODULE_NAME_LEN on 64-bit machines."""


@contextlib.contextmanager
def paused(vmi):
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()


def modules(vmi):
    """Address and name of every module in the kernel's list, in its order."""
    head = vmi.translate_ksym2v("modules")
    entry = vmi.read_addr_va(head, 0)
    while entry != head:
        module = entry - LIST
        yield module, text(vmi.read_va(module + NAME, 0, NAME_LENGTH)[0])
        entry = vmi.read_addr_va(entry, 0)


def text(data):
    """A name in the guest's memory as text that is safe to print.

    Names are any bytes up to a NUL: a process chooses its own. read_str_va() raises UnicodeDecodeError for one that is
    not UTF-8, and characters that do not print could act on your terminal.
    """
    name = data.split(b"\0")[0].decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)


def main():
    parser = argparse.ArgumentParser(description="List the kernel modules of a Linux guest.")
    parser.add_argument("domain", help="name of the guest")
    domain = parser.parse_args().domain
    try:
        with Libvmi(domain) as vmi:
            if vmi.get_ostype() != VMIOS.LINUX:
                sys.exit(f"{domain} does not run Linux")
            with paused(vmi):
                for module, name in modules(vmi):
                    print(f"{name} (struct addr {module:#x})")
    except LibvmiError as error:
        # vmishim adds why to LibVMI's bare VMI_FAILURE.
        sys.exit(": ".join([domain, str(error), *getattr(error, "__notes__", [])]))


if __name__ == "__main__":
    main()
