"""Encryption by the kernel: `Sealer` passes it questions and returns its sealed answers, and sees no key or memory."""

from __future__ import annotations

import itertools
import json
import os
import struct
import traceback
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from guest_agent.kernel import Kernel
from guest_agent.programs import LoadError, Programs
from vmishim.ebpf_objects import object_bytes
from vmishim.errors import LinkError
from vmishim.wire.keys import KEY_SIZE, PublicKey, load_private
from vmishim.wire.messages import Failure, Message, More, Sealed, Walk
from vmishim.wire.sealed import (
    BLOCK,
    NO_KEY,
    Asking,
    WalkAsked,
    kernel_keys,
    name_of,
    questions,
    seal_root,
    sealed_size,
)

KEYS_MAX, WALKS_MAX = 64, 16
"""As in ``bpf/plan.h``."""
_PACKET = bytes(64)
"""``SEC("tc")`` programs run on a packet; ours do not look at it."""
_KERNEL_KEYS = struct.Struct("<Q32s32s32s16s")
_ASKED = struct.Struct("<16sII")
"""``struct ask`` from ``tag`` on."""
_LENGTH = struct.Struct("<QQ")
"""``struct sealed`` up to ``tag``: counter, length."""
_PUBLIC = "public"
"""Beside the envelopes by key: the public half of the key that sealed them."""
_MORE, _FAILED = 0, 0xFFFFFFFF
"""What ``gather`` returns: a walk's state, or a failure."""


@dataclass
class _UnfinishedWalk:
    session: bytes
    slot: int
    walk: WalkAsked


