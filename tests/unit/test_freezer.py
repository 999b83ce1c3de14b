"""What is refused before anything is frozen; the rest needs a booted kernel (tests/guest/test_freeze.py)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from guest_agent.agent import Agent
from guest_agent.freezer import Freezer
from guest_agent.kernel import Kernel
from vmishim.errors import LinkError
from vmishim.wire.messages import Answer, Freeze, Thaw, encode, expect


def test_an_agent_that_may_not_freeze_says_so() -> None:
    agent = Agent(cast(Kernel, None))
    with pytest.raises(
        LinkError, match=r"\(freeze\): this agent may not freeze anything: start it with --freeze CGROUP"
    ):
        expect(agent.answer(bytes(8), encode(Freeze(5000))), Answer)
    assert expect(agent.answer(bytes(8), encode(Thaw())), Answer).values == []


def test_a_cgroup_that_cannot_be_frozen_is_named(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=rf"^{tmp_path}/cgroup.freeze: No such file or directory: --freeze takes"):
        Freezer(tmp_path)


def test_the_agent_does_not_freeze_itself() -> None:
    with pytest.raises(LinkError, match="the agent is in / itself"):
        Freezer(Path("/"))
