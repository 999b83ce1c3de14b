"""Whether an agent runs where it should: in a guest of AMD SEV-SNP, launched from what it should be launched from.

The guest's own hardware signs a report with the agent's key in it (`vmishim.wire.attestation`). Here that report is
checked, without a network: certificates come with it, or from files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmishim.attestation.chain import ROOTS, Endorsement, endorse, read, signer, table
from vmishim.attestation.errors import BindingError, ChainError, FormatError, NoReportError
from vmishim.attestation.report import Report
from vmishim.attestation.requirements import Requirements
from vmishim.wire.attestation import CERTIFICATES_MAX, REPORT_SIZE, report_data
from vmishim.wire.keys import PublicKey
from vmishim.wire.messages import Attest, Evidence, encode, expect

__all__ = ["Attested", "Requirements", "ask", "attest", "verify"]

Exchange = Callable[[bytes], bytes]
"""From a request of ours to the agent's reply."""


@dataclass(frozen=True)
class Attested:
    """A genuine report, and what vouches for it."""

    report: Report
    endorsement: Endorsement

    @property
    def facts(self) -> dict[str, str]:
        """What is known now, for people and programs."""
        report, endorsement = self.report, self.endorsement
        return {
            "processor": endorsement.product,
            "signed by": f"{endorsement.kind}, whose certificates are valid until {endorsement.expires:%Y-%m-%d}",
            "measurement": report.measurement.hex(),
            "policy allows": ", ".join(report.allowed) or "nothing",
            "VMPL": str(report.vmpl),
            "TCB": str(report.reported_tcb),
            "TCB at launch": str(report.launch_tcb),
            "HOST_DATA": report.host_data.hex(),
            "chip": report.chip_id.hex() if any(report.chip_id) else "not told",
            "guest SVN": str(report.guest_svn),
            "report version": str(report.version),
        }


def ask(exchange: Exchange) -> bytes:
    """The agent's report and the certificates that came with it, unchecked.

    :raises NoReportError: it has none; the text has its word why
    :raises LinkError: it can't be asked, or is of a version that does not know of reports
    """
    evidence = expect(exchange(encode(Attest())), Evidence)
    if not evidence.bulk:
        raise NoReportError(f"there is no attestation on the agent's machine: {evidence.text}")
    return evidence.bulk


def verify(
    evidence: bytes,
    key: PublicKey | None = None,
    chain: Iterable[Path] = (),
    roots: Iterable[str] = (),
    now: datetime | None = None,
) -> Attested:
    """Check that a report is genuine and vouches for ``key``. What it says is not judged, see `Requirements.check`.

    :param evidence: the report, and after it the table of certificates that came with it, if any
    :param key: the agent's; None takes a report for any
    :param chain: files of more certificates
    :param roots: more root keys to trust, by `vmishim.attestation.chain.fingerprint`
    :param now: when the certificates must be valid, if not now
    :raises AttestationError: it is not; the class and the text say why
    """
    raw = evidence[:REPORT_SIZE]
    if len(raw) != REPORT_SIZE:
        raise FormatError(f"a report has {REPORT_SIZE} bytes, not {len(raw)}")
    if len(evidence) > REPORT_SIZE + CERTIFICATES_MAX:
        # Whoever sent it is not trusted yet; entries of a table that name the same bytes have these parsed many times.
        size = len(evidence) - REPORT_SIZE
        raise FormatError(f"certificates of {size} bytes; a guest gets {CERTIFICATES_MAX} at most")
    certificates = table(evidence[REPORT_SIZE:])
    for file in chain:
        try:
            certificates += read(file.read_bytes())
        except OSError as error:
            raise ChainError(f"the certificates in {file} can't be read: {error.strerror}") from None
    leaf = signer(raw, certificates)
    report = Report.parse(raw)
    trusted = dict.fromkeys(roots, "a root of your own") | ROOTS
    endorsement = endorse(leaf, report, certificates, trusted, now or datetime.now(UTC))
    if key is not None and report.report_data != report_data(key):
        raise BindingError(f"the report does not vouch for the agent's key, {key.fingerprint}")
    return Attested(report, endorsement)


def attest(requirements: Requirements, key: PublicKey, exchange: Exchange) -> Attested:
    """Have an agent show that it is where it should be, in a session that ``key`` has opened.

    :raises AttestationError: it is not; the class and the text say why
    :raises LinkError: it can't be asked
    """
    attested = verify(ask(exchange), key, requirements.chain, requirements.roots)
    requirements.check(attested.report)
    return attested
