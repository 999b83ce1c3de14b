"""Sealed mode, for both ends: the guest's kernel encrypts memory itself, and the agent cannot read what it carries.

At its start an agent makes a random root key for each permitted IDS, gives the kernel the keys derived from it
(``bpf/sealed.bpf.c``), encrypts it for that IDS with the one-way pattern Noise X (an *envelope*), and forgets it. From
then on the kernel accepts only questions with an IDS's AES-CMAC (RFC 4493, NIST SP 800-38B). It answers with
AES-256-CBC and an AES-CMAC of question and ciphertext (encrypt-then-MAC). The IV is a CBC-MAC, under a key that only
the kernel has, of the question's challenge, a counter and the time. docs/security.md explains why this is secure.
Layouts are those of ``bpf/plan.h``; ``tests/unit/test_sealed_frames.py`` checks that they agree.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vmishim.errors import LinkError
from vmishim.wire.keys import KEY_SIZE, PrivateKey, PublicKey
from vmishim.wire.messages import (
    Answer,
    Chunk,
    Envelope,
    Failure,
    Lookup,
    Memory,
    Message,
    More,
    Read,
    Sealed,
    Sealing,
    Walk,
    decode,
    encode,
    expect,
    expected,
)
from vmishim.wire.noise import HandshakeState

PROLOGUE = b"vmishim kernel key 1"
"""Prologue of an envelope's handshake message; names this construction."""
BLOCK = 16
CHUNK_MAX = 1 << 17
"""Maximum bytes of memory in one answer: milliseconds of work, during which the guest's CPU runs no softirqs."""
CHALLENGE_SIZE = 16
HEAD = Struct("<QQ16s16s")
"""``struct sealed`` up to ``report``: counter, length, tag, IV."""
REPORT = Struct("<16Q")
"""``struct report``."""
_QUESTION = Struct("<16sII5Q")
_LAST = Struct("<QQ")
_MORE, _DONE, _TRUNCATED = range(3)  # enum walk_state
_WALKS_MAX = 64
NO_KEY = "kernel-key"
"""Code of the `Failure` for a key that the agent's kernel does not have (any more)."""


class Ask(IntEnum):
    """``enum ask_kind``."""

    READ = 0
    LOOKUP = 1
    WALK = 2
    MORE = 3


Asking = Read | Lookup | Walk | More
"""The requests that are answered from kernel memory."""


def question(
    challenge: bytes,
    kind: Ask,
    space: int = 0,
    address: int = 0,
    count: int = 0,
    *,
    chunk: int = 0,
    began: int = 0,
    heads: int = 0,
) -> bytes:
    """``struct question``."""
    return _QUESTION.pack(challenge, kind, chunk, space, address, count, began, heads)


@dataclass
class WalkAsked:
    """A walk, as the questions for its chunks identify it.

    :ivar plan: ``struct plan``
    :ivar heads: u64 addresses, if the plan lists them
    :ivar began: counter of the first chunk; 0 before there is one
    :ivar chunks: how many chunks were requested after that
    """

    plan: bytes
    heads: bytes
    began: int = 0
    chunks: int = 0


def questions(challenge: bytes, request: Asking, walk: WalkAsked | None) -> list[bytes]:
    """The questions that a request asks the kernel, a walk's reads first. Each is the data that its tag covers: the
    question, and a walk's plan and heads.

    :param walk: the walk to begin or continue
    """
    match request:
        case Read(space, address, count):
            return [question(challenge, Ask.READ, space, address, count)]
        case Lookup(dtb, address):
            return [question(challenge, Ask.LOOKUP, dtb, address)]
    assert walk is not None, "other requests ask for walks"
    also = [question(challenge, Ask.READ, 0, *read) for read in request.reads] if isinstance(request, Walk) else []
    kind = Ask.WALK if isinstance(request, Walk) else Ask.MORE
    asked = question(challenge, kind, chunk=walk.chunks, began=walk.began, heads=len(walk.heads))
    return [*also, asked + walk.plan + walk.heads + bytes(-len(walk.heads) % BLOCK)]


class KernelKeys(NamedTuple):
    """The keys of one IDS as the kernel stores them, see ``struct kernel_keys``."""

    cipher: bytes
    iv: bytes
    mac: bytes
    subkey: bytes


