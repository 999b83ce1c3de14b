"""Why a guest's report is refused: a class for each reason, so that a program can tell them apart."""

from __future__ import annotations

from vmishim.errors import LinkError


class AttestationError(LinkError):
    """What answers has not shown that it is the guest it should be. Nothing is read from it then."""


class NoReportError(AttestationError):
    """There is no report: the machine is no SEV-SNP guest, or its kernel hands none out."""


class FormatError(AttestationError):
    """What came is no attestation report that we know."""


class ChainError(AttestationError):
    """Certificates do not lead from the report's signer to a root that is trusted."""


class SignatureError(AttestationError):
    """No certificate's key has signed the report: it was altered, or the certificate is another chip's or TCB's."""


class EndorsementError(AttestationError):
    """The signer's certificate speaks of another chip, firmware or kind of key than the report."""


class BindingError(AttestationError):
    """The report vouches for another agent's key."""


class MeasurementError(AttestationError):
    """The guest was launched from something else."""


class PolicyError(AttestationError):
    """The guest was launched with a policy that allows more than it may."""


class TcbError(AttestationError):
    """The platform's firmware or microcode is too old."""


class VmplError(AttestationError):
    """The report was asked for at another privilege level."""


class HostDataError(AttestationError):
    """The host launched the guest with other HOST_DATA."""
