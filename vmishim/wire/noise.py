"""The Noise protocol framework, revision 34, patterns IK and X, checked against published vectors.

The protocol uses ``Noise_IK_25519_AESGCM_SHA256``; ChaChaPoly is here so that both published sets can be checked. IK is
used because the host already knows the agent's key: it gives mutual authentication and forward secrecy in one round
trip, and the initiator's key never crosses the wire in the clear. X is its first message alone, for a recipient who is
not online (`vmishim.wire.sealed`). Section numbers are those of https://noiseprotocol.org/noise.html.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
from typing import Literal, NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from vmishim.errors import LinkError
from vmishim.wire.keys import KEY_SIZE, PrivateKey, PublicKey

TAG_SIZE = 16
"""Bytes that encryption adds (section 4.2)."""
MAX_HANDSHAKE = 65535
"""Largest handshake message in bytes (section 3)."""
_MAX_NONCE = 2**64 - 1  # reserved (section 5.1)


class Aead(Protocol):
    """What pyca's AESGCM and ChaCha20Poly1305 have in common."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None) -> bytes: ...


class Cipher(NamedTuple):
    """A cipher of section 12: its name in protocol names, its algorithm, and how a counter becomes the 96-bit nonce."""

    name: str
    aead: type[AESGCM | ChaCha20Poly1305]
    nonce: struct.Struct


AES_GCM = Cipher("AESGCM", AESGCM, struct.Struct(">4xQ"))
CHACHA_POLY = Cipher("ChaChaPoly", ChaCha20Poly1305, struct.Struct("<4xQ"))


def _takes_views() -> bool:
    aead = AESGCM(bytes(32))
    try:
        aead.decrypt(bytes(12), memoryview(aead.encrypt(bytes(12), b"", None)), None)
    except TypeError:
        return False
    return True


TAKES_VIEWS = _takes_views()
"""Whether part of a frame can be decrypted without copying it; cryptography 38 accepts ``bytes`` only."""


class CipherState:
    """A key and the number of the next message (section 5.1). Without a key, text passes unchanged."""

    def __init__(self, cipher: Cipher, key: bytes | None = None) -> None:
        self.key = key
        self.aead: Aead | None = None if key is None else cipher.aead(key)
        self._nonce = cipher.nonce
        self._count = 0

    def encrypt_with_ad(self, ad: bytes, plaintext: bytes) -> bytes:
        """Encrypt ``plaintext`` and authenticate it with ``ad``. :raises LinkError: every nonce has been used."""
        if self.aead is None:
            return plaintext
        sealed = self.aead.encrypt(self._next_nonce(), plaintext, ad)
        self._count += 1
        return sealed

    def decrypt_with_ad(self, ad: bytes, ciphertext: bytes) -> bytes:
        """Decrypt ``ciphertext``. :raises LinkError: it is not authentic; the state is then unchanged."""
        if self.aead is None:
            return ciphertext
        try:
            plaintext = self.aead.decrypt(self._next_nonce(), ciphertext, ad)
        except (InvalidTag, ValueError):  # ValueError: cryptography 38, input shorter than a tag
            raise LinkError("the handshake is not authentic: altered in transit, or made with another key") from None
        self._count += 1
        return plaintext

    def _next_nonce(self) -> bytes:
        if self._count >= _MAX_NONCE:
            raise LinkError("this key has reached its message limit: a new handshake is needed")
        return self._nonce.pack(self._count)


