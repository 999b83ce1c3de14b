"""The fields of an AMD SEV-SNP attestation report.

Tables and sections are those of AMD's document 56860, "SEV Secure Nested Paging Firmware ABI Specification", revision
1.55; fields that later report versions added are marked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

from vmishim.attestation.errors import FormatError
from vmishim.wire.attestation import REPORT_SIZE

SIGNED = slice(0, 0x2A0)
"""The signed part of a report."""
VERSIONS = (2, 3, 4, 5)
"""Version 3 added the processor's CPUID, 5 the mitigation vectors; 4 is laid out as 3."""
PERMISSIONS = {"smt": 1 << 16, "migration": 1 << 18, "debug": 1 << 19, "cxl": 1 << 21}
"""Bits of GUEST_POLICY (section 4.3, table 9) that give permissions: SMT, association with a migration agent, debugging
(the host may decrypt the guest's memory), CXL devices and memory."""
PLATFORM = {
    "smt": 1 << 0, "tsme": 1 << 1, "ecc": 1 << 2, "rapl_disabled": 1 << 3, "ciphertext_hiding": 1 << 4,
    "alias_check_complete": 1 << 5, "iommu_write_safe": 1 << 6, "tio": 1 << 7,
}  # fmt: skip
"""Bits of PLATFORM_INFO (section 7.3, table 23): SMT_EN, TSME_EN, ECC_EN, RAPL_DIS, CIPHERTEXT_HIDING_DRAM_EN and
ALIAS_CHECK_COMPLETE; later revisions added those for writes through the IOMMU (AMD-SB-3016) and TIO_EN."""
SIGNING_KEYS = {0: "VCEK", 1: "VLEK"}
"""SIGNING_KEY of the report: the chip's own key, or one that AMD issues to a cloud provider."""

# Table 22 in struct's format letters; x marks reserved and unused bytes.
_FIELDS = {
    "version": "I", "guest_svn": "I", "policy": "Q", "family_id": "16s", "image_id": "16s", "vmpl": "I",
    "signature_algo": "I", "current_tcb": "8s", "platform_info": "Q", "flags": "I4x", "report_data": "64s",
    "measurement": "48s", "host_data": "32s", "id_key_digest": "48s", "author_key_digest": "48s", "report_id": "32s",
    "report_id_ma": "32s", "reported_tcb": "8s", "cpuid": "3s21x", "chip_id": "64s", "committed_tcb": "8s8x",
    "launch_tcb": "8s", "launch_mit_vector": "Q", "current_mit_vector": "Q",
}  # fmt: skip
_LAYOUT = struct.Struct("<" + "".join(_FIELDS.values()))
_FAMILY_TURIN = 0x1A


@dataclass(frozen=True)
class Tcb:
    """A TCB_VERSION (section 2.2, table 3): the security version number of each part of the platform."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int = 0
    """Turin and later only."""

    @classmethod
    def parse(cls, raw: bytes, family: int = 0) -> Tcb:
        """:param raw: 8 bytes :param family: the processor's family; since Turin the layout is another one"""
        if family >= _FAMILY_TURIN:
            return cls(fmc=raw[0], bootloader=raw[1], tee=raw[2], snp=raw[3], microcode=raw[7])
        return cls(bootloader=raw[0], tee=raw[1], snp=raw[6], microcode=raw[7])

    def __str__(self) -> str:
        return ", ".join(f"{part.name} {getattr(self, part.name)}" for part in fields(self) if part.name != "fmc") + (
            f", fmc {self.fmc}" if self.fmc else ""
        )


@dataclass(frozen=True)
class Report:
    """The fields of an ATTESTATION_REPORT, named as in table 22. Parsing does not check the signature."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: Tcb
    platform_info: int
    signing_key: str
    """``VCEK`` or ``VLEK``."""
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: Tcb
    """The TCB that the signing key was made for."""
    cpuid: tuple[int, int, int] | None
    """Family, model and stepping; None before version 3."""
    chip_id: bytes
    """Zeros if the host masks it, or if a VLEK signed."""
    committed_tcb: Tcb
    launch_tcb: Tcb
    launch_mit_vector: int
    """0 before version 5, like the next field."""
    current_mit_vector: int

    @classmethod
    def parse(cls, raw: bytes) -> Report:
        """Parse a report. :raises FormatError: wrong size, or an unsupported version, algorithm or signing key"""
        if len(raw) != REPORT_SIZE:
            raise FormatError(f"a report must have {REPORT_SIZE} bytes, not {len(raw)}")
        said = dict(zip(_FIELDS, _LAYOUT.unpack_from(raw), strict=True))
        version, algorithm, flags = said["version"], said.pop("signature_algo"), said.pop("flags")
        if version not in VERSIONS:
            raise FormatError(f"the report has version {version}; supported are {', '.join(map(str, VERSIONS))}")
        if algorithm != 1:
            raise FormatError(f"the report is signed with algorithm {algorithm}, not 1 (ECDSA P-384 with SHA-384)")
        signing_key = SIGNING_KEYS.get(flags >> 2 & 7)
        if signing_key is None:
            raise FormatError(f"the report is not signed by a VCEK or VLEK (SIGNING_KEY is {flags >> 2 & 7})")
        said["cpuid"] = tuple(said["cpuid"]) if version >= 3 else None
        for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
            said[name] = Tcb.parse(said[name], said["cpuid"][0] if said["cpuid"] else 0)
        return cls(**said, signing_key=signing_key)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The permissions that the guest's policy gives, named as in `PERMISSIONS`."""
        return tuple(name for name, bit in PERMISSIONS.items() if self.policy & bit)

    @property
    def platform(self) -> tuple[str, ...]:
        """How the platform is configured, named as in `PLATFORM`; bits without a name as ``bit 12``."""
        named = tuple(name for name, bit in PLATFORM.items() if self.platform_info & bit)
        return named + tuple(
            f"bit {at}" for at in range(64) if self.platform_info >> at & 1 and 1 << at not in PLATFORM.values()
        )
