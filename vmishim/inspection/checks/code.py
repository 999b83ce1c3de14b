"""Where system calls and interrupts lead."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.inspection.checks.view import View
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.structures import BrokenError

LEAST_CALLS, MOST_CALLS = 335, 1024
"""System calls of x86-64: Linux 4.18 had 335."""
X32_CALLS = 512
"""From this number on, a call of the x32 ABI may lead where another one leads (arch/x86/entry/syscalls)."""
VECTORS, EXCEPTIONS = 256, 32
EARLY_HANDLERS = (9, 13)
"""Bytes of each entry of early_idt_handler_array, without and with CONFIG_X86_KERNEL_IBT (8f93402b92d4)."""


def syscall_table(view: View) -> Iterator[Finding]:
    """System calls that lead out of the kernel's own code, or where another system call leads."""
    start = view.symbol("sys_call_table")
    entries = view.words(start, _calls(view, start))
    while entries and not entries[-1]:
        entries.pop()  # what aligns the next symbol
    missing = {view.symbol(name) for name in ("__x64_sys_ni_syscall", "sys_ni_syscall") if view.has_symbol(name)}
    first: dict[int, int] = {}
    for number, address in enumerate(entries):
        kind = ""
        if not view.is_text(address):
            kind, words = "syscall-hook", f"leads to {view.where(address)}, not to the kernel's own code"
        elif address not in missing and number < X32_CALLS:
            if address in first:
                kind, words = "syscall-twice", f"leads where sys_call_table[{first[address]}] leads, {address:#x}"
            first.setdefault(address, number)
        if kind:
            yield Finding(
                kind,
                Severity.HIGH,
                f"sys_call_table[{number}]",
                f"sys_call_table[{number}] {words}",
                "the table's entries with the kernel's text, and with each other",
                {"entry": start + 8 * number, "code": address},
                "the code at that address; hidden modules",
                "T1014",
            )


def _calls(view: View, start: int) -> int:
    """The number of system calls, which the kernel does not store: the table ends where the next symbol begins."""
    for count in range(LEAST_CALLS, MOST_CALLS):
        if view.symbol_at(start + 8 * count):
            return count
    raise BrokenError(f"sys_call_table has no end within {MOST_CALLS} entries")


def interrupts(view: View) -> Iterator[Finding]:
    """Gates of the interrupt descriptor table that lead out of the kernel's own code."""
    start = view.symbol("idt_table")
    gates = view.words(start, 2 * VECTORS)
    early = view.symbol("early_idt_handler_array") if view.has_symbol("early_idt_handler_array") else None
    for number, (low, high) in enumerate(zip(gates[::2], gates[1::2], strict=True)):
        # Intel SDM volume 3, figure 6-8: of the address bits 0-15, 16-31 and 32-63 are at bits 0, 48 and 64 of a gate.
        address = low & 0xFFFF | low >> 32 & 0xFFFF0000 | high << 32 & 0xFFFFFFFF << 32
        if not address or view.is_text(address):
            continue
        # Unused exceptions keep the handlers that all exceptions have while the kernel starts.
        if early is not None and number < EXCEPTIONS and address - early in [size * number for size in EARLY_HANDLERS]:
            continue
        yield Finding(
            "interrupt-hook",
            Severity.HIGH,
            f"idt_table[{number}]",
            f"idt_table[{number}] leads to {view.where(address)}, not to the kernel's own code",
            "the table's gates with the kernel's text",
            {"gate": start + 16 * number, "code": address},
            "the code at that address; hidden modules",
            "T1014",
        )
