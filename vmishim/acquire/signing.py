"""Signatures of manifests, by the IDS's key.

The keys of vmishim are X25519 keys, which agree on secrets and cannot sign. So each private key has an Ed25519 key
derived from it by HKDF-SHA256 (RFC 5869), with a label that nothing else uses: who has the one has the other, neither
tells anything of the other, and no new file must be kept. The derived public key is one line::

    vmishim-signer-v1 BASE64

A manifest's signature is one line too: ``vmishim-signature-v1 SIGNER SIGNATURE``, both in base64.

Source: RFC 8032 (Ed25519), RFC 5869 (HKDF).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vmishim.wire.keys import PrivateKey

_LABEL = b"vmishim manifest signing key v1"
_CONTEXT = b"vmishim manifest v1\0"
"""What is signed begins so, so that a signature fits nothing else."""
_SIGNER, _SIGNATURE = "vmishim-signer-v1", "vmishim-signature-v1"
KEY_SIZE, SIGNATURE_SIZE = 32, 64


class SignatureError(ValueError):
    """A signature, or a signer's line, is malformed or does not fit."""


@dataclass(frozen=True)
class Signer:
    """The public half of a signing key."""

    raw: bytes

    @property
    def text(self) -> str:
        """Its line."""
        return f"{_SIGNER} {base64.b64encode(self.raw).decode()}"

    @classmethod
    def from_text(cls, line: str) -> Signer:
        """Parse the line that `text` returns. :raises SignatureError: it is another line"""
        match line.split():
            case [kind, encoded] if kind == _SIGNER:
                return cls(_decoded(encoded, KEY_SIZE))
        raise SignatureError(f"it must start with {_SIGNER}, as `vmishim dump --signer-line` prints it")


def signer(private: PrivateKey) -> Signer:
    """The public half of the signing key of a private key."""
    return Signer(_derived(private).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def sign(private: PrivateKey, manifest: bytes) -> str:
    """A manifest's signature, one line."""
    signature = _derived(private).sign(_CONTEXT + manifest)
    parts = (signer(private).raw, signature)
    return " ".join((_SIGNATURE, *(base64.b64encode(part).decode() for part in parts)))


def signed_by(manifest: bytes, line: str) -> Signer:
    """Who signed a manifest. Whether to trust that key is not checked.

    :raises SignatureError: the signature does not fit the manifest, or is malformed
    """
    match line.split():
        case [kind, key, encoded] if kind == _SIGNATURE:
            raw, signature = _decoded(key, KEY_SIZE), _decoded(encoded, SIGNATURE_SIZE)
        case _:
            raise SignatureError(f"the signature is malformed: it must be one line that starts with {_SIGNATURE}")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, _CONTEXT + manifest)
    except (InvalidSignature, ValueError):
        raise SignatureError("the signature does not fit the manifest: one of them was changed") from None
    return Signer(raw)


def _derived(private: PrivateKey) -> Ed25519PrivateKey:
    seed = HKDF(SHA256(), KEY_SIZE, None, _LABEL).derive(private.raw)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _decoded(encoded: str, size: int) -> bytes:
    try:
        raw = base64.b64decode(encoded.encode(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != size:
        raise SignatureError(f"{size} bytes in base64 are expected: was the line cut short when copied?")
    return raw
