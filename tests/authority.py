"""An authority as AMD's, made for a test: it endorses chips, whose reports are then as good as any.

Offsets are written down here once more, from table 22 of AMD's document 56860: the tests do not believe what they test.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate, Name, NameAttribute, ObjectIdentifier, UnrecognizedExtension
from cryptography.x509.oid import NameOID

from vmishim.attestation.chain import fingerprint

SIZE, SIGNED = 0x4A0, 0x2A0
OFFSETS = {
    "version": (0x000, 4), "guest_svn": (0x004, 4), "policy": (0x008, 8), "family_id": (0x010, 16),
    "image_id": (0x020, 16), "vmpl": (0x030, 4), "signature_algo": (0x034, 4), "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8), "flags": (0x048, 4), "report_data": (0x050, 64), "measurement": (0x090, 48),
    "host_data": (0x0C0, 32), "id_key_digest": (0x0E0, 48), "author_key_digest": (0x110, 48), "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32), "reported_tcb": (0x180, 8), "cpuid": (0x188, 3), "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8), "launch_tcb": (0x1F0, 8), "launch_mit_vector": (0x1F8, 8),
    "current_mit_vector": (0x200, 8),
}  # fmt: skip
AMD = "1.3.6.1.4.1.3704.1."
GUIDS = {
    "VCEK": "63da758d-e664-4564-adc5-f4b93be8accd",
    "VLEK": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ASK": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ARK": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
}
MILAN_TCB = {"3.1": 3, "3.2": 0, "3.3": 8, "3.8": 115}
TURIN_TCB = {"3.9": 1, "3.1": 2, "3.2": 3, "3.3": 4, "3.8": 72}
CHIP = bytes(range(64))

RsaKey = rsa.RSAPrivateKey
EcKey = ec.EllipticCurvePrivateKey


def fill(raw: bytes, **fields: int | bytes) -> bytes:
    """The report with some fields set."""
    changed = bytearray(raw)
    for name, value in fields.items():
        start, size = OFFSETS[name]
        data = value.to_bytes(size, "little") if isinstance(value, int) else value.ljust(size, b"\0")
        assert len(data) == size, name
        changed[start : start + size] = data
    return bytes(changed)


def sign(raw: bytes, key: EcKey) -> bytes:
    """The report signed, as the security processor does it."""
    r, s = decode_dss_signature(key.sign(raw[:SIGNED], ec.ECDSA(hashes.SHA384())))
    return (raw[:SIGNED] + r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(SIZE, b"\0")


def table(**certificates: Certificate | bytes) -> bytes:
    """The table of certificates that a host hands to its guest (document 56421, section 4.1.8.1)."""
    blobs = {
        bytes.fromhex(GUIDS.get(kind, kind).replace("-", "")): value
        if isinstance(value, bytes)
        else value.public_bytes(Encoding.DER)
        for kind, value in certificates.items()
    }
    head, body = b"", b""
    for guid, blob in blobs.items():
        head += struct.pack("<16sII", guid, 24 * (len(blobs) + 1) + len(body), len(blob))
        body += blob
    return head + bytes(24) + body


def issue(
    name: str,
    public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    issuer: str,
    key: RsaKey,
    *,
    authority: bool = True,
    extensions: dict[str, bytes] | None = None,
    until: int = 2045,
) -> Certificate:
    """A certificate, signed as AMD signs: RSASSA-PSS with SHA-384."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(Name([NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(Name([NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(until, 1, 1, tzinfo=UTC))
    )
    if authority:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(UnrecognizedExtension(ObjectIdentifier(AMD + oid), value), critical=False)
    return builder.sign(key, hashes.SHA384(), rsa_padding=padding.PSS(padding.MGF1(hashes.SHA384()), 48))


class Authority:
    """ARK and ASK, and what they sign.

    :ivar root: the ARK's fingerprint
    """

    def __init__(self) -> None:
        self.ark_key, self.ask_key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
        self.ark = issue("ARK-Test", self.ark_key.public_key(), "ARK-Test", self.ark_key)
        self.ask = issue("SEV-Test", self.ask_key.public_key(), "ARK-Test", self.ark_key)
        self.root = fingerprint(self.ark)

    def endorse(
        self, tcb: dict[str, int] = MILAN_TCB, chip: bytes | None = CHIP, provider: str = "", **more: int
    ) -> tuple[EcKey, Certificate]:
        """A chip's key and its certificate: a VCEK's, or with a ``provider`` a VLEK's."""
        key = ec.generate_private_key(ec.SECP384R1())
        said = {oid: _integer(value) for oid, value in tcb.items()}
        if chip is not None:
            said["4"] = chip
        if provider:
            said["5"] = b"\x16" + bytes([len(provider)]) + provider.encode()
        made = issue("SEV-VCEK", key.public_key(), "SEV-Test", self.ask_key, authority=False, extensions=said, **more)
        return key, made


def _integer(value: int) -> bytes:
    data = value.to_bytes(1 + (value > 127), "big")
    return b"\2" + bytes([len(data)]) + data


@cache
def authority() -> Authority:
    """One for all tests: its keys take a while."""
    return Authority()


@cache
def chip() -> tuple[EcKey, Certificate]:
    """A chip that ``authority`` endorses."""
    return authority().endorse()


REPORT = fill(
    bytes(SIZE),
    version=3,
    policy=0x2_001F,  # bit 17 is always set
    signature_algo=1,
    report_data=bytes(range(100, 164)),
    measurement=b"\x4d" * 48,
    host_data=b"\x48" * 32,
    report_id_ma=b"\xff" * 32,
    current_tcb=bytes([3, 0, 0, 0, 0, 0, 8, 115]),
    reported_tcb=bytes([3, 0, 0, 0, 0, 0, 8, 115]),
    committed_tcb=bytes([3, 0, 0, 0, 0, 0, 8, 115]),
    launch_tcb=bytes([3, 0, 0, 0, 0, 0, 8, 115]),
    platform_info=0x25,  # SMT_EN, ECC_EN, ALIAS_CHECK_COMPLETE
    cpuid=bytes([0x19, 1, 1]),
    chip_id=CHIP,
)
"""What that chip says about a guest; not signed yet."""


def evidence(**fields: int | bytes) -> bytes:
    """That, with some fields set, signed, and with all certificates that it takes."""
    key, certificate = chip()
    return sign(fill(REPORT, **fields), key) + table(VCEK=certificate, ASK=authority().ask, ARK=authority().ark)
