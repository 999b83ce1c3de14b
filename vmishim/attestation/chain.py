"""The certificate chain from AMD's root to the key that signed a report: ARK, then ASK or ASVK, then VCEK or VLEK.

Sources: AMD's documents 57230, "VCEK Certificate and KDS Interface Specification", and 58369, the same for the VLEK;
for the table of certificates 56421, "SEV-ES Guest-Hypervisor Communication Block Standardization", section 4.1.8.1.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import Certificate
from cryptography.x509.oid import NameOID

from vmishim.attestation.errors import ChainError, EndorsementError, SignatureError
from vmishim.attestation.report import SIGNED, Report, Tcb

ROOTS = {
    "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "Milan",
    "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "Genoa",
    "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08": "Turin",
}
"""AMD's root keys (ARK) by `fingerprint`, with the processors that each vouches for. Compared with the certificates
that two independent projects ship, google/go-sev-guest and virtee/sev."""

FILE_MAX = 1 << 20
"""Bytes of a file of certificates."""

_AMD = "1.3.6.1.4.1.3704.1"
_TCB = {
    f"{_AMD}.3.1": "bootloader", f"{_AMD}.3.2": "tee", f"{_AMD}.3.3": "snp", f"{_AMD}.3.8": "microcode",
    f"{_AMD}.3.9": "fmc",
}  # fmt: skip
_HARDWARE_ID, _PROVIDER_ID = f"{_AMD}.4", f"{_AMD}.5"
_ENTRY = struct.Struct("<16sII")
_KINDS = {
    bytes.fromhex("63da758de6644564adc5f4b93be8accd"),  # VCEK
    bytes.fromhex("a8074bc2a25a483eaae639c045a0b8a1"),  # VLEK
    bytes.fromhex("4ab7b379bbac4fe4a02f05aef327c782"),  # ASK or ASVK
    bytes.fromhex("c0b406a4a803495297433fb6014cd0ae"),  # ARK
}
_NO_CERTIFICATE = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
_PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


@dataclass(frozen=True)
class Endorsement:
    """What AMD's certificates say of the key that signed a report.

    :ivar product: the processors that the root vouches for, such as Milan
    :ivar kind: ``VCEK`` or ``VLEK``
    :ivar expires: when the first of the three certificates expires
    """

    product: str
    kind: str
    expires: datetime


def fingerprint(certificate: Certificate) -> str:
    """SHA-256 of the certificate's public key (its SubjectPublicKeyInfo) in hex; unchanged when it is reissued."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def read(data: bytes) -> list[Certificate]:
    """Certificates of a file: one in DER, or any number in PEM. :raises ChainError: not a valid certificate"""
    pem = re.findall(b"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----", data)
    try:
        # The library warns about serial number 0, which AMD uses for all certificates of chips, among other things.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [x509.load_pem_x509_certificate(each) for each in pem] or [x509.load_der_x509_certificate(data)]
            for each in found:
                each.public_key(), each.subject, each.issuer, each.extensions  # parsed by the library only now
        return found
    except (ValueError, TypeError, UnsupportedAlgorithm, *_NO_CERTIFICATE) as error:
        raise ChainError(f"not a valid certificate: {error}") from None


def table(data: bytes) -> list[Certificate]:
    """Certificates of the table that the host gives a guest with its report; other entries are ignored.

    :raises ChainError: the table is cut short, or has an invalid certificate
    """
    found = []
    for start in range(0, len(data) - _ENTRY.size + 1, _ENTRY.size):
        kind, offset, length = _ENTRY.unpack_from(data, start)
        if not any(kind):
            break
        if offset + length > len(data):
            raise ChainError("the table of certificates that came with the report is cut short")
        if kind in _KINDS:
            found += read(data[offset : offset + length])
    return found


def signer(raw: bytes, certificates: Sequence[Certificate]) -> Certificate:
    """The certificate whose key signed the report ``raw``.

    :raises ChainError: no certificate is a VCEK's or VLEK's
    :raises SignatureError: none of their keys signed the report
    """
    keys = [(each, each.public_key()) for each in certificates]
    chips = [(each, key) for each, key in keys if isinstance(key, ec.EllipticCurvePublicKey)]
    if not chips:
        raise ChainError(
            "no VCEK or VLEK certificate came with the report, and none is in the files of `chain`; see docs/deploy.md"
        )
    # Section 10.2.3 of document 56860: r and s of 72 bytes each, the lowest byte first, then zeros.
    start = SIGNED.stop
    r, s = (int.from_bytes(raw[at : at + 72], "little") for at in (start, start + 72))
    if not any(raw[start + 144 :]):
        for each, key in chips:
            with contextlib.suppress(InvalidSignature):
                key.verify(encode_dss_signature(r, s), raw[SIGNED], ec.ECDSA(hashes.SHA384()))
                return each
    raise SignatureError(
        "the report's signature does not match its VCEK or VLEK certificate: is the report altered, or the "
        "certificate outdated?"
    )


