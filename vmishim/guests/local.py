"""This machine as a guest: the agent as a child process, over a socket in the file system. Protocol, encryption and
programs are the same as for a VM."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from vmishim import isolated
from vmishim.errors import LinkError
from vmishim.guests.agent import AgentGuest, Strategy, connect
from vmishim.guests.domains import TIMEOUT, Domain
from vmishim.wire.keys import generate, save_private


@contextmanager
def agent(*options: str) -> Iterator[Domain]:
    """Run an agent on this machine, with fresh keys, for the length of the block; gives the entry to reach it by.

    The agent ends with the block, or with this process however that ends: it reads a pipe that this process holds.

    :param options: more options of ``agent.pyz serve``; name files by absolute paths
    :raises LinkError: it can't run here; the text says what is missing (root, BTF, libbpf, lockdown) and what to do
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise LinkError(f"this is {platform.system()} on {platform.machine()}; an agent reads Linux on x86_64 only")
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        # The agent changes to another user, which may read the list of permitted keys; only we may read the keys.
        Path(folder).chmod(0o711)
        ours, theirs = generate(), generate()
        save_private(Path(folder, "key"), ours)
        save_private(Path(folder, "agent.key"), theirs)
        Path(folder, "permitted").write_text(ours.public.text + "\n")
        endpoint = f"ipc://{folder}/socket"
        serve = ["serve", "--until-eof", "--listen", endpoint]
        files = ["--key", f"{folder}/agent.key", "--permitted", f"{folder}/permitted"]
        command = isolated.module("guest_agent", *serve, *files, *options)
        with Path(folder, "log").open("w+") as errors:
            child = subprocess.Popen(
                command,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=isolated.environment(),
            )
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                if child.stdout.readline() != b"ready\n":
                    child.wait()
                    errors.seek(0)
                    raise LinkError(f"no agent can run on this machine: {_reason(errors.read())}")
                yield Domain("local", agent=endpoint, agent_key=theirs.public.text, key=f"{folder}/key")
            finally:
                child.stdin.close()
                child.stdout.close()
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


@contextmanager
def guest(strategy: Strategy = "batch", timeout: float = TIMEOUT) -> Iterator[AgentGuest]:
    """This machine as a guest.

    :param timeout: seconds for one answer
    :raises LinkError: see `agent`
    """
    with agent() as domain, closing(connect(replace(domain, timeout=timeout), strategy)) as target:
        yield target


def _reason(log: str) -> str:
    lines = [line for line in log.strip().splitlines() if line]
    named = [line.removeprefix("vmishim-agent: ") for line in lines if line.startswith("vmishim-agent: ")]
    return "\n".join(named or lines[-5:]) or "it ended without a message"
