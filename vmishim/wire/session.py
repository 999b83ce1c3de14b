"""Frames and sessions, without I/O: messages in, frames out, and back.

A frame is a header in the clear and a body::

    version u8 | kind u8 | session 8 bytes | counter u64 big-endian | body

    HELLO    host to agent   the initiator's handshake message        session 0, counter 0
    WELCOME  agent to host   the responder's                          session: the id of the new one
    REQUEST  host to agent   nonce, AEAD of a message                  counter: the request's number, from 0
    REPLY    agent to host   nonce, AEAD of a message                  counter: that of the request it answers
    REFUSAL  agent to host   one byte, a ``Reason``; not authenticated, since there may be no key to seal it with

The first two bytes and the refusal keep their places in every version, so that two versions recognize each other.
The version string is the handshake's prologue, so an attacker on the network cannot force an older version.

Only reply ``n`` answers request ``n``. No number is ever used for two messages: a session that has missed a frame is
closed and replaced by a fresh handshake, which costs one round trip.

A host that saves a guest and restores it later makes its agent count the same numbers again, and its random generator
draw the same bytes. AES-GCM breaks when one key and nonce seal two messages, so a nonce may rest neither on numbers nor
on chance alone. Each frame carries a nonce that is a keyed hash of fresh random bytes, the header *and the message*:
two different messages have two nonces, and the same message sealed again only shows that it is the same. The hash is
BLAKE2b with a key (RFC 7693), a pseudorandom function. In place of a long message it takes a universal hash of it under
another key, as AES-GCM-SIV does (RFC 8452). `HandshakeState` makes ephemeral keys in the same spirit.
"""

from __future__ import annotations

import hmac
import os
import struct
import time
from collections.abc import Callable, Container
from enum import IntEnum
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vmishim.errors import LinkError
from vmishim.wire.keys import PrivateKey, PublicKey
from vmishim.wire.noise import TAG_SIZE, TAKES_VIEWS, CipherState, HandshakeState

VERSION = 2
"""First byte of every frame; increased when a frame or a message changes its meaning."""
PROLOGUE = b"vmishim wire %d" % VERSION
MAX_FRAME = 32 << 20
"""Largest frame in bytes, header and tag included."""
HEADER = struct.Struct(">BB8sQ")
NONCE_SIZE = 12
"""Bytes of a sealed frame's nonce. It is as good as random: one key may seal 2^32 messages (NIST SP 800-38D, 8.3)."""
OVERHEAD = HEADER.size + NONCE_SIZE + TAG_SIZE
"""Bytes a frame adds to its message."""
MAX_MESSAGE = MAX_FRAME - OVERHEAD
"""Largest message in bytes. Noise limits its transport messages to 65535 (section 3) so that a stream's reader can have
a fixed buffer; our frames come whole, and AES-GCM is sound up to 64 GiB a message (NIST SP 800-38D, 5.2.1.1)."""
SHORT_MAX = 512
"""Bytes of the longest message that is hashed as it is: up to about there, one hash is faster than two."""
MAX_REQUESTS = 2**32
"""Maximum requests of one session: as many nonces as one AES-GCM key may have. It also limits the age of keys."""

HELLO, WELCOME, REQUEST, REPLY, REFUSAL = range(1, 6)
_NOBODY = bytes(8)
_ZEROS = bytes(NONCE_SIZE)
_MADE = struct.Struct(">Q")

Permitted = Callable[[PublicKey], bool] | Container[PublicKey]
"""Who may open a session: a set of public keys, ``PermittedKeys``, or a function."""


class Reason(IntEnum):
    """Why an agent refused a frame."""

    OTHER_VERSION = 1
    UNKNOWN_SESSION = 2
    NOT_PERMITTED = 3
    MALFORMED = 4
    BUSY = 5
    FAULT = 6


_SAYS = {
    Reason.OTHER_VERSION: f"our frame has another version than {VERSION}, which both ends speak: altered in transit?",
    Reason.UNKNOWN_SESSION: "it does not know this session: it was restarted, or replaced the session by newer ones",
    Reason.NOT_PERMITTED: "this host's key is not permitted: add its public key to the agent's permitted keys",
    Reason.MALFORMED: "it cannot decrypt our frame: altered in transit, or the agent's key has changed",
    Reason.BUSY: "it is busy: try again later",
    Reason.FAULT: "it failed while answering: see its log",
}


class RefusedError(LinkError):
    """The peer, or an attacker on the network, refused a frame: a refusal is not authenticated.

    :ivar reason: a ``Reason``, to decide on a retry; never use it for anything that matters to security
    """

    def __init__(self, reason: Reason, text: str | None = None) -> None:
        super().__init__(text or f"the peer says (not authenticated): {_SAYS[reason]}")
        self.reason = reason


def refusal(reason: Reason) -> bytes:
    """A refusal frame."""
    return HEADER.pack(VERSION, REFUSAL, _NOBODY, 0) + bytes([reason])


