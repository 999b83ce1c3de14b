"""Tests on this machine's kernel: root, the built eBPF objects and no VM."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("only root may load eBPF programs into this machine's kernel")
