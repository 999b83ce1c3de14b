"""``vmishim attest``: check the AMD SEV-SNP report of a guest and its agent's key."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from vmishim import files
from vmishim.attestation import ask, verify
from vmishim.attestation.floors import floor
from vmishim.attestation.requirements import outdated
from vmishim.commands import CommandError
from vmishim.guests import domains
from vmishim.guests.agent import connect
from vmishim.output import dump, show
from vmishim.wire.keys import PublicKey


def attest(options: argparse.Namespace) -> int:
    """Show the facts of a genuine report, and check them against the requirements in the domain's entry.

    :raises AttestationError: there is no report, it is not genuine, vouches for another key, or fails a requirement
    :raises CommandError: neither a domain nor a file is given
    """
    domain = domains.find(options.domain) if options.domain else None
    key = PublicKey.from_text(domain.agent_key) if domain and domain.agent else None
    if options.report:
        evidence = options.report.read_bytes()
    elif domain and domain.agent:
        # Without the entry's requirements: show what the guest says even if it does not meet them.
        target = connect(replace(domain, attestation=None), "scalar")
        try:
            evidence, key = ask(target.link.exchange), target.link.remote
        finally:
            target.close()
    else:
        raise CommandError("give the name of a guest with an agent, or a file: --report FILE")
    if options.save:
        files.write(options.save, evidence)
    required = domain.attestation if domain else None
    chain = [*options.chain, *(required.chain if required else ())]
    kernel_key = PublicKey.from_text(domain.kernel_key) if domain and domain.kernel_key else None
    attested = verify(evidence, key, chain, required.roots if required else (), kernel_key=kernel_key)
    if options.json:
        dump(attested.facts)
    else:
        show(("FACT", "VALUE"), attested.facts.items())
    if required:
        required.check(attested.report)
    for missing in (
        None if key else "no agent key was given to check it against",
        None if required else "no requirements are set for it",
        outdated(attested.report, floor(attested.report.cpuid)),
    ):
        if missing:
            print(f"vmishim: the report is genuine, but {missing}", file=sys.stderr)
    return 0