class Session:
    """One end of a session: two keys, an id, and the next request's number. Made by ``Initiator`` or ``Responder``.

    The host seals a request, then opens its reply; the agent opens a request, then seals its reply. A session must not
    be used by two processes or restored from a copy: it would seal two messages under one number.

    :ivar id: 8 bytes chosen by the agent
    :ivar remote: the other end's public key, proved by the handshake
    """

    def __init__(
        self, identity: bytes, remote: PublicKey, keys: tuple[CipherState, CipherState], *, host: bool
    ) -> None:
        sealing, opening = (state.key for state in keys)
        assert sealing is not None
        assert opening is not None
        # In place of Noise's transport messages (section 5.3), whose only nonce is a count: see the top of this file.
        self.id = identity
        self.remote = remote
        self._encrypt, self._decrypt = _aead(sealing, b"frame").encrypt, _aead(opening, b"frame").decrypt
        # With one nonce GMAC is GHASH plus a constant: a universal hash, which never leaves this class.
        self._hash = _aead(sealing, b"hash").encrypt
        nonce_key = hmac.digest(sealing, b"vmishim nonce", "sha256")
        self._of_short, self._of_long = (
            blake2b(digest_size=NONCE_SIZE, key=nonce_key, person=of) for of in (b"message", b"hash of message")
        )
        self._host = host
        self._seals, self._opens = (REQUEST, REPLY) if host else (REPLY, REQUEST)
        self._next = 0  # the next request's number
        self._pending: int | None = None  # the number of the request that has no reply yet

    @property
    def spent(self) -> bool:
        """Whether the session has carried ``MAX_REQUESTS``: then seal nothing more, make a fresh handshake."""
        return self._next >= MAX_REQUESTS

    def seal(self, message: bytes) -> bytes:
        """The frame that carries ``message``: the next request (host), or the reply to the request just opened (agent).

        :raises LinkError: the message is too long, the session is spent, or no request waits for a reply; nothing is
            used up then
        """
        if len(message) > MAX_MESSAGE:
            raise LinkError(f"a message of {len(message)} bytes is too long: a frame holds at most {MAX_MESSAGE}")
        if self._host:
            if self.spent:
                raise LinkError("this session has reached its request limit: make a new handshake")
            number = self._next
            self._next, self._pending = number + 1, number
        else:
            if self._pending is None:
                raise LinkError("there is no request to reply to")
            number, self._pending = self._pending, None
        header = HEADER.pack(VERSION, self._seals, self.id, number)
        if len(message) <= SHORT_MAX:
            hashed = self._of_short.copy()
            hashed.update(os.urandom(16) + header + message)
        else:
            hashed = self._of_long.copy()
            hashed.update(os.urandom(16) + header + self._hash(_ZEROS, b"", message))
        nonce = hashed.digest()
        return header + nonce + self._encrypt(nonce, message, header)

    def open(self, frame: bytes) -> bytes:
        """The message in ``frame``, which must be the reply to the last request (host), or the next request (agent).

        :raises RefusedError: (host) the frame is a refusal
        :raises LinkError: any other frame: replayed, out of turn, of another session or version, altered, cut,
            extended. The session is unchanged: a forged frame cannot end it.
        """
        number = self._pending if self._host else self._next
        if number is None or number >= MAX_REQUESTS:
            raise self._unexpected(frame, number)
        header = HEADER.pack(VERSION, self._opens, self.id, number)
        if frame[: HEADER.size] != header or not OVERHEAD <= len(frame) <= MAX_FRAME:
            raise self._unexpected(frame, number)
        # Copying a large body costs several times its decryption, since its pages have to be allocated first.
        start = HEADER.size + NONCE_SIZE
        body = memoryview(frame)[start:] if TAKES_VIEWS else frame[start:]
        try:
            message = self._decrypt(frame[HEADER.size : start], body, header)
        except InvalidTag:
            raise LinkError("the frame is not authentic: altered in transit, or encrypted with another key") from None
        if self._host:
            self._pending = None
        else:
            self._next, self._pending = number + 1, number
        return message

    def _unexpected(self, frame: bytes, number: int | None) -> LinkError:
        """What is wrong with a frame whose header is not the expected one."""
        try:
            kind, identity, counter = parse(frame)
        except LinkError as error:
            return error
        if kind != self._opens:
            return LinkError(f"a frame of kind {kind} is not expected here")
        if identity != self.id:
            return LinkError("the frame belongs to another session")
        if number is None:
            return LinkError(f"reply {counter} came, but no request is waiting: replayed?")
        if number >= MAX_REQUESTS:
            return LinkError("this session has reached its request limit: make a new handshake")
        return LinkError(f"frame {counter} came, but {number} was expected: replayed, reordered, or a frame was lost")

    def __repr__(self) -> str:
        return f"Session({self.id.hex()}, {self._next} requests, remote={self.remote!r})"


