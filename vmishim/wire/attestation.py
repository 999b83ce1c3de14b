"""What binds an agent's keys to its machine: the agent requests a report, the IDS checks it."""

from __future__ import annotations

import hashlib

from vmishim.wire.keys import PublicKey

REPORT_SIZE = 0x4A0
"""Bytes of an ATTESTATION_REPORT of AMD SEV-SNP (document 56860, revision 1.55, section 7.3, table 22)."""
CERTIFICATES_MAX = 0x4000
"""Maximum bytes of certificates that come with a report: SEV_FW_BLOB_MAX_SIZE in the kernel, which takes whole pages
only."""
_LABEL = b"vmishim agent and kernel key v2\0"


def report_data(key: PublicKey, kernel_key: PublicKey | None = None) -> bytes:
    """REPORT_DATA of a report that vouches for an agent's key, and for the key of a kernel that encrypts: 64 bytes,
    SHA-512 of a label, the agent's key, and a byte 1 with the kernel's key, or a byte 0 if the agent encrypts itself.

    It holds no nonce: the handshake proves that the agent holds the private key now, so an attacker who replays the
    report without that key gets no session. The label keeps reports made for other purposes from passing as ours.
    """
    return hashlib.sha512(_LABEL + key.raw + (b"\1" + kernel_key.raw if kernel_key else b"\0")).digest()
