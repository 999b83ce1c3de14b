"""The profile of a guest's kernel, as its agent tells it; remembered."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from vmishim.client import Remote, checked_facts
from vmishim.errors import LibvmiError
from vmishim.kernel.offsets import Offsets
from vmishim.kernel.profile import Member

NAMES_MAX = 65536
"""Most addresses whose symbols are remembered; the oldest is dropped."""


class AgentProfile:
    """`vmishim.kernel.profile.Profile` of an agent's kernel.

    :param symbols: names to ask for in the first request, because they will be needed
    :param members: the same, as ``"struct member"``, or ``"struct"`` for its size
    :param offsets: offsets of members, for a kernel without BTF
    :raises LinkError: the agent can't be asked, or its kernel does not encrypt as it must
    :raises LibvmiError: ``offsets`` are those of another kernel
    """

    def __init__(
        self,
        remote: Remote,
        symbols: Iterable[str] = (),
        members: Iterable[str] = (),
        offsets: Offsets | None = None,
    ) -> None:
        self._remote = remote
        names, wanted = sorted(set(symbols)), sorted(set(members))
        facts = checked_facts(remote.hello(names, wanted))
        self._symbols: dict[str, int | None] = dict(zip(names, facts["symbols"], strict=True))
        self._names: dict[int, str | None] = {}
        self._members: dict[str, list[int] | None] = dict(zip(wanted, facts["members"], strict=True))
        self.release: str = facts["release"]
        self.hostname: str = facts["hostname"]
        self.agent_version: str = facts["version"]
        self.boot_id: str = facts["boot_id"]
        self.page_offset: int = facts["page_offset"]
        self.kaslr_offset: int = facts["kaslr_offset"]
        self.memory_size: int = facts["memory_size"]
        self.vcpus: int = facts["vcpus"]
        self.levels: int = facts["levels"]
        self.self_check: str = facts.get("self_check", "")
        if self.self_check not in ("", "ok"):
            warnings.warn(
                f"the agent on {self.hostname} found its programs or maps changed, so another process there has root's "
                f"rights, and answers may be forged: {self.self_check}",
                stacklevel=2,
            )
        self.kernel_encryption: bool = facts.get("kernel_encryption") is True
        self._offsets = offsets.members if offsets else {}
        if offsets and offsets.release != self.release:
            raise LibvmiError(f"the offsets are for Linux {offsets.release}, but the guest runs {self.release}")

    def symbol(self, name: str) -> int:
        """See `Profile.symbol`."""
        if name not in self._symbols:
            self._symbols[name] = self._remote.symbols([name])[0]
        address = self._symbols[name]
        if address is None:
            raise KeyError(f"Linux {self.release} has no symbol {name!r}")
        return address

    def symbol_at(self, address: int) -> str:
        """See `Profile.symbol_at`."""
        if address not in self._names:
            if len(self._names) >= NAMES_MAX:
                del self._names[next(iter(self._names))]
            self._names[address] = self._remote.names([address])[0]
        name = self._names[address]
        if name is None:
            raise KeyError(f"no symbol starts at {address:#x}")
        return name

    def member(self, struct: str, member: str) -> Member:
        """See `Profile.member`."""
        return Member(*self._offset_and_size(f"{struct} {member}"))

    def size(self, struct: str) -> int:
        """See `Profile.size`."""
        return self._offset_and_size(struct)[1]

    def _offset_and_size(self, name: str) -> list[int]:
        if name not in self._members:
            self._members[name] = self._remote.members([name])[0]
        found = self._members[name] or self._offsets.get(name)
        if found is None:
            raise KeyError(f"Linux {self.release} has no {name.replace(' ', '.')!r}, or no BTF to find it in")
        return found

    def ask(self, symbols: Iterable[str], members: Iterable[str]) -> None:
        """Ask for symbols and members, as in the constructor, that are not known yet: one request for each kind.

        :raises LinkError: the agent can't be asked
        """
        names = sorted(set(symbols) - self._symbols.keys())
        wanted = sorted(set(members) - self._members.keys())
        if names:
            self._symbols.update(zip(names, self._remote.symbols(names), strict=True))
        if wanted:
            self._members.update(zip(wanted, self._remote.members(wanted), strict=True))

    def ask_names(self, addresses: Iterable[int]) -> None:
        """Ask for the names of the symbols that start at addresses, in one request.

        :raises LinkError: the agent can't be asked
        """
        wanted = [address for address in addresses if address not in self._names][:NAMES_MAX]
        if wanted:
            self._names.update(zip(wanted, self._remote.names(wanted), strict=True))

    def forget(self) -> None:
        """See `Profile.forget`."""
        self._symbols.clear()
        self._names.clear()
