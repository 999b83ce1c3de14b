"""Errors of attestation: one class per reason, so that programs can tell them apart."""

from __future__ import annotations

from vmishim.errors import LinkError


class AttestationError(LinkError):
    """The peer has not proved that it is the expected guest. Nothing is read from it."""


class NoReportError(AttestationError):
    """There is no report: the machine is not an SEV-SNP guest, or its kernel provides none."""


class FormatError(AttestationError):
    """The data is not a supported attestation report."""


class ChainError(AttestationError):
    """The certificates do not lead from the report's signer to a trusted root."""


class SignatureError(AttestationError):
    """No certificate's key signed the report: it was altered, or the certificate is for another chip or TCB."""


class EndorsementError(AttestationError):
    """The signer's certificate is for another chip, firmware or kind of key than the report."""


class BindingError(AttestationError):
    """The report vouches for another agent's key, or another kernel key."""


class MeasurementError(AttestationError):
    """The guest was launched from another image (its measurement differs)."""


class PolicyError(AttestationError):
    """The guest's launch policy allows more than you permit."""


class TcbError(AttestationError):
    """The platform's firmware or microcode is too old."""


class PlatformError(AttestationError):
    """The platform is configured in a way that you do not accept (PLATFORM_INFO)."""


class VmplError(AttestationError):
    """The report was requested at another privilege level (VMPL)."""


class HostDataError(AttestationError):
    """The host launched the guest with other HOST_DATA."""