class Sealer:
    """The loaded programs of ``bpf/sealed.bpf.c`` and their keys. It forks, so create it before any thread starts.

    :param kernel: supplies this machine's layout (direct map, page tables); not used after set-up
    :param key: file of the key that seals envelopes; like all other secrets, only a short-lived child process reads it
    :param permitted: the IDSs that get an envelope; one that is permitted later has none until the agent restarts
    :ivar public: the public half of ``key``
    :raises LoadError: the kernel can't encrypt, or the key can't be read
    """

    def __init__(self, kernel: Kernel, key: Path, permitted: Iterable[PublicKey]) -> None:
        try:
            self._programs = Programs(object_bytes("sealed"))
        except LoadError as error:
            raise LoadError(f"--kernel-key: {_explain(error)}", error.log) from None
        try:
            self._programs.fix("layout", kernel.layout)
            self.public, self._envelopes = self._set_up(key, list(permitted))
            self._ask = self._programs.map("ask")
            self._heads = self._programs.map("asked_heads")
            self._sealed = self._programs.map("sealed")
            self._asked = self._programs.btf.member("ask", "tag").offset
            self._programs.keep_only("admit", "gather", "seal")
        except BaseException:
            self._programs.close()
            raise
        self._numbers_of = {name_of(bytes.fromhex(text)): at for at, text in enumerate(self._envelopes.values())}
        self._walks: OrderedDict[int, _UnfinishedWalk] = OrderedDict()
        self._numbers = itertools.count(1)
        self._left = b""

    def envelope(self, public: str) -> str | None:
        """The envelope for an IDS's public key, both hexadecimal; None if the IDS was not permitted at the start."""
        return self._envelopes.get(public)

    def answer(self, session: bytes, key: str, tags: bytes, challenge: bytes, request: Asking) -> Message:
        """Return what the kernel sealed in answer to a request, or a `Failure`.

        :param session: id of the asking session; only the session that began a walk can continue it
        :param key: name of the IDS's key, which the answer is sealed with
        :param tags: one per question, in order; with it the kernel verifies that an IDS asked
        """
        owner = self._numbers_of.get(key)
        if owner is None:
            return Failure(
                NO_KEY,
                "this agent's kernel has no such key, because the agent was restarted: ask for the envelope again",
            )
        number, unfinished = 0, None
        if isinstance(request, Walk):
            number = next(self._numbers)
            unfinished = _UnfinishedWalk(session, self._free_slot(), WalkAsked(request.plan.to_c(), request.bulk))
        elif isinstance(request, More):
            number, held = request.walk, self._walks.get(request.walk)
            if held is None or held.session != session:
                return Failure("walk", f"there is no unfinished walk {number}; start the walk again")
            # A copy: if the kernel refuses, the kept walk stays as it was.
            unfinished = replace(held, walk=replace(held.walk, chunks=held.walk.chunks + 1))
        asked = questions(challenge, request, unfinished.walk if unfinished else None)
        if len(tags) != BLOCK * len(asked):
            return Failure("malformed", f"{len(tags)} bytes of tags for {len(asked)} questions")
        answers = []
        for at, covered in enumerate(asked):
            tag = tags[BLOCK * at : BLOCK * (at + 1)]
            state = self._run(covered, tag, owner, unfinished.slot if unfinished else 0)
            if state is None:
                return Failure(
                    "kernel-refused", "the kernel rejected this question: its tag is not from a permitted IDS"
                )
            self._left = self._sealed[: sealed_size(_LENGTH.unpack_from(self._sealed)[1])]
            answers.append(self._left)
        if unfinished:
            unfinished.walk.began = unfinished.walk.began or _LENGTH.unpack_from(self._sealed)[0]
            self._walks[number] = unfinished
            if state != _MORE:
                del self._walks[number]
        return Sealed(number, b"".join(answers))

    def end(self, session: bytes) -> None:
        """Forget a session's unfinished walks."""
        for number in [number for number, walk in self._walks.items() if walk.session == session]:
            del self._walks[number]

    def changed(self) -> list[str]:
        """As `Kernel.changed`, of what this process can see: the other maps are the kernel's alone."""
        written = [] if self._sealed[: len(self._left)] == self._left else ["map sealed was rewritten"]
        return [*written, *(f"program {name} was exchanged" for name in self._programs.changed())]

    def close(self) -> None:
        """Unload the programs, which destroys their keys."""
        self._programs.close()

    def _free_slot(self) -> int:
        """A slot for a new walk: a free one, or that of the oldest walk, which is dropped."""
        if len(self._walks) >= WALKS_MAX:
            return self._walks.popitem(last=False)[1].slot
        return min(set(range(WALKS_MAX)) - {walk.slot for walk in self._walks.values()})

    def _run(self, covered: bytes, tag: bytes, owner: int, slot: int) -> int | None:
        """Have the kernel answer a question. Returns ``gather``'s result; None if the kernel refuses the question.

        :param covered: the bytes that the tag covers: the question, then a walk's plan and heads
        """
        self._left = b""
        ask, heads = self._ask, covered[self._asked :]
        ask[: len(covered) - len(heads)] = covered[: self._asked]
        _ASKED.pack_into(ask, self._asked, tag, owner, slot)
        self._heads[: len(heads)] = heads
        if self._programs.run("admit", packet=_PACKET):
            return None
        state = self._programs.run("gather")
        if state == _FAILED or self._programs.run("seal", packet=_PACKET):
            raise OSError("the eBPF programs gather or seal failed, so there is no sealed answer")
        return state

    def _set_up(self, key: Path, permitted: list[PublicKey]) -> tuple[PublicKey, dict[str, str]]:
        """Return the key's public half, and envelopes by the IDSs' keys. A child process makes them, and its secrets
        end with it."""
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reads)
                with open(writes, "w") as pipe:
                    json.dump(self._make_keys(key, permitted), pipe)
            except Exception:  # the log shows it; the child must exit here in any case
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writes)
        with open(reads) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        made: dict[str, str] = (
            json.loads(text) if text else {"error": "the process that sets up the kernel's keys failed, see the log"}
        )
        if "error" in made:
            raise LoadError(made["error"])
        return PublicKey(bytes.fromhex(made.pop(_PUBLIC))), made

    def _make_keys(self, key: Path, permitted: list[PublicKey]) -> dict[str, str]:
        if len(permitted) > KEYS_MAX:
            return {"error": f"{len(permitted)} IDSs are permitted, but the kernel keeps keys for at most {KEYS_MAX}"}
        try:
            static = load_private(key)
            envelopes = {_PUBLIC: static.public.raw.hex()}
            for number, public in enumerate(permitted):
                root = os.urandom(KEY_SIZE)
                failed = self._programs.run("store_keys", context=_KERNEL_KEYS.pack(number, *kernel_keys(root)))
                if failed:
                    error = os.strerror(-struct.unpack("<i", struct.pack("<I", failed))[0])
                    return {"error": f"the kernel could not create the cipher cbc(aes): {error}"}
                envelopes[public.raw.hex()] = seal_root(root, static, public).hex()
        except LinkError as error:
            return {"error": str(error)}
        return envelopes


def why_unsupported() -> str:
    """Why this kernel can't encrypt what is read; empty if it can."""
    try:
        Programs(object_bytes("sealed")).close()
    except LoadError as error:
        return _explain(error)
    return ""


def _explain(error: LoadError) -> str:
    release = os.uname().release
    if tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < (6, 10):
        return f"Linux {release} can't encrypt what eBPF reads; use Linux 6.10 or newer"
    return f"{error} (and CAP_NET_ADMIN, to encrypt in eBPF)" if "CAP_BPF" in str(error) else str(error)