class Initiator:
    """The host's side of one handshake: ``hello`` makes the request, ``finish`` takes the answer. Use it once."""

    def __init__(self, static: PrivateKey, remote: PublicKey) -> None:
        self._remote = remote
        self._handshake = HandshakeState(PROLOGUE, static, remote)

    def hello(self) -> bytes:
        """The frame that opens the handshake.

        Its payload is the time it was made, by which the agent tells it from a recording of an older one. Nothing else
        is in it: anyone who records it can replay it to the agent, and anyone who gets the agent's private key later
        can read it (Noise, section 7.7). A replay only makes the agent compute keys that the replayer lacks.

        :raises LinkError: ``remote`` is a point of low order
        """
        return HEADER.pack(VERSION, HELLO, _NOBODY, 0) + self._handshake.write(_MADE.pack(time.time_ns()))

    def finish(self, frame: bytes) -> Session:
        """The session that the agent's answer completes.

        :raises RefusedError: the frame is a refusal
        :raises LinkError: the frame is not an authentic answer to this hello by the holder of ``remote``
        """
        kind, identity, counter = parse(frame)
        if kind != WELCOME or counter != 0:
            raise LinkError(f"a frame of kind {kind} came instead of the answer to a hello")
        if self._handshake.read(frame[HEADER.size :]):
            raise LinkError("the answer to a hello must not have a payload")
        if identity != _identity(self._handshake):
            raise LinkError("the answer's session id was altered in transit")
        return Session(identity, self._remote, self._handshake.split(), host=True)


class Responder:
    """The agent's side of handshakes; keeps no state between them.

    :param permitted: which keys may open a session
    """

    def __init__(self, static: PrivateKey, permitted: Permitted) -> None:
        self._static = static
        self.permits: Callable[[PublicKey], bool] = permitted if callable(permitted) else permitted.__contains__

    def accept(self, frame: bytes) -> tuple[bytes, Session, int]:
        """The answer to a hello, its session, and when the hello was made (ns since 1970, by the sender's clock). The
        session is unproven until a request opens in it: the hello may be a replay.

        :raises RefusedError: the sender's key is not permitted
        :raises LinkError: the frame is not a hello, or not authentic
        """
        if frame[: HEADER.size] != HEADER.pack(VERSION, HELLO, _NOBODY, 0):
            parse(frame)
            raise LinkError("the frame is not a hello")
        handshake = HandshakeState(PROLOGUE, self._static)
        made = handshake.read(frame[HEADER.size :])
        if len(made) != _MADE.size:
            raise LinkError(f"a hello must have a payload of {_MADE.size} bytes, not {len(made)}")
        remote = handshake.remote
        assert remote is not None, "the hello has told it"
        if not self.permits(remote):
            raise RefusedError(Reason.NOT_PERMITTED)
        message = handshake.write()
        identity = _identity(handshake)
        welcome = HEADER.pack(VERSION, WELCOME, identity, 0) + message
        return welcome, Session(identity, remote, handshake.split(), host=False), _MADE.unpack(made)[0]


def _aead(key: bytes, purpose: bytes) -> AESGCM:
    return AESGCM(hmac.digest(key, b"vmishim " + purpose, "sha256"))


def _identity(handshake: HandshakeState) -> bytes:
    """The session id of a finished handshake: both ends compute it, so it need not be sent encrypted."""
    return handshake.hash[:8]


def parse(frame: bytes) -> tuple[int, bytes, int]:
    """Kind, session and counter of a frame.

    :raises RefusedError: the frame is a refusal
    :raises LinkError: the frame is of another version, cut short, or too long
    """
    if not frame:
        raise LinkError("the frame is empty")
    if frame[0] != VERSION:
        texts = f"{frame[0]}, this end speaks version {VERSION}: install the same vmishim at both ends"
        if frame[1:2] == bytes([REFUSAL]):
            raise RefusedError(
                Reason.OTHER_VERSION, f"the peer says (not authenticated): it speaks wire version {texts}"
            )
        raise LinkError(f"the frame is of wire version {texts}")
    if len(frame) > MAX_FRAME:
        raise LinkError(f"a frame of {len(frame)} bytes is too long: at most {MAX_FRAME}")
    if len(frame) < HEADER.size + 1:
        raise LinkError(f"the frame is cut short: {len(frame)} bytes")
    kind, identity, counter = HEADER.unpack_from(frame)[1:]
    if kind == REFUSAL:
        if len(frame) != HEADER.size + 1 or frame[-1] not in _SAYS:
            raise LinkError("the frame is a refusal without a valid reason")
        raise RefusedError(Reason(frame[-1]))
    if kind in (REQUEST, REPLY) and len(frame) < OVERHEAD:
        raise LinkError(f"the frame is cut short: {len(frame)} bytes")
    return kind, identity, counter
