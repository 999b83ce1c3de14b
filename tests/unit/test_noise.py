"""The handshake against published vectors, and against keys of low order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmishim.errors import LinkError
from vmishim.wire.keys import PrivateKey, PublicKey, generate
from vmishim.wire.noise import AES_GCM, CHACHA_POLY, MAX_HANDSHAKE, CipherState, HandshakeState


def vectors(pattern: str) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / f"data/noise_{pattern}_vectors.json").read_text())
    return list(found["vectors"])


# RFC 7748 points of order 1, 2, 4 and 8 and their twins modulo 2^255 - 19.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("vector", vectors("ik"), ids=lambda vector: vector["name"])
def test_published_vectors(vector: dict[str, Any]) -> None:
    value = {name: bytes.fromhex(text) for name, text in vector.items() if name.startswith(("init_", "resp_"))}
    cipher = AES_GCM if "AESGCM" in vector["name"] else CHACHA_POLY
    initiator = HandshakeState(
        value["init_prologue"],
        PrivateKey(value["init_static"]),
        PublicKey(value["init_remote_static"]),
        cipher=cipher,
        ephemeral=PrivateKey(value["init_ephemeral"]),
    )
    responder = HandshakeState(
        value["resp_prologue"],
        PrivateKey(value["resp_static"]),
        cipher=cipher,
        ephemeral=PrivateKey(value["resp_ephemeral"]),
    )
    first, second, *transport = [
        (bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]
    ]

    assert initiator.write(first[0]) == first[1]
    assert responder.read(first[1]) == first[0]
    assert responder.write(second[0]) == second[1]
    assert initiator.read(second[1]) == second[0]
    assert responder.remote == PrivateKey(value["init_static"]).public

    (host_seals, host_opens), (agent_seals, agent_opens) = initiator.split(), responder.split()
    for turn, (payload, ciphertext) in enumerate(transport):
        sealing, opening = (host_seals, agent_opens) if turn % 2 == 0 else (agent_seals, host_opens)
        assert sealing.encrypt_with_ad(b"", payload) == ciphertext
        assert opening.decrypt_with_ad(b"", ciphertext) == payload


@pytest.mark.parametrize("vector", vectors("x"), ids=lambda vector: vector["name"])
def test_published_vectors_of_one_message(vector: dict[str, Any]) -> None:
    cipher = AES_GCM if "AESGCM" in vector["name"] else CHACHA_POLY
    ours, theirs = (PrivateKey(bytes.fromhex(vector[name])) for name in ("init_static", "resp_static"))
    initiator = HandshakeState(
        bytes.fromhex(vector["init_prologue"]),
        ours,
        PublicKey(bytes.fromhex(vector["init_remote_static"])),
        pattern="X",
        cipher=cipher,
        ephemeral=PrivateKey(bytes.fromhex(vector["init_ephemeral"])),
    )
    responder = HandshakeState(bytes.fromhex(vector["resp_prologue"]), theirs, pattern="X", cipher=cipher)
    (payload, ciphertext), *transport = [
        (bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]
    ]
    assert initiator.write(payload) == ciphertext
    assert responder.read(ciphertext) == payload
    assert responder.remote == ours.public
    seals, opens = initiator.split()[0], responder.split()[1]
    for payload, ciphertext in transport:
        assert seals.encrypt_with_ad(b"", payload) == ciphertext
        assert opens.decrypt_with_ad(b"", ciphertext) == payload


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_point_of_low_order_is_refused(point: bytes) -> None:
    with pytest.raises(LinkError, match="low order"):
        generate().exchange(PublicKey(point))
    with pytest.raises(LinkError, match="low order"):
        HandshakeState(b"", generate(), PublicKey(point)).write()
    with pytest.raises(LinkError, match="low order"):
        HandshakeState(b"", generate()).read(point + bytes(64))


def test_another_prologue_is_refused() -> None:
    agent = generate()
    hello = HandshakeState(b"one", generate(), agent.public).write()
    with pytest.raises(LinkError, match="not authentic"):
        HandshakeState(b"two", agent).read(hello)


def test_a_key_is_used_for_no_more_messages_than_it_has_nonces() -> None:
    state = CipherState(AES_GCM, bytes(32))
    state._count = 2**64 - 2
    state.encrypt_with_ad(b"", b"")
    with pytest.raises(LinkError, match="reached its message limit"):
        state.encrypt_with_ad(b"", b"")


@pytest.mark.parametrize("size", [0, 1, MAX_HANDSHAKE - 96, MAX_HANDSHAKE - 95])
def test_a_handshake_message_may_have_its_smallest_and_its_largest_size(size: int) -> None:
    """Key, sealed key and tag are 32 + 48 + 16 bytes of the first message, key and tag 32 + 16 of the second."""
    agent = generate()
    initiator, responder = HandshakeState(b"", generate(), agent.public), HandshakeState(b"", agent)
    first = initiator.write(bytes(size))
    assert len(first) == 96 + size
    if len(first) > MAX_HANDSHAKE:
        with pytest.raises(LinkError, match="has 96 to 65535 bytes"):
            responder.read(first)
        return
    assert responder.read(first) == bytes(size)
    second = responder.write(bytes(size))
    assert len(second) == 48 + size
    assert initiator.read(second) == bytes(size)


@pytest.mark.parametrize("size", [0, 31, 95, 65536])
def test_a_handshake_message_has_a_smallest_and_a_largest_size(size: int) -> None:
    with pytest.raises(LinkError, match="bytes"):
        HandshakeState(b"", generate()).read(bytes(size))


def test_a_failed_decryption_leaves_the_state_unchanged() -> None:
    one, two = CipherState(AES_GCM, bytes(32)), CipherState(AES_GCM, bytes(32))
    sealed = one.encrypt_with_ad(b"ad", b"text")
    for forged in (sealed[:-1], sealed[:7], b"", sealed + b"x"):
        with pytest.raises(LinkError):
            two.decrypt_with_ad(b"ad", forged)
    assert two.decrypt_with_ad(b"ad", sealed) == b"text"
