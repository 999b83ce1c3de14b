"""``python -m trials.hostile``: run the hostile host, and print the outcome."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from dataclasses import replace

from trials.hostile import Tally, flood, resident
from trials.hostile.core import core
from trials.hostile.port import port
from trials.hostile.sockets import running, sockets
from vmishim.errors import LibvmiError


def main() -> int:
    """Print the counts; returns 1 if a hostile frame was accepted, caused a crash or ended the agent."""
    options = _parser().parse_args()
    print(f"seed {options.seed}; Linux {os.uname().release}, {os.cpu_count()} CPUs", flush=True)
    try:
        bad = _core(options.frames, options.seed)
        with running() as agent:
            begun = time.monotonic()
            outcome = sockets(options.sockets, options.seed, agent)
            print(f"sockets: {outcome}, {time.monotonic() - begun:.0f} s", flush=True)
            bad |= _bad(outcome.tally)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        with running("--listen", endpoint) as agent:
            for pour in (flood.handshakes, flood.half_open, flood.oversize):
                pressed = flood.flood(replace(agent, endpoint=endpoint), pour)
                print(f"flood: {pressed}", flush=True)
                bad |= bool(pressed.wrong)
        for line in port(options.seconds):
            print(f"port: {line}", flush=True)
    except (LibvmiError, AssertionError) as error:
        print(f"hostile: {error}", file=sys.stderr)
        return 1
    return int(bad)


def _core(frames: int, seed: int) -> bool:
    begun = time.monotonic()
    core(frames // 10, seed)
    before = resident()
    tally = core(frames, seed + 1)
    print(
        f"core: {tally}; memory {before:,} -> {resident():,} KiB, {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    return _bad(tally)


def _bad(tally: Tally) -> bool:
    return bool(tally.accepted or tally.crashed)


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m trials.hostile",
        description="Meddle with frames between IDSs and agents, and flood an agent. Reads this machine: needs root.",
    )
    whole.add_argument(
        "--frames", type=int, default=1_000_000, help="hostile frames sent to both ends without sockets (%(default)s)"
    )
    whole.add_argument(
        "--sockets",
        type=int,
        default=10_000,
        help="hostile frames sent between a real IDS and a real agent (%(default)s)",
    )
    whole.add_argument(
        "--seconds", type=float, default=120.0, help="how long endless messages are poured into the port (%(default)s)"
    )
    whole.add_argument("--seed", type=int, default=1, help="seed of the random changes (%(default)s)")
    return whole


if __name__ == "__main__":
    sys.exit(main())
