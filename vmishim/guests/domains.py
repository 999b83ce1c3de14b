"""Names of guests and how to reach each: the entries of ``~/.config/vmishim/domains.toml``.

::

    [web-1]                                     # Libvmi("web-1")
    agent = "tcp://10.0.0.5:5555"               # endpoint of its agent
    agent_key = "vmishim-public-v1 ..."         # the agent's public key
    next_agent_key = "vmishim-public-v1 ..."    # the key it is changing to: either is accepted; optional
    key = "~/.config/vmishim/key"               # file of our private key
    timeout = 5.0                               # seconds for one answer; optional
    kernel_key = "vmishim-public-v1 ..."        # the guest's kernel must encrypt, with keys of this one; optional
    freeze = 5.0                                # pause_vm stops the monitored system, which goes on after this many
                                                # seconds without a request; optional
    id = 7                                      # Libvmi("7", INIT_DOMAINID); optional
    offsets = "~/web-1.json"                    # for a kernel without BTF: the output of `vmishim offsets`; optional

    [lab]
    ramfile = "/run/lab/ram"                    # an ordinary VM's memory-backend-file, or a dump (docs/dumps.md)
    symbols = "/run/lab/kallsyms"               # its symbols, if they can't be found in memory; optional

``[web-1.attestation]`` says what its machine must prove before anything is read: see
`vmishim.attestation.requirements`.

An entry may have both an agent and a RAM file: it is read by its agent, and ``vmishim compare`` compares with the file.

``VMISHIM_CONFIG`` names another file, ``XDG_CONFIG_HOME`` another folder for it.
"""

from __future__ import annotations

import logging
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmishim import files
from vmishim.endpoint import problem
from vmishim.errors import LibvmiError

if TYPE_CHECKING:
    from vmishim.attestation import Requirements

log = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Default seconds that the agent may take to answer."""


@dataclass(frozen=True)
class Domain:
    """One entry of ``domains.toml``."""

    name: str
    agent: str = ""
    """Endpoint of the agent."""
    agent_key: str = ""
    """The agent's public key, in the text form of ``vmishim keygen``."""
    next_agent_key: str = ""
    """The key that the agent is changing to, while it is being changed."""
    key: str = ""
    """Path of our private key."""
    timeout: float = TIMEOUT
    freeze: float = 0.0
    """Seconds without a request after which a system stopped by ``pause_vm`` goes on; 0: ``pause_vm`` does not stop it.
    The agent must have been started with ``--freeze``."""
    id: int = 0
    ramfile: str = ""
    """Path of the guest's memory: a RAM file or a dump, see docs/dumps.md."""
    symbols: str = ""
    """Path of a symbol map for ``ramfile``."""
    offsets: str = ""
    """Path of the output of ``vmishim offsets``, for a kernel without BTF."""
    kernel_key: str = ""
    """Public key whose holder made the keys with which the guest's kernel must encrypt; empty: it need not. See
    docs/security.md."""
    attestation: Requirements | None = None
    """What the agent's machine must prove; None requires nothing."""


def path() -> Path:
    """The file of names: ``VMISHIM_CONFIG``, or ``domains.toml`` in the user's configuration folder."""
    named = os.environ.get("VMISHIM_CONFIG")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "vmishim" / "domains.toml"


def load(file: Path | None = None) -> dict[str, Domain]:
    """All domains by name; empty if there is no file.

    :raises LibvmiError: the file cannot be read, another user can write or replace it, or an entry is wrong; the text
        says which and why
    """
    file = file or path()
    try:
        entries = tomllib.loads(files.read_trusted(file).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LibvmiError(f"NO_CONFIG: {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LibvmiError(f"NO_CONFIG: {file} cannot be read: {error}") from None
    return {name: checked(name, entry, file) for name, entry in entries.items()}


def checked(name: str, entry: Any, file: Path) -> Domain:
    """One entry of ``file``, as TOML has it. :raises LibvmiError: it is wrong; the text says why."""

    def wrong(what: str) -> LibvmiError:
        return LibvmiError(f"NO_CONFIG: {file}: [{name}] {what}")

    if not isinstance(entry, dict):
        raise wrong("is a value, not a table: write its settings below a line [" + name + "]")
    kinds: dict[str, Any] = {"timeout": (int, float), "freeze": (int, float), "id": int, "attestation": dict}
    known = {field.name for field in fields(Domain)} - {"name"}
    for key, value in entry.items():
        if key not in known:
            raise wrong(f"has an unknown setting {key!r}; known are {', '.join(sorted(known))}")
        if not isinstance(value, kinds.get(key, str)) or isinstance(value, bool):
            raise wrong(f"{key} cannot be {value!r}")
    if "attestation" in entry:
        from vmishim.attestation import Requirements

        try:
            entry = entry | {"attestation": Requirements.from_table(entry["attestation"])}
        except ValueError as error:
            raise LibvmiError(f"NO_CONFIG: {file}: [{name}.attestation] {error}") from None
    domain = Domain(name, **entry)
    if not domain.agent and not domain.ramfile:
        raise wrong('needs agent = "tcp://..." or ramfile = "..."')
    if domain.agent and (bad := problem(domain.agent)):
        raise wrong(f"agent: {domain.agent!r} {bad}")
    if domain.agent and not (domain.agent_key and domain.key):
        raise wrong(
            "needs agent_key (the agent's public key) and key (path of your private key); see 'vmishim enroll -h'"
        )
    if domain.timeout <= 0:
        raise wrong("timeout must be more than 0 seconds")
    if domain.attestation and not domain.agent:
        raise wrong("has attestation, but no agent that could provide a report: set agent")
    if domain.kernel_key and not domain.agent:
        raise wrong("has kernel_key, but no agent: set agent")
    if domain.freeze < 0 or (domain.freeze and not domain.agent):
        raise wrong("freeze must be more than 0 seconds, and needs an agent")
    return domain


def find(name: str, by_id: bool = False) -> Domain:
    """The entry of a domain.

    :param name: its name, or its ``id`` in digits
    Logs a warning if its requirements of attestation leave a known gap.

    :param by_id: ``name`` is an id
    :raises LibvmiError: ``VM_NOT_FOUND``, with the names that are known; ``NO_CONFIG``: the file is wrong
    """
    domains = load()
    named = {str(domain.id): domain for domain in domains.values() if domain.id} if by_id else domains
    if name not in named:
        what = "id" if by_id else "domain"
        known = f"known are {', '.join(sorted(named))}" if named else f"no {what} is known yet"
        raise LibvmiError(f"VM_NOT_FOUND: no {what} {name!r} in {path()}; {known}. 'vmishim enroll' adds one")
    domain = named[name]
    if domain.attestation and domain.attestation.warning:
        log.warning("%s: [%s.attestation] %s", path(), domain.name, domain.attestation.warning)
    return domain
