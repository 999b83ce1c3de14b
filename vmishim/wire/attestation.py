"""What ties an agent's key to the machine it runs on. The agent asks for a report, the IDS reads it."""

from __future__ import annotations

import hashlib

from vmishim.wire.keys import PublicKey

REPORT_SIZE = 0x4A0
"""Bytes of an ATTESTATION_REPORT of AMD SEV-SNP (document 56860, revision 1.55, section 7.3, table 22)."""
CERTIFICATES_MAX = 0x4000
"""Bytes of certificates that come with a report at most: SEV_FW_BLOB_MAX_SIZE in the kernel, which takes whole pages
only."""
_LABEL = b"vmishim agent key v1\0"


def report_data(key: PublicKey) -> bytes:
    """REPORT_DATA of a report that vouches for ``key``: 64 bytes, SHA-512 of a label and the key.

    There is no nonce, since the handshake proves that the agent holds the private key at this moment: whoever replays
    the report without it gets no session. The label keeps a report made for something else from being taken for ours.
    """
    return hashlib.sha512(_LABEL + key.raw).digest()
