"""What is said of a finished dump: in a note in the file, and in the signed manifest beside it. Values only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vmishim.acquire.journal import Plan, Record
from vmishim.acquire.pieces import CHUNK, Piece, chunks, joined, total
from vmishim.guests.layout import Range
from vmishim.version import __version__

VERSION = 1
SUFFIX, SIGNATURE_SUFFIX = ".manifest.json", ".manifest.sig"
SIZE_MAX = 1 << 30
"""Bytes of the longest manifest that is read, of a dump of 8 TiB."""
RUNNING = "the guest ran on while its memory was read, so parts of it are of different times"
FROZEN = "the monitored container was frozen all the time; the guest's kernel and other processes ran on"
BROKEN = "the monitored container was frozen, but not all the time: the parts that were read in turn differ in time"
STILL = "the memory was read from a file"


def missing(plan: Plan, record: Record) -> list[Range]:
    """What was to be read and was not, because the acquisition was ended before."""
    return joined(chunks(plan.ranges, record.done))


def consistency(plan: Plan, record: Record) -> str:
    """Whether all of the memory is of one time, in words."""
    if not plan.guest.get("agent"):
        return STILL
    frozen = [session["frozen"] for session in record.sessions]
    if frozen == [True]:
        return FROZEN
    return BROKEN if any(frozen) else RUNNING


def facts(plan: Plan, record: Record) -> dict[str, Any]:
    """What the note and the manifest both say."""
    lacking = missing(plan, record)
    return {
        "vmishim": __version__,
        "guest": {"name": plan.name, **plan.guest},
        "format": plan.format,
        "kernel_only": plan.kernel_only,
        "complete": not lacking,
        "consistency": consistency(plan, record),
        "sessions": record.sessions,
        "vmcoreinfo": plan.vmcoreinfo_from,
        "ram": _texts(plan.ram),
        "unreadable": _texts(joined(record.unreadable)),
        "not_read": _texts(lacking),
    }


def note(plan: Plan, record: Record) -> bytes:
    """The content of our note in an ELF core."""
    return json.dumps(facts(plan, record)).encode()


def manifest(plan: Plan, record: Record, file: str, size: int, sha256: str, signer: str, key: str) -> bytes:
    """The manifest, as it is signed.

    :param file: the dump's name
    :param size: its bytes
    :param sha256: of the whole file
    :param signer: the line of the key that signs
    :param key: the line of the IDS's key that this is derived from
    """
    said = {
        "vmishim-manifest": VERSION,
        "file": file,
        "size": size,
        "sha256": sha256,
        **facts(plan, record),
        "bytes_read": sum(piece.size for piece in record.pieces),
        "bytes_left_out": total(plan.ram) - total(plan.ranges),
        "attestation": plan.attestation,
        "signer": signer,
        "key": key,
    }
    return json.dumps(said | {"chunks": [_text(piece) for piece in record.pieces]}, indent=1).encode() + b"\n"


def _texts(ranges: Sequence[Range]) -> list[str]:
    return [f"{each.start:#x}-{each.end:#x}" for each in ranges]


def _text(piece: Piece) -> str:
    return f"{piece.address:#x} {piece.size} {piece.offset} {piece.sha256}"


@dataclass(frozen=True)
class Manifest:
    """What a dump is checked against."""

    size: int
    sha256: str
    pieces: list[Piece]
    """In the order of offsets."""
    said: dict[str, Any]
    """All of it."""


def parse(text: bytes) -> Manifest:
    """A manifest's content. :raises ValueError: it is malformed"""
    try:
        said = json.loads(text)
        if said["vmishim-manifest"] != VERSION:
            raise ValueError("it is of another version of vmishim")
        pieces = []
        at = 0
        for each in said["chunks"]:
            address, size, offset, sha256 = each.split()
            piece = Piece(int(address, 16), int(size), int(offset), sha256)
            if not (0 < piece.size <= CHUNK and piece.offset >= at):
                raise ValueError("its chunks are not in order")
            at = piece.offset + piece.size
            pieces.append(piece)
        whole, sha256 = said["size"], said["sha256"]
        if type(whole) is not int or type(sha256) is not str:
            raise ValueError("its size or hash is malformed")
        return Manifest(whole, sha256, pieces, said)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it lacks something: {error}") from None
