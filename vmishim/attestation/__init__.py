"""Attestation: does an agent run in an AMD SEV-SNP guest that was launched from the expected image?

The guest's hardware signs a report that contains the agent's key (`vmishim.wire.attestation`). This package checks the
report without a network: certificates come with it, or from files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmishim import files
from vmishim.attestation.chain import FILE_MAX, ROOTS, Endorsement, endorse, read, signer, table
from vmishim.attestation.errors import BindingError, ChainError, FormatError, NoReportError
from vmishim.attestation.report import Report
from vmishim.attestation.requirements import Requirements
from vmishim.wire.attestation import CERTIFICATES_MAX, REPORT_SIZE, report_data
from vmishim.wire.keys import PublicKey
from vmishim.wire.messages import Attest, Evidence, encode, expect

__all__ = ["Attested", "Requirements", "ask", "attest", "verify"]

Exchange = Callable[[bytes], bytes]
"""Sends a request and returns the agent's reply."""


@dataclass(frozen=True)
class Attested:
    """A genuine report, and the certificates that vouch for its signer."""

    report: Report
    endorsement: Endorsement

    @property
    def facts(self) -> dict[str, str]:
        """The report's facts, for people and programs."""
        report, endorsement = self.report, self.endorsement
        return {
            "processor": endorsement.product,
            "signed by": f"{endorsement.kind}, whose certificates are valid until {endorsement.expires:%Y-%m-%d}",
            "measurement": report.measurement.hex(),
            "policy allows": ", ".join(report.allowed) or "nothing",
            "platform": ", ".join(report.platform) or "nothing",
            "VMPL": str(report.vmpl),
            "TCB": str(report.reported_tcb),
            "TCB at launch": str(report.launch_tcb),
            "HOST_DATA": report.host_data.hex(),
            "chip": report.chip_id.hex() if any(report.chip_id) else "not given",
            "guest SVN": str(report.guest_svn),
            "report version": str(report.version),
        }


def ask(exchange: Exchange) -> bytes:
    """The agent's report and the certificates that came with it, unchecked.

    :raises NoReportError: it has none; the text has the agent's reason
    :raises LinkError: it can't be reached, or its version does not support reports
    """
    evidence = expect(exchange(encode(Attest())), Evidence)
    if not evidence.bulk:
        raise NoReportError(f"the agent's machine gives no attestation report: {evidence.text}")
    return evidence.bulk


def verify(
    evidence: bytes,
    key: PublicKey | None = None,
    chain: Iterable[Path] = (),
    roots: Iterable[str] = (),
    now: datetime | None = None,
    kernel_key: PublicKey | None = None,
) -> Attested:
    """Check that a report is genuine and vouches for ``key``. For what it says, see `Requirements.check`.

    :param evidence: the report, and after it the table of certificates that came with it, if any
    :param key: the agent's key; None accepts a report for any key
    :param chain: files of more certificates
    :param roots: more root keys to trust, by `vmishim.attestation.chain.fingerprint`
    :param now: the time at which the certificates must be valid, if not now
    :param kernel_key: the key of a kernel that encrypts; None: the report must vouch for no such key
    :raises AttestationError: it is not genuine, or is for another key; the class and the text say why
    """
    raw = evidence[:REPORT_SIZE]
    if len(raw) != REPORT_SIZE:
        raise FormatError(f"a report must have {REPORT_SIZE} bytes, not {len(raw)}")
    if len(evidence) > REPORT_SIZE + CERTIFICATES_MAX:
        # The sender is not trusted yet: many table entries may name the same bytes, which are parsed for each.
        size = len(evidence) - REPORT_SIZE
        raise FormatError(f"{size} bytes of certificates came with the report; the limit is {CERTIFICATES_MAX}")
    certificates = table(evidence[REPORT_SIZE:])
    for file in chain:
        try:
            certificates += read(files.read(file, FILE_MAX))
        except OSError as error:
            raise ChainError(f"cannot read the certificates in {file}: {error.strerror}") from None
    leaf = signer(raw, certificates)
    report = Report.parse(raw)
    trusted = dict.fromkeys(roots, "a root of your own") | ROOTS
    endorsement = endorse(leaf, report, certificates, trusted, now or datetime.now(UTC))
    if key is not None and report.report_data != report_data(key, kernel_key):
        if kernel_key is not None:
            raise BindingError(
                f"the report does not vouch for the agent's key {key.fingerprint} together with the kernel key "
                f"{kernel_key.fingerprint}: one of them is another, or the agent was started without --kernel-key"
            )
        raise BindingError(
            f"the report vouches for another key than the agent's, {key.fingerprint}, or for a kernel key too: if the "
            "guest's kernel encrypts, set kernel_key in the domain's entry"
        )
    return Attested(report, endorsement)


def attest(
    requirements: Requirements, key: PublicKey, exchange: Exchange, kernel_key: PublicKey | None = None
) -> Attested:
    """Request an agent's report and check it against the requirements, in a session with the holder of ``key``.

    :param kernel_key: see `verify`

    :raises AttestationError: it does not meet them; the class and the text say why
    :raises LinkError: it can't be reached
    """
    attested = verify(ask(exchange), key, requirements.chain, requirements.roots, kernel_key=kernel_key)
    requirements.check(attested.report)
    return attested
