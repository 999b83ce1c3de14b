"""A hostile host at work: nothing it sends is ever accepted. Longer: ``python -m trials.hostile``."""

from __future__ import annotations

import contextlib

import pytest

from trials.hostile import Saboteur, Tally, core, every_bit
from vmishim.errors import LinkError
from vmishim.wire.session import Session

FRAMES = 100_000


def test_no_hostile_frame_is_taken_for_a_good_one() -> None:
    tally = core.core(FRAMES, seed=1)
    assert (tally.accepted, tally.crashed) == (0, 0), tally
    assert tally.frames >= FRAMES
    assert set(tally.changes) == {"flipped", "cut", "lengthened", "replayed", "spliced", "relabelled", "invented"}


def test_a_session_that_takes_them_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count can be other than zero."""
    opened = Session.open

    def careless(self: Session, frame: bytes) -> bytes:
        return opened(self, frame) if len(frame) > 300 else b"whatever"

    saboteur = Saboteur(1)
    assert all(saboteur.altered(bytes(60))[1] != bytes(60) for _ in range(1000))
    assert len(set(every_bit(bytes(4)))) == 32
    monkeypatch.setattr(Session, "open", careless)
    run = core._Core(seed=1)
    with contextlib.suppress(AssertionError, LinkError):
        run.turn(1)
    assert run.tally.accepted > 0


def test_what_was_done_is_told() -> None:
    tally = Tally()
    tally.changes["cut"] += 2
    assert str(tally) == "2 hostile frames (2 cut): 0 accepted, 0 crashes"
