"""The scenes of docs/freshness.md over a byte buffer: without root, and in a moment, since the clock is the test's."""

from __future__ import annotations

import pytest

from tests.ground import freshness
from tests.ground.freshness import BufferGround, Ground


@pytest.fixture
def ground() -> Ground:
    return BufferGround()


class TestLists(freshness.Lists): ...


class TestTables(freshness.Tables): ...


class TestAges(freshness.Ages): ...


class TestHolds(freshness.Holds): ...


class TestForks(freshness.Forks): ...


class TestHistories(freshness.Histories): ...


class TestEncryption(freshness.Encryption): ...