def kernel_keys(root: bytes) -> KernelKeys:
    """The keys for the kernel, from an IDS's root key. The IV's key is made here, and known nowhere else."""
    cipher, mac = _derive(root)
    return KernelKeys(cipher, os.urandom(KEY_SIZE), mac, subkey(mac))


def subkey(key: bytes) -> bytes:
    """K1 of a CMAC key (RFC 4493, section 2.3), which is XORed into the last whole block."""
    encryptor = Cipher(AES(key), ECB()).encryptor()  # noqa: S305 # one block is what RFC 4493 asks for
    doubled = int.from_bytes(encryptor.update(bytes(BLOCK)), "big") << 1
    return (doubled & (1 << 128) - 1 ^ (0x87 if doubled >> 128 else 0)).to_bytes(BLOCK, "big")


def seal_root(root: bytes, static: PrivateKey, remote: PublicKey) -> bytes:
    """The envelope with ``root``, which only the holder of ``remote`` can open and only that of ``static`` can make."""
    return HandshakeState(PROLOGUE, static, remote, pattern="X").write(root)


def name_of(envelope: bytes) -> str:
    """The name of the key in an envelope."""
    return hashlib.sha256(envelope).hexdigest()[:16]


def _derive(root: bytes) -> tuple[bytes, bytes]:
    both = HKDF(SHA256(), 2 * KEY_SIZE, None, PROLOGUE).derive(root)
    return both[:KEY_SIZE], both[KEY_SIZE:]


class Opened(NamedTuple):
    """An answer that the kernel sealed: its counter, the words of ``struct report``, the bytes."""

    counter: int
    report: tuple[int, ...]
    data: bytes


class Opener:
    """Authenticates questions to the kernel, and opens its answers. :param root: the key in our envelope"""

    def __init__(self, root: bytes) -> None:
        cipher, mac = _derive(root)
        self._cipher, self._mac = AES(cipher), CMAC(AES(mac))
        self._last = 0

    def tag(self, covered: bytes) -> bytes:
        """The MAC that shows the kernel that an IDS asks.

        :param covered: the question, with its plan and heads if any: a multiple of `BLOCK` bytes
        """
        mac = self._mac.copy()
        mac.update(covered + _LAST.pack(0, 0))
        return mac.finalize()

    def open(self, sealed: bytes, covered: bytes) -> Opened:
        """Check and decrypt an answer.

        :param covered: the question it must answer, as for `tag`
        :raises LinkError: it was altered, cut short, or answers another question; or the kernel's counter went back
        """
        body = len(sealed) - HEAD.size
        if body < REPORT.size or body % BLOCK:
            raise LinkError("the kernel's answer is cut short")
        counter, length, tag, iv = HEAD.unpack_from(sealed)
        mac = self._mac.copy()
        for part in (covered, sealed[HEAD.size - BLOCK :], _LAST.pack(counter, length)):
            mac.update(part)
        try:
            mac.verify(tag)
        except InvalidSignature:
            raise LinkError(
                "the kernel's answer is not authentic: altered by the agent or in transit, or it answers another "
                "question"
            ) from None
        if counter <= self._last:
            raise LinkError(
                f"the kernel's answer has number {counter}, but number {self._last} came before: the guest's memory "
                "was rolled back, or its kernel's counter was rewritten"
            )
        self._last = counter
        decryptor = Cipher(self._cipher, CBC(iv)).decryptor()
        clear = decryptor.update(sealed[HEAD.size :]) + decryptor.finalize()
        return Opened(counter, REPORT.unpack_from(clear), clear[REPORT.size : REPORT.size + length])


