"""What the programs of this folder share: arguments, pausing the guest, printing, exit status."""

import argparse
import contextlib
import json
import sys

from layout import Layout
from libvmi import Libvmi, LibvmiError
from linux import Linux

TRIES = 3
"""How often a list is read: a guest that runs on may change it during a read."""


def parser(description):
    """Arguments of every program; more can be added."""
    made = argparse.ArgumentParser(
        description=description,
        epilog="exit status: 0 no findings, 1 findings, 2 the guest could not be read",
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
            listing, findings = sought(vmi, Linux(vmi, Layout(vmi, arguments.offsets)), look)
    except (LibvmiError, OSError, ValueError) as error:
        print(f"{arguments.domain}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"domain": arguments.domain, "listing": listing, "findings": findings}))
    else:
        for entry in listing:
            print(line(entry))
        for finding in findings:
            print(f"FINDING: {finding['finding']}")
    return 1 if findings else 0


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
    for _ in range(TRIES - 1):
        with contextlib.suppress(LibvmiError), paused(vmi):
            return look(guest)
    with paused(vmi):
        return look(guest)


@contextlib.contextmanager
def paused(vmi):
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()
