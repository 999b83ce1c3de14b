#!/usr/bin/env python3
"""Check where a Linux guest's system calls and interrupts lead: entries of sys_call_table and idt_table.

It reports entries that lead out of the kernel's own code. To find entries that lead elsewhere within it, compare with a
baseline, which --record writes while you trust the guest. A baseline holds addresses relative to _stext, so it is good
for every boot of the same kernel.
"""

import json
import sys

import report
from libvmi import LibvmiError

LEAST_CALLS, MOST_CALLS = 335, 1024
"""System calls of x86-64: Linux 4.18 had 335."""
VECTORS, EXCEPTIONS = 256, 32
EARLY_HANDLERS = (9, 13)
"""Bytes of each entry of early_idt_handler_array, without and with CONFIG_X86_KERNEL_IBT (8f93402b92d4)."""


def tables(guest, baseline):
    """Entries of both tables, as addresses."""
    gates = guest.words(guest.needed("idt_table"), 2 * VECTORS)
    pairs = zip(gates[::2], gates[1::2], strict=True)
    # Intel SDM volume 3, figure 6-8: bits 0-15, 16-31 and 32-63 of the address are at bits 0, 48 and 64 of the gate.
    handlers = [low & 0xFFFF | low >> 32 & 0xFFFF0000 | high << 32 & 0xFFFFFFFF << 32 for low, high in pairs]
    count = len(baseline["sys_call_table"]) if baseline else count_calls(guest)
    return {"sys_call_table": guest.words(guest.needed("sys_call_table"), count), "idt_table": handlers}


def count_calls(guest):
    """The number of system calls, which the kernel does not store: the table ends where the next symbol begins."""
    start = guest.needed("sys_call_table")
    for count in range(LEAST_CALLS, MOST_CALLS):
        if guest.symbol_at(start + 8 * count):
            return count
    raise LibvmiError(f"sys_call_table has no end within {MOST_CALLS} entries")


def look(guest, baseline, record):
    kernel = guest.text(guest.needed("linux_banner"), 256).strip()
    if baseline and baseline["kernel"] != kernel:
        raise LibvmiError(f"the baseline was recorded from another kernel: {baseline['kernel']}")
    found = tables(guest, baseline)
    findings = []
    for name, entries in found.items():
        expected = baseline.get(name)
        for number, address in enumerate(entries):
            if address and not guest.is_text(address) and not is_early(guest, name, number, address):
                kind, where = "outside the kernel's code", f"{address:#x}"
            elif expected and relative(guest, address) != expected[number]:
                kind, where = "changed", f"{address:#x}, not {expected[number] + guest.needed('_stext'):#x}"
            else:
                continue
            findings.append(
                {
                    "finding": f"{name}[{number}] leads to {where}: {kind}",
                    "kind": kind,
                    "table": name,
                    "entry": number,
                    "address": address,
                }
            )
    record["kernel"] = kernel
    record.update({name: [relative(guest, address) for address in entries] for name, entries in found.items()})
    return [], findings


def is_early(guest, table, number, address):
    """Whether an unused exception still leads to the handler that all exceptions have while the kernel starts."""
    start = guest.symbol("early_idt_handler_array")
    if start is None or table != "idt_table" or number >= EXCEPTIONS:
        return False
    return address - start in [size * number for size in EARLY_HANDLERS]


def relative(guest, address):
    return address - guest.needed("_stext") if address else 0


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--baseline", metavar="FILE", help="compare with a file that --record wrote")
    parser.add_argument("--record", metavar="FILE", help="write the tables to this file if there are no findings")
    arguments = parser.parse_args()
    baseline, record = {}, {}
    if arguments.baseline:
        try:
            with open(arguments.baseline) as file:
                baseline = json.load(file)
        except (OSError, ValueError) as error:
            print(f"{arguments.baseline}: {error}", file=sys.stderr)
            return 2

    status = report.run(arguments, lambda guest: look(guest, baseline, record))
    if arguments.record and status == 0:
        with open(arguments.record, "w") as file:
            json.dump(record, file)
    return status


if __name__ == "__main__":
    sys.exit(main())
