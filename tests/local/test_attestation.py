"""Attestation: each bit of a real report, and of two certificates, flipped by itself; this takes seconds."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.authority import SIZE
from tests.unit.test_attestation import DATA, real
from trials.hostile import every_bit
from vmishim.attestation.chain import read, signer
from vmishim.attestation.errors import ChainError, SignatureError


def test_a_report_with_any_bit_flipped_is_not_signed() -> None:
    raw, (leaf, _) = real("milan-v2")
    certificates = read(leaf.read_bytes())
    assert signer(raw, certificates) == certificates[0]
    for bit in range(SIZE * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureError):
            signer(bytes(flipped), certificates)


def test_a_certificate_with_any_bit_flipped_is_parsed_or_refused() -> None:
    """The library parses some parts only on access, and then raises other errors."""
    for name in ("milan-v2.vcek.der", "milan-vlek.vlek.der"):
        for altered in every_bit((DATA / name).read_bytes()):
            with suppress(ChainError):
                for found in read(altered):
                    found.public_key(), found.extensions
