"""What binds an agent's key to its machine: the agent requests a report, the IDS checks it."""

from __future__ import annotations

import hashlib

from vmishim.wire.keys import PublicKey

REPORT_SIZE = 0x4A0
"""Bytes of an ATTESTATION_REPORT of AMD SEV-SNP (document 56860, revision 1.55, section 7.3, table 22)."""
CERTIFICATES_MAX = 0x4000
"""Maximum bytes of certificates that come with a report: SEV_FW_BLOB_MAX_SIZE in the kernel, which takes whole pages
only."""
_LABEL = b"vmishim agent key v1\0"


def report_data(key: PublicKey) -> bytes:
    """REPORT_DATA of a report that vouches for ``key``: 64 bytes, SHA-512 of a label and the key.

    It holds no nonce: the handshake proves that the agent holds the private key now, so an attacker who replays the
    report without that key gets no session. The label keeps reports made for other purposes from passing as ours.
    """
    return hashlib.sha512(_LABEL + key.raw).digest()
