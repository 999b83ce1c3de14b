"""What the programs of this folder share: arguments, pausing the guest, printing, exit status."""

import argparse
import contextlib
import json
import sys

from layout import Layout
from libvmi import Libvmi, LibvmiError
from linux import Linux

LONGEST = 2000
"""Characters of one line that are printed; no honest one has as many."""
TRIES = 3
"""How often a list is read: a guest that runs on may change it during a read."""


def parser(description):
    """Arguments of every program; more can be added."""
    made = argparse.ArgumentParser(
        description=description,
        epilog="exit status: 0 no findings, 1 findings, 2 the guest could not be read, or only in part, 3 findings and "
        "only in part; what could not be read is said on standard error",
    )
    made.add_argument("domain", help="name of the guest")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--offsets", metavar="FILE", help="offsets of structure members, as JSON (see layout.py)")
    return made


def run(arguments, look, line=None):
    """Look at the guest and print what was found.

    :param arguments: as parsed
    :param look: look(Linux) returns two lists of dictionaries: what there is, and the findings, each with a sentence
        under "finding". The same fact gives the same finding.
    :param line: line(dictionary) returns the text of one entry of what there is
    :returns: exit status
    """
    try:
        with Libvmi(arguments.domain) as vmi:
            guest = Linux(vmi, Layout(vmi, arguments.offsets))
            listing, findings = sought(vmi, guest, look)
    except (LibvmiError, OSError, ValueError) as error:
        notes = getattr(error, "__notes__", ())
        print(printable(": ".join([arguments.domain, str(error), *notes])), file=sys.stderr)
        return 2
    if arguments.json:
        found = {"domain": arguments.domain, "listing": listing, "findings": findings, "damage": list(guest.damage)}
        print(json.dumps(found))
    else:
        for entry in listing:
            print(printable(line(entry)))
        for finding in findings:
            print(printable(f"FINDING: {finding['finding']}"))
    for sentence in guest.damage:
        print(printable(f"{arguments.domain}: not read: {sentence}"), file=sys.stderr)
    return bool(findings) + 2 * bool(guest.damage)


def printable(text):
    """``text`` on one line, with unprintable characters escaped as in a Python string.

    A process chooses its own name and those of its files. Printed as they are, they could act on the terminal, or make
    a line that looks like a finding.
    """
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def sought(vmi, guest, look):
    """What look(guest) returns, with only those findings that a second look confirms.

    A process that begins or ends while two lists are read is in only one of them; that is not a finding.
    """
    listing, findings = held(vmi, guest, look)
    if findings:
        listing, again = held(vmi, guest, look)
        findings = [finding for finding in again if finding in findings]
    return listing, findings


def held(vmi, guest, look):
    """What look(guest) returns; it looks again if something cannot be read, as the guest may have changed meanwhile."""
    for left in reversed(range(TRIES)):
        guest.damage.clear()
        try:
            with paused(vmi):
                found = look(guest)
            if not guest.damage or not left:
                return found
        except LibvmiError:
            if not left:
                raise
    raise AssertionError("no try was made")


@contextlib.contextmanager
def paused(vmi):
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()
