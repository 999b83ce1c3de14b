"""The kernel encrypts: `Sealer` brings it questions, takes back what it sealed, and can read neither key nor memory."""

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
from guest_agent.programs import LoadError, Programs, object_bytes
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
"""A program of the network wants one to run on; ours does not look at it."""
_KERNEL_KEYS = struct.Struct("<4Q32s32s32s16s")
_ASKED = struct.Struct("<16sII")
"""``struct ask`` from ``tag`` on."""
_LENGTH = struct.Struct("<QQ")
"""``struct sealed`` up to ``tag``: counter, length."""
_MORE, _FAILED = 0, 0xFFFFFFFF
"""What `gather` returns: a walk's state, or that it failed."""


@dataclass
class _Unfinished:
    session: bytes
    slot: int
    walk: WalkAsked


class Sealer:
    """The programs of ``bpf/sealed.bpf.c``, keys and all. Make it before there are threads.

    :param kernel: what to know of this machine is asked of it; it is of no further use to this
    :param key: file of the key that seals envelopes: read in a process of its own that ends, as all other secrets are
    :param permitted: the IDSs that get an envelope; who is permitted later has none until the agent is started anew
    :raises LoadError: the kernel can't, or there is no such key
    """

    def __init__(self, kernel: Kernel, key: Path, permitted: Iterable[PublicKey]) -> None:
        try:
            self._programs = Programs(object_bytes("sealed"))
        except LoadError as error:
            raise LoadError(f"--kernel-key: {_unable(error)}", error.log) from None
        try:
            self._envelopes = self._set_up(kernel, key, list(permitted))
            self._ask = self._programs.map("ask")
            self._heads = self._programs.map("asked_heads")
            self._sealed = self._programs.map("sealed")
            self._asked = self._programs.btf.member("ask", "tag").offset
            self._programs.leave("admit", "gather", "seal")
        except BaseException:
            self._programs.close()
            raise
        self._numbers_of = {name_of(bytes.fromhex(text)): at for at, text in enumerate(self._envelopes.values())}
        self._walks: OrderedDict[int, _Unfinished] = OrderedDict()
        self._numbers = itertools.count(1)

    def envelope(self, public: str) -> str | None:
        """The envelope of an IDS by its public key, both hexadecimal; None if it was not permitted at the start."""
        return self._envelopes.get(public)

    def answer(self, session: bytes, key: str, tags: bytes, challenge: bytes, request: Asking) -> Message:
        """What the kernel seals in answer to a request, or a `Failure`.

        :param session: who asks; a walk can only be continued by the one who began it
        :param key: whose key to seal by
        :param tags: of each question, by which the kernel takes it for an IDS's
        """
        owner = self._numbers_of.get(key)
        if owner is None:
            return Failure(NO_KEY, "this agent's kernel has no such key, the agent was started anew: take the envelope")
        number, unfinished = 0, None
        if isinstance(request, Walk):
            number = next(self._numbers)
            unfinished = _Unfinished(session, self._free_slot(), WalkAsked(request.plan.to_c(), request.bulk))
        elif isinstance(request, More):
            number, held = request.walk, self._walks.get(request.walk)
            if held is None or held.session != session:
                return Failure("walk", f"there is no unfinished walk {number}; begin it again")
            # As it is once this is answered; refused, it stays as it was.
            unfinished = replace(held, walk=replace(held.walk, chunks=held.walk.chunks + 1))
        asked = questions(challenge, request, unfinished.walk if unfinished else None)
        if len(tags) != BLOCK * len(asked):
            return Failure("malformed", f"{len(tags)} bytes of tags for {len(asked)} questions")
        answers = []
        for at, covered in enumerate(asked):
            tag = tags[BLOCK * at : BLOCK * (at + 1)]
            state = self._run(covered, tag, owner, unfinished.slot if unfinished else 0)
            if state is None:
                return Failure("kernel-refused", "the kernel does not take this for a question of an IDS's")
            answers.append(self._sealed[: sealed_size(_LENGTH.unpack_from(self._sealed)[1])])
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

    def close(self) -> None:
        """Unload the programs, and with them the keys."""
        self._programs.close()

    def _free_slot(self) -> int:
        """One where no walk is kept; the walk begun first makes room."""
        if len(self._walks) >= WALKS_MAX:
            return self._walks.popitem(last=False)[1].slot
        return min(set(range(WALKS_MAX)) - {walk.slot for walk in self._walks.values()})

    def _run(self, covered: bytes, tag: bytes, owner: int, slot: int) -> int | None:
        """Have a question answered: how a walk stands then; None if the kernel refuses.

        :param covered: the question, then a walk's plan and heads
        """
        ask, heads = self._ask, covered[self._asked :]
        ask[: len(covered) - len(heads)] = covered[: self._asked]
        _ASKED.pack_into(ask, self._asked, tag, owner, slot)
        self._heads[: len(heads)] = heads
        if self._programs.run("admit", packet=_PACKET):
            return None
        state = self._programs.run("gather")
        if state == _FAILED or self._programs.run("seal", packet=_PACKET):
            raise OSError("the kernel did not seal its answer")
        return state

    def _set_up(self, kernel: Kernel, key: Path, permitted: list[PublicKey]) -> dict[str, str]:
        """Envelopes by public key. What made them is over and gone with its memory when this returns."""
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reads)
                with open(writes, "w") as pipe:
                    json.dump(self._make_keys(kernel, key, permitted), pipe)
            except Exception:  # seen in the log; this copy of the process must not go on in any case
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writes)
        with open(reads) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        made: dict[str, str] = json.loads(text) if text else {"error": "setting the kernel's keys up failed"}
        if "error" in made:
            raise LoadError(made["error"])
        return made

    def _make_keys(self, kernel: Kernel, key: Path, permitted: list[PublicKey]) -> dict[str, str]:
        if len(permitted) > KEYS_MAX:
            return {"error": f"{len(permitted)} IDSs are permitted, the kernel keeps keys for {KEYS_MAX}"}
        envelopes = {}
        try:
            static = load_private(key)
            for number, public in enumerate(permitted):
                root = os.urandom(KEY_SIZE)
                reading = kernel.page_offset, kernel.levels, kernel.encrypted
                failed = self._programs.run(
                    "store_keys", context=_KERNEL_KEYS.pack(number, *reading, *kernel_keys(root))
                )
                if failed:
                    error = os.strerror(-struct.unpack("<i", struct.pack("<I", failed))[0])
                    return {"error": f"the kernel made no cipher cbc(aes): {error}"}
                envelopes[public.raw.hex()] = seal_root(root, static, public).hex()
        except LinkError as error:
            return {"error": str(error)}
        return envelopes


def obstacle() -> str:
    """Why this kernel can't encrypt what is read of it; empty if it can."""
    try:
        Programs(object_bytes("sealed")).close()
    except LoadError as error:
        return _unable(error)
    return ""


def _unable(error: LoadError) -> str:
    release = os.uname().release
    if tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < (6, 10):
        return f"Linux {release} can't encrypt what eBPF reads, 6.10 is the oldest whose eBPF can encrypt"
    return f"{error} (and CAP_NET_ADMIN, without which no eBPF encrypts)" if "CAP_BPF" in str(error) else str(error)
