"""``vmishim attest``: what AMD SEV-SNP says of a guest and its agent's key, checked."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from vmishim.attestation import ask, verify
from vmishim.commands import CommandError
from vmishim.guests import domains
from vmishim.guests.agent import connect
from vmishim.output import dump, show
from vmishim.wire.keys import PublicKey


def attest(options: argparse.Namespace) -> int:
    """Show the facts of a genuine report, and hold them against what the domain's entry requires.

    :raises AttestationError: the report is not genuine, vouches for another key, is not as required, or there is none
    :raises CommandError: neither a domain nor a file is named
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
        raise CommandError("name a guest that has an agent, or a file: --report FILE")
    if options.save:
        options.save.write_bytes(evidence)
    required = domain.attestation if domain else None
    chain = [*options.chain, *(required.chain if required else ())]
    attested = verify(evidence, key, chain, required.roots if required else ())
    if options.json:
        dump(attested.facts)
    else:
        show(("FACT", "VALUE"), attested.facts.items())
    if required:
        required.check(attested.report)
    for missing in (None if key else "it may vouch for any key", None if required else "nothing is required of it"):
        if missing:
            print(f"vmishim: the report is genuine, but {missing}", file=sys.stderr)
    return 0
