"""Messages: each survives encoding; invalid bytes are always refused with a ``LinkError``."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import fields as fields_of
from typing import Any, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.test_plan import JSON, plans
from vmishim.errors import LinkError
from vmishim.foreign import printable
from vmishim.wire import messages
from vmishim.wire.messages import Failure, Memory, Message, Read, Walk, decode, encode, expect
from vmishim.wire.plan import Plan, PlanError, Step, Take

WORDS = st.integers(0, 2**64 - 1)
SCALARS = st.none() | st.booleans() | WORDS | st.text()
FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    int: WORDS,
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(max_size=300),
    Plan: plans(),
    list[str]: st.lists(st.text()),
    list[int]: st.lists(WORDS),
    list[Any]: st.lists(SCALARS | st.lists(SCALARS)),
    dict[str, Any]: st.dictionaries(st.text(), SCALARS | st.lists(SCALARS)),
}
KINDS: list[type[Message]] = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]


def fields(kind: type[Message]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields_of(kind)}


def of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a kind."""
    return st.builds(kind, **{name: FIELDS[hint] for name, hint in fields(kind).items()})


ANY = st.one_of([of(kind) for kind in KINDS])


def raw(number: int, values: Any, bulk: bytes = b"") -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<BI", number, len(text)) + text + bulk


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(st.data())
def test_a_message_survives_encoding(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(of(kind))
    again = decode(encode(message))
    assert type(again) is kind
    assert again == message
    assert expect(encode(message), kind) == message


def test_every_kind_has_its_own_number_and_can_be_decoded() -> None:
    assert len({kind.KIND for kind in KINDS}) == len(KINDS)
    assert set(messages._KINDS.values()) == set(KINDS)


@given(st.binary(max_size=200))
@example(b"")
@example(raw(5, b"[" * 100_000))
@example(raw(5, b"[" + b"9" * 5000 + b",0,0]"))
@example(raw(5, b"\xff\xfe[\x000\x00]\x00"))
@example(raw(5, [True, 0, 0]))
@example(raw(5, [0.0, 0, 0]))
@example(raw(5, [0, 2**64, 0]))
@example(raw(5, [0, -1, 0]))
@example(raw(5, [0, 0]))
@example(raw(5, {"0": 0, "1": 1, "2": 2}))
@example(raw(5, [0, 0, 0], b"bulk"))
@example(raw(5, b"[NaN,Infinity,0]"))
@example(raw(7, [None]))
@example(raw(7, [[], []]))
@example(raw(7, [None, []]))
@example(raw(0, []))
@example(raw(255, []))
@example(struct.pack("<BI", 5, 2**32 - 1) + b"[]")
def test_any_bytes_are_a_valid_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(LinkError, PlanError):
        assert isinstance(decode(data), Message)


@given(st.sampled_from(KINDS), JSON | st.lists(JSON, max_size=10), st.binary(max_size=20))
def test_any_values_are_a_valid_message_or_refused(kind: type[Message], values: Any, bulk: bytes) -> None:
    try:
        message = decode(raw(kind.KIND, values, bulk))
    except (LinkError, PlanError):
        return
    assert type(message) is kind
    for name, hint in fields(kind).items():
        value = getattr(message, name)
        assert isinstance(value, getattr(hint, "__origin__", hint)), name


GOOD: dict[Any, Any] = {
    int: 0, bool: True, str: "x", list[str]: ["x"], list[int]: [0], list[Any]: [0], dict[str, Any]: {"x": 0},
    Plan: Plan(0, Step.SELF, (Take(0, 0, 8),)).to_json(),
}  # fmt: skip
WRONG: dict[Any, list[Any]] = {
    int: [None, True, 0.0, -1, 1 << 64, "0", []],
    bool: [None, 0, 1, "true"],
    str: [None, 0, True, ["x"], {}],
    list[str]: [None, "x", {}, {"x": 0}, [0], ["x", 0], ["x", None]],
    list[int]: [None, "0", {}, 0, [True], [0.0], [-1], [1 << 64], [0, "0"], [0, -1]],
    list[Any]: [None, "x", {}, 0],
    dict[str, Any]: [None, [], "x", 0],
    Plan: [None, "x", {}, 0],
}
"""A value of each type of field, and values of other types, or out of range."""


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_is_refused_with_a_value_of_another_type(kind: type[Message]) -> None:
    hints = [hint for name, hint in fields(kind).items() if name != "bulk"]
    good = [GOOD[hint] for hint in hints]
    decode(raw(kind.KIND, good))
    for at, hint in enumerate(hints):
        for wrong in WRONG[hint]:
            with pytest.raises(LinkError):
                decode(raw(kind.KIND, [*good[:at], wrong, *good[at + 1 :]]))
    for values in ([*good, 0], good[:-1] if good else [0], dict(zip("abcdefgh", good, strict=False)) or None, "x"):
        with pytest.raises(LinkError):
            decode(raw(kind.KIND, values))
    # An object is not a list, though its keys are strings.
    with pytest.raises(LinkError):
        decode(raw(kind.KIND, {str(at): 0 for at in range(len(good))}))
    if "bulk" not in fields(kind):
        with pytest.raises(LinkError):
            decode(raw(kind.KIND, good, b"x"))


def test_the_json_part_has_a_limit() -> None:
    room = messages.JSON_MAX - len(json.dumps(["", ""]))
    decode(raw(Failure.KIND, ["x" * room, ""]))
    with pytest.raises(LinkError, match="more than the limit"):
        decode(raw(Failure.KIND, ["x" * (room + 1), ""]))
    with pytest.raises(LinkError, match="longer than the message"):
        decode(raw(Failure.KIND, ["", ""])[:-1])


@given(ANY, st.data())
def test_a_message_with_a_changed_byte_is_valid_or_refused(message: Message, data: st.DataObject) -> None:
    altered = bytearray(encode(message))
    at = data.draw(st.integers(0, len(altered) - 1))
    altered[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LinkError, PlanError):
        assert isinstance(decode(bytes(altered)), Message)


@given(ANY, st.data())
def test_a_message_cut_short_is_never_a_longer_one(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        shorter = decode(cut)
    except (LinkError, PlanError):
        return
    # Bulk is what follows: only that can be shorter, and the agent holds it against the plan.
    assert len(getattr(shorter, "bulk", b"")) < len(getattr(message, "bulk", b""))


def test_a_plan_out_of_bounds_is_named_in_the_error() -> None:
    values = Plan(0, Step.SELF, (Take(0, 0, 8),)).to_json()
    values[3] = 0
    with pytest.raises(PlanError, match="heads is 0x0"):
        decode(raw(Walk.KIND, [values, []]))


@given(ANY)
def test_an_unexpected_reply_is_an_error_that_names_it(message: Message) -> None:
    for kind in (Memory, Read):
        if isinstance(message, kind):
            continue
        with pytest.raises(LinkError) as caught:
            expect(encode(message), kind)
        if isinstance(message, Failure):
            assert str(caught.value).isprintable()
            for part in (message.code, message.text):
                assert printable(part) in str(caught.value)
        else:
            assert type(message).__name__ in str(caught.value)
