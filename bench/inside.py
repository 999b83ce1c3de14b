"""What a request costs the agent itself, without a network: run where the agent runs, with the agent's own code.

``python inside.py AGENT RUNS``, a request in hexadecimal on standard input, `Share` as JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, TypedDict


class Share(TypedDict):
    """Medians, in seconds."""

    walk: float
    """Walking in the kernel and copying out what was found."""
    answer: float
    """From the request to the reply, both in the clear; the walk included."""
    seal: float
    """Encrypting the reply."""


def measure(request: bytes, runs: int) -> Share:
    """Answer ``request`` time and again."""
    from guest_agent.agent import Agent
    from guest_agent.kernel import Kernel
    from vmishim.wire.messages import Walk, decode

    kernel = Kernel()
    agent = Agent(kernel)
    walk = decode(request)
    assert isinstance(walk, Walk)
    walks = [timed(lambda: kernel.walk(walk.plan, walk.bulk))[0] for _ in range(runs)]
    answers = [timed(lambda: agent.answer(b"bench", request)) for _ in range(runs)]
    reply = answers[-1][1]
    return Share(
        walk=median(walks), answer=median(seconds for seconds, _ in answers), seal=cryptography(len(reply), runs)[0]
    )


def cryptography(size: int, runs: int) -> tuple[float, float]:
    """Median seconds of sealing a reply of so many bytes, and of opening it."""
    from vmishim.wire.keys import generate
    from vmishim.wire.session import Initiator, Responder

    ours, theirs = generate(), generate()
    initiator = Initiator(ours, theirs.public)
    welcome, there, _ = Responder(theirs, {ours.public}).accept(initiator.hello())
    here = initiator.finish(welcome)
    seals, opens = [], []
    for _ in range(runs):
        there.open(here.seal(b""))
        seconds, frame = timed(lambda: there.seal(bytes(size)))
        seals.append(seconds)
        opens.append(timed(lambda frame=frame: here.open(frame))[0])  # type: ignore[misc]
    return median(seals), median(opens)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    begun = perf_counter()
    result = call()
    return perf_counter() - begun, result


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    json.dump(measure(bytes.fromhex(sys.stdin.read()), int(sys.argv[2])), sys.stdout)
