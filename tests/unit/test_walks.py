"""Walks by plan over lists in a byte buffer, by the interpreter that stands in for the eBPF programs."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from guest_agent.agent import Agent
from tests.ground.buffer import Buffer, BufferKernel
from tests.ground.connection import Connection
from tests.ground.walks import Ground, Requests
from vmishim.guests.agent import AgentGuest


class TestBuffer(Requests):
    """Without root, and with nothing built."""

    @pytest.fixture(scope="class")
    @classmethod
    def ground(cls) -> Ground:
        memory, numbers = Buffer(size=1 << 26), itertools.count()
        agent = Agent(BufferKernel(memory).as_kernel())

        def another() -> AgentGuest:
            link = Connection(agent, f"session {next(numbers)}".encode()).as_link()
            return AgentGuest("buffer", link, "scalar")

        return Ground(memory, another(), another)


def test_the_agent_is_imported_without_libbpf() -> None:
    """So that its core runs over a buffer where libbpf is not installed."""
    program = "import guest_agent.agent; print('libbpf' in open('/proc/self/maps').read())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