class SymmetricState:
    """Chaining key and transcript hash of a handshake (section 5.2), with SHA256."""

    def __init__(self, protocol_name: bytes, cipher: Cipher) -> None:
        name = protocol_name
        self.h = name.ljust(32, b"\0") if len(name) <= 32 else hashlib.sha256(name).digest()
        self._ck = self.h
        self._cipher = cipher
        self._state = CipherState(cipher)

    def mix_key(self, material: bytes) -> None:
        """Mix in a shared secret: all encryption from now on depends on it."""
        self._ck, key = _hkdf(self._ck, material)
        self._state = CipherState(self._cipher, key)

    def mix_hash(self, data: bytes) -> None:
        """Mix in public data: both ends must have seen the same."""
        self.h = hashlib.sha256(self.h + data).digest()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """Encrypt, bound to the transcript so far, and add the result to the transcript."""
        ciphertext = self._state.encrypt_with_ad(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        """The counterpart of ``encrypt_and_hash``. :raises LinkError: not authentic."""
        plaintext = self._state.decrypt_with_ad(self.h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """The two keys of the finished handshake: initiator to responder, and back."""
        one, two = _hkdf(self._ck, b"")
        return CipherState(self._cipher, one), CipherState(self._cipher, two)


class HandshakeState:
    """One end of one handshake (sections 5.3, 7.4 and 7.5)::

        IK:  <- s  ...  -> e, es, s, ss  <- e, ee, se
        X:   <- s  ...  -> e, es, s, ss

    :param prologue: data both ends must agree on, not sent (section 6)
    :param static: this end's key
    :param remote: the responder's key, for the initiator; None for the responder, who learns the initiator's
    :param pattern: ``IK``, or ``X``, in which the responder writes nothing
    :param ephemeral: a fixed ephemeral key instead of a fresh one; only for checking published vectors

    After a ``LinkError`` from ``write`` or ``read`` the handshake has failed: start another.
    """

    def __init__(
        self,
        prologue: bytes,
        static: PrivateKey,
        remote: PublicKey | None = None,
        *,
        pattern: Literal["IK", "X"] = "IK",
        cipher: Cipher = AES_GCM,
        ephemeral: PrivateKey | None = None,
    ) -> None:
        self.remote = remote
        self._initiator = remote is not None
        self._static = static
        self._ephemeral = ephemeral
        self._remote_ephemeral: PublicKey | None = None
        self._symmetric = SymmetricState(f"Noise_{pattern}_25519_{cipher.name}_SHA256".encode(), cipher)
        self._symmetric.mix_hash(prologue)
        self._symmetric.mix_hash((remote or static.public).raw)  # the pre-message "<- s"

    def write(self, payload: bytes = b"") -> bytes:
        """This end's handshake message, with ``payload`` inside.

        The initiator's payload can be replayed, and an attacker who later gets the responder's key can read it; neither
        is true of the responder's (section 7.7).
        """
        self._ephemeral = self._ephemeral or self._hedged()
        message = self._ephemeral.public.raw
        self._symmetric.mix_hash(message)
        if self._initiator:
            self._mix_dh("es")
            message += self._symmetric.encrypt_and_hash(self._static.public.raw)
            self._mix_dh("ss")
        else:
            self._mix_dh("ee")
            self._mix_dh("se")
        return message + self._symmetric.encrypt_and_hash(payload)

    def read(self, message: bytes) -> bytes:
        """The payload of the other end's handshake message.

        :raises LinkError: cut short, too long, not authentic, or with a key of low order
        """
        shortest = KEY_SIZE + TAG_SIZE + (0 if self._initiator else KEY_SIZE + TAG_SIZE)
        if not shortest <= len(message) <= MAX_HANDSHAKE:
            raise LinkError(f"a handshake message has {shortest} to {MAX_HANDSHAKE} bytes, not {len(message)}")
        self._remote_ephemeral, rest = PublicKey(message[:KEY_SIZE]), message[KEY_SIZE:]
        self._symmetric.mix_hash(self._remote_ephemeral.raw)
        if self._initiator:
            self._mix_dh("ee")
            self._mix_dh("se")
        else:
            self._mix_dh("es")
            sealed, rest = rest[: KEY_SIZE + TAG_SIZE], rest[KEY_SIZE + TAG_SIZE :]
            self.remote = PublicKey(self._symmetric.decrypt_and_hash(sealed))
            self._mix_dh("ss")
        return self._symmetric.decrypt_and_hash(rest)

    def split(self) -> tuple[CipherState, CipherState]:
        """The transport keys, after both messages: first the one to encrypt with, then the one to decrypt with."""
        to_responder, to_initiator = self._symmetric.split()
        return (to_responder, to_initiator) if self._initiator else (to_initiator, to_responder)

    @property
    def hash(self) -> bytes:
        """The transcript's hash (section 11.2): after the last message it identifies this handshake."""
        return self._symmetric.h

    def _hedged(self) -> PrivateKey:
        """A fresh ephemeral key, derived from random bytes, the transcript, the time and the static key.

        A virtual machine that was restored from a snapshot can draw the same random bytes again. The key is different
        even then, unless the time and the whole transcript are the same too.
        """
        drawn = os.urandom(32) + time.time_ns().to_bytes(8, "big") + self._symmetric.h
        return PrivateKey(hmac.digest(self._static.raw, drawn, "sha256"))

    def _mix_dh(self, token: str) -> None:
        """Mix in DH between the initiator's key (first letter) and the responder's (second), each ``e`` or ``s``."""
        mine, theirs = (0, 1) if self._initiator else (1, 0)
        private = self._ephemeral if token[mine] == "e" else self._static
        assert private is not None, "this end has written its ephemeral key"
        public = self._remote_ephemeral if token[theirs] == "e" else self.remote
        assert public is not None, "the pattern sends each key before it is used"
        self._symmetric.mix_key(private.exchange(public))


def _hkdf(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    """Two outputs of HKDF (section 4.3)."""
    temp = hmac.digest(chaining_key, material, "sha256")
    one = hmac.digest(temp, b"\x01", "sha256")
    return one, hmac.digest(temp, one + b"\x02", "sha256")