def endorse(
    leaf: Certificate, report: Report, certificates: Sequence[Certificate], roots: Mapping[str, str], now: datetime
) -> Endorsement:
    """Follow the signer's certificate to a root, and compare its contents with the report.

    :param roots: trusted root keys by `fingerprint`, each with the processors it vouches for
    :raises ChainError: the certificates do not lead to a trusted root, or one is not valid at ``now``
    :raises EndorsementError: they are for another chip, TCB or kind of key
    """
    intermediate = _issuer(leaf, certificates)
    root = _issuer(intermediate, certificates)
    product = roots.get(fingerprint(root))
    if product is None:
        raise ChainError(f"the certificates lead to {_name(root)}, which is not a trusted root: {fingerprint(root)}")
    _issuer(root, [root])  # the key is trusted; the rest of the certificate, above all its expiry, must be signed too
    expires = min(map(_expires, (leaf, intermediate, root)))
    for each in (leaf, intermediate, root):
        if not _begins(each) <= now <= _expires(each):
            raise ChainError(f"the certificate of {_name(each)} is only valid from {_begins(each)} to {_expires(each)}")
    kind = _compare(leaf, report)
    return Endorsement(product, kind, expires)


def _issuer(certificate: Certificate, among: Sequence[Certificate]) -> Certificate:
    named = [each for each in among if each.subject == certificate.issuer]
    if not named:
        issuer = certificate.issuer.rfc4514_string()
        raise ChainError(
            f"the issuer of the certificate of {_name(certificate)} is missing: {issuer}; see docs/deploy.md"
        )
    for each in named:
        key = each.public_key()
        if isinstance(key, rsa.RSAPublicKey) and _is_authority(each):
            with contextlib.suppress(InvalidSignature):
                key.verify(certificate.signature, certificate.tbs_certificate_bytes, _PSS, hashes.SHA384())
                return each
    raise ChainError(f"the certificate of {_name(certificate)} is not signed by its issuer, {_name(named[0])}")


def _is_authority(certificate: Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _compare(leaf: Certificate, report: Report) -> str:
    said = {
        each.oid.dotted_string: each.value.value
        for each in leaf.extensions
        if isinstance(each.value, x509.UnrecognizedExtension)
    }
    kind = {(True, False): "VCEK", (False, True): "VLEK"}.get((_HARDWARE_ID in said, _PROVIDER_ID in said))
    if kind != report.signing_key:
        found = f"a {kind}" if kind else "neither a VCEK nor a VLEK"
        raise EndorsementError(f"the report names a {report.signing_key} as its signer; the certificate is for {found}")
    tcb = Tcb(**{"fmc": 0} | {name: _number(said[oid]) for oid, name in _TCB.items() if oid in said})
    if tcb != report.reported_tcb:
        raise EndorsementError(f"the signing key is for TCB {tcb}, but the report has TCB {report.reported_tcb}")
    chip = said.get(_HARDWARE_ID, b"")
    if kind == "VCEK" and chip.ljust(64, b"\0") != report.chip_id:
        what = report.chip_id.hex() if any(report.chip_id) else "masked by its host"
        raise EndorsementError(f"the signing key is for chip {chip.hex()}, but the report's chip is {what}")
    return kind


def _number(value: bytes) -> int:
    """A one-byte INTEGER in DER."""
    if value[:1] != b"\2" or len(value) not in (3, 4) or value[1] != len(value) - 2:
        raise EndorsementError(f"the certificate's TCB is not a one-byte number: {value.hex()}")
    return int.from_bytes(value[2:], "big")


def _name(certificate: Certificate) -> str:
    named = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(named[0].value) if named else certificate.subject.rfc4514_string()


# cryptography 42 deprecates dates without a time zone; the oldest supported version, 38, has nothing else.


def _begins(certificate: Certificate) -> datetime:
    if hasattr(certificate, "not_valid_before_utc"):
        return certificate.not_valid_before_utc
    return certificate.not_valid_before.replace(tzinfo=UTC)


def _expires(certificate: Certificate) -> datetime:
    if hasattr(certificate, "not_valid_after_utc"):
        return certificate.not_valid_after_utc
    return certificate.not_valid_after.replace(tzinfo=UTC)