class Unsealing:
    """The IDS's side: sends requests whose answers the kernel seals, and opens the answers.

    :param static: our key
    :param kernel_key: the guest's kernel key, which must have made the envelope; None accepts any from the agent
    """

    def __init__(self, static: PrivateKey, kernel_key: PublicKey | None = None) -> None:
        self._static = static
        self.kernel_key = kernel_key
        self._name = ""
        self._opener: Opener | None = None
        # An agent may use one number for two walks, so each gets our own number: (the agent's number, the walk).
        self._walks: OrderedDict[int, tuple[int, WalkAsked]] = OrderedDict()
        self._numbers = itertools.count(1)

    def take(self, exchange: Callable[[bytes], bytes]) -> None:
        """Get our envelope.

        :raises LinkError: the agent has none for us, or the holder of ``kernel_key`` did not make it
        """
        values = expect(exchange(encode(Envelope(self._static.public.raw.hex()))), Answer).values
        try:
            (text,) = values
            envelope = bytes.fromhex(text)
        except (TypeError, ValueError):
            raise LinkError("the agent sent a malformed envelope") from None
        handshake = HandshakeState(PROLOGUE, self._static, pattern="X")
        root = handshake.read(envelope)
        if self.kernel_key not in (None, handshake.remote):
            raise LinkError(
                f"the guest's kernel key is {handshake.remote!r}, not {self.kernel_key!r}: another machine, or a new "
                "key; compare with the output of `agent.pyz keygen /etc/vmishim/kernel.key` in the guest"
            )
        name = name_of(envelope)
        if name != self._name:  # else the counter goes on from where it was
            self._name, self._opener = name, Opener(root)
        self._walks.clear()

    def ask(self, exchange: Callable[[bytes], bytes], request: Asking) -> Message:
        """The reply to ``request``, in the form that an agent without sealing gives.

        :raises LinkError: no reply, a refusal, or an answer that this kernel did not make for this question
        """
        reply = self._ask(exchange, request)
        if isinstance(reply, Failure) and reply.code == NO_KEY:  # the agent was restarted
            self.take(exchange)
            reply = self._ask(exchange, request)
        return reply

    def _ask(self, exchange: Callable[[bytes], bytes], request: Asking) -> Message:
        opener = self._opener
        assert opener is not None, "an envelope comes before a question"
        challenge = os.urandom(CHALLENGE_SIZE)
        walk = None
        if isinstance(request, Walk):
            walk = WalkAsked(request.plan.to_c(), request.bulk)
        elif isinstance(request, More):
            unfinished = self._walks.pop(request.walk, None)
            if unfinished is None:
                # What a restarted agent answers, so that the caller handles both alike.
                return Failure("walk", f"there is no unfinished walk {request.walk}; start the walk again")
            number, walk = unfinished
            request = More(number)
            walk.chunks += 1
        asked = questions(challenge, request, walk)
        tags = b"".join(map(opener.tag, asked))
        reply = decode(exchange(encode(Sealing(self._name, tags.hex(), challenge + encode(request)))))
        if isinstance(reply, Failure):
            return reply
        reply = expected(reply, Sealed)
        answers = parts(reply.bulk)
        if len(answers) != len(asked):
            raise LinkError(f"the agent sent {len(answers)} sealed answers to {len(asked)} questions")
        *also, last = map(opener.open, answers, asked)
        if isinstance(request, Read):
            return Memory(last.data)
        if walk is None:
            physical, page_size, *entries, levels = last.report[8:]
            return Answer([physical, page_size, entries[:levels]])
        walk.began = walk.began or last.counter
        return self._chunk(reply.walk, walk, last, [read.data for read in also])

    def _chunk(self, number: int, walk: WalkAsked, opened: Opened, found: Sequence[bytes] = ()) -> Chunk:
        faulted, fault_at, cycles, cycle_at, torn, *head, state = opened.report[:8]
        ours = next(self._numbers) if state == _MORE else 0
        if ours:
            self._walks[ours] = number, walk
            if len(self._walks) > _WALKS_MAX:
                self._walks.popitem(last=False)
        return Chunk(
            ours,
            state == _TRUNCATED,
            *(faulted, fault_at, cycles, cycle_at, torn),
            [len(data) for data in found],
            head,
            b"".join((*found, opened.data)),
        )


def parts(bulk: bytes) -> list[bytes]:
    """Split consecutive ``struct sealed``. :raises LinkError: the last is cut short"""
    found, at = [], 0
    while at < len(bulk):
        if len(bulk) - at < HEAD.size:
            raise LinkError("the kernel's answer is cut short")
        end = at + sealed_size(HEAD.unpack_from(bulk, at)[1])
        if end > len(bulk):
            raise LinkError("the kernel's answer is cut short")
        found.append(bulk[at:end])
        at = end
    return found


def sealed_size(length: int) -> int:
    """Bytes of a ``struct sealed`` that holds ``length`` bytes of memory."""
    return HEAD.size + REPORT.size + length + -length % BLOCK
