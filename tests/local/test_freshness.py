"""The scenes of docs/freshness.md in this machine's kernel: its memory, the eBPF programs and the real clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest_agent.kernel import Kernel
from lab import planter
from lab.planter import Planter
from tests.ground import freshness
from tests.ground.freshness import Ground


@pytest.fixture(scope="module")
def _planted() -> Iterator[tuple[Planter, Kernel]]:
    kernel = Kernel()
    with planter.here() as planted:
        yield planted, kernel
    kernel.close()


@pytest.fixture
def ground(_planted: tuple[Planter, Kernel]) -> Iterator[Ground]:
    planted, kernel = _planted
    planted.write(0, bytes(1 << 20))
    yield Ground(planted, kernel)
    assert kernel.changed() == [], "the self-check reports what nobody did"


class TestLists(freshness.Lists): ...


class TestTrails(freshness.Trails): ...


class TestTables(freshness.Tables): ...


class TestAges(freshness.Ages): ...


class TestHolds(freshness.Holds): ...


class TestForks(freshness.Forks): ...


class TestHistories(freshness.Histories): ...


class TestEncryption(freshness.Encryption): ...
