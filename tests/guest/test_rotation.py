"""Keys are changed while guests are read: a permitted key can always read, a removed one from then on never."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.agent import AGENT, KEYS, InstalledAgent
from lab.vm import LabVM
from tests.guest.ids import Ids
from vmishim.errors import LinkError
from vmishim.guests.agent import AgentGuest, connect
from vmishim.libvmi import Libvmi
from vmishim.wire.keys import PrivateKey, PublicKey, generate
from vmishim.wire.session import Reason, RefusedError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def as_before(lab: LabVM, agent: InstalledAgent) -> Iterator[None]:
    """Puts the agent's key and its list back, after the last test."""
    key, permitted = (lab.read(f"{KEYS}/{name}") for name in ("agent.key", "permitted"))
    yield
    lab.write(f"{KEYS}/agent.key", key, 0o600)
    lab.write(f"{KEYS}/permitted", permitted)
    lab.run("systemctl", "restart", "vmishim-agent")
    agent.connect().close()


COMMANDS = {"written into": 'cat >"$2" <"$1"', "replaced": 'mv "$1" "$2"'}
"""How the list is changed: the agent goes on reading it, or restarts."""


def permit(lab: LabVM, how: str, *keys: PrivateKey) -> None:
    lab.write(f"{KEYS}/new", "".join(f"{key.public.text}\n" for key in keys).encode())
    lab.run("sh", "-c", COMMANDS[how], "sh", f"{KEYS}/new", f"{KEYS}/permitted")


def reads(guest: AgentGuest) -> bool:
    guest.flush()
    return {1, 2} <= Ids(Libvmi.over(guest)).processes().keys()


def refuses(guest: AgentGuest) -> Reason:
    guest.flush()
    with pytest.raises(RefusedError) as caught:
        Ids(Libvmi.over(guest)).processes()
    return caught.value.reason


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("how", COMMANDS)
def test_an_ids_changes_its_key(lab: LabVM, agent: InstalledAgent, how: str) -> None:
    key = generate()
    old = agent.connect()
    assert reads(old)
    permit(lab, how, agent.private, key)
    new = connect(agent.domain(), private=key)
    assert reads(old)
    assert reads(new)
    permit(lab, how, key)
    # Its session is alive, and ends with the request it makes next.
    assert refuses(old) is Reason.NOT_PERMITTED
    assert reads(new)
    assert refuses(old) is Reason.NOT_PERMITTED
    permit(lab, how, agent.private, key)
    assert reads(old)
    old.close()
    new.close()


@pytest.mark.usefixtures("as_before")
def test_an_agent_changes_its_key(lab: LabVM, agent: InstalledAgent) -> None:
    made = lab.run("python3", AGENT, "keygen", f"{KEYS}/agent.key.next").stdout.decode()
    key = PublicKey.from_text(made)
    prepared = connect(replace(agent.domain(), next_agent_key=key.text), private=agent.private)
    fresh = connect(
        replace(agent.domain(), agent_key=key.text, next_agent_key=agent.public.text), private=agent.private
    )
    assert reads(prepared)
    assert reads(fresh)
    assert {prepared.link.remote, fresh.link.remote} == {agent.public}
    lab.run("mv", f"{KEYS}/agent.key.next", f"{KEYS}/agent.key")
    lab.run("systemctl", "restart", "vmishim-agent")
    assert reads(prepared)
    assert reads(fresh)
    assert {prepared.link.remote, fresh.link.remote} == {key}
    prepared.close()
    fresh.close()
    with pytest.raises(RefusedError, match="agent's key has changed"):
        agent.connect()
    connect(replace(agent.domain(), agent_key=key.text), private=agent.private).close()


@pytest.mark.usefixtures("as_before")
def test_a_guest_makes_its_own_key_on_its_first_boot(lab: LabVM, agent: InstalledAgent) -> None:
    """By the unit that docs/deploy.md gives; the agent waits meanwhile, and is not a failed service."""
    lab.write("/run/systemd/system/vmishim-agent-key.service", recipe("vmishim-agent-key.service"))
    lab.run("rm", f"{KEYS}/agent.key")
    lab.run("systemctl", "daemon-reload")
    lab.run("systemctl", "restart", "vmishim-agent")
    assert status(lab) == ["active", f"waiting for {KEYS}/agent.key"]
    with pytest.raises(LinkError):
        agent.connect(timeout=2.0)
    lab.run("systemctl", "start", "vmishim-agent-key")
    lab.wait_until(lambda: status(lab) == ["active", ""], "the agent to find its key")
    shown = lab.run("journalctl", "-u", "vmishim-agent-key", "-o", "cat", "-g", "vmishim-public").stdout.decode()
    key = PublicKey.from_text(shown)
    assert key.text in lab.serial_tail()
    guest = connect(replace(agent.domain(), agent_key=key.text), private=agent.private)
    assert reads(guest)
    guest.close()
    # On a later boot the key is the same.
    lab.run("systemctl", "start", "vmishim-agent-key")
    shown = lab.run("journalctl", "-u", "vmishim-agent-key", "-o", "cat", "-g", "vmishim-public").stdout.decode()
    assert shown.splitlines() == [key.text, key.text]


def recipe(unit: str) -> bytes:
    """A unit of docs/deploy.md."""
    blocks = re.findall(r"^```ini\n(.*?)^```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL | re.MULTILINE)
    found: str
    (found,) = (block for block in blocks if block.startswith(f"# /etc/systemd/system/{unit}\n"))
    return found.encode()


def status(lab: LabVM) -> list[str]:
    """The agent's state, and what it says of it."""
    shown = lab.run("systemctl", "show", "vmishim-agent", "-p", "ActiveState", "-p", "StatusText").stdout.decode()
    properties = dict(line.split("=", 1) for line in shown.splitlines())
    return [properties["ActiveState"], properties["StatusText"]]
