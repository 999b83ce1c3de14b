"""A guest that is read by its agent: link, profile and read-ahead put together as one `Target`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Literal, Self

from vmishim.client import Remote
from vmishim.errors import LinkError, RebootedError
from vmishim.guests.agent_profile import AgentProfile
from vmishim.guests.domains import Domain
from vmishim.kernel.offsets import Offsets
from vmishim.link import Link
from vmishim.memory.pages import Pages
from vmishim.memory.reader import ADDRESSES, Extent, MemoryReader
from vmishim.readahead.catalogue import KNOWN, find_lists
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.keys import PrivateKey, PublicKey, load_private
from vmishim.wire.messages import Chunk
from vmishim.wire.plan import Kind, Plan, Step, Take
from vmishim.wire.sealed import Unsealing

Strategy = Literal["batch", "page", "scalar"]
"""How memory is asked for: ``batch`` reads ahead; ``page`` fetches and keeps whole pages; ``scalar`` asks for each
read, as SEVmonitor does. The last two are there to be compared with."""
STRATEGIES: tuple[Strategy, ...] = ("batch", "page", "scalar")

# What LibVMI's get_offset, its examples and `describe` ask for, requested together in the first round trip.
SYMBOLS = (
    *("init_task", "modules", "tcp_hashinfo", "linux_banner", "_text", "init_mm", "max_pfn"),
    *("vmcoreinfo_data", "__start_BTF"),
)
MEMBERS = (
    "task_struct tasks",
    "task_struct mm",
    "task_struct pid",
    "task_struct tgid",
    "task_struct comm",
    "task_struct active_mm",
    "mm_struct pgd",
)


class AgentGuest:
    """One guest, by its agent. Implements `vmishim.guests.target.Target`, and `Agent`.

    :param name: the domain's name
    :param link: the connection to the agent; closed with the guest
    :param strategy: how memory is asked for
    :param offsets: offsets of members, for a kernel without BTF
    :param unsealing: for a guest whose kernel encrypts what it reads
    :param freeze: seconds; if more than 0, `hold` stops the monitored system, which goes on by itself after so many
        seconds without a request
    :raises LinkError: the agent can't be asked
    """

    def __init__(
        self,
        name: str,
        link: Link,
        strategy: Strategy = "batch",
        offsets: Offsets | None = None,
        unsealing: Unsealing | None = None,
        freeze: float = 0.0,
    ) -> None:
        self.name = name
        self.link = link
        self.remote = Remote(link.exchange, unsealing)
        symbols = {*SYMBOLS, *(shape.symbol for shape in KNOWN)}
        members = {*MEMBERS, *(member for shape in KNOWN for member in shape.members)}
        self.profile = AgentProfile(self.remote, symbols, members, offsets)
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.reader: MemoryReader = self.remote
        self._cache: ReadAhead | Pages | None = None
        self._freeze, self._frozen = freeze, False
        if strategy == "batch":
            self.reader = self._cache = ReadAhead(self.remote, find_lists(self.profile))
            self.words, self.cells = self._cache.words, self._cache.cells
        elif strategy == "page":
            self.reader = self._cache = Pages(self.remote)

    @property
    def agent(self) -> Self:
        """Itself: see `vmishim.guests.target.Agent`."""
        return self

    @property
    def version(self) -> str:
        """See `Agent.version`."""
        return self.profile.agent_version

    @property
    def sealed(self) -> bool:
        """See `Agent.sealed`."""
        return self.remote.sealed

    @property
    def direct(self) -> Remote:
        """See `Agent.direct`."""
        return self.remote

    def walk(self, plan: Plan, heads: Sequence[int] = ()) -> list[Chunk]:
        """See `Agent.walk`."""
        return self.remote.walk_whole(plan, heads)

    def learned(self, extents: Iterable[Extent]) -> None:
        """See `Agent.learned`; only ``batch`` has a read-ahead that takes it."""
        if isinstance(self._cache, ReadAhead):
            self._cache.learned(extents)

    def behind(self, start: int, count: int, offset: int, most: int) -> tuple[list[int], str] | None:
        """See `Agent.behind`."""
        if not isinstance(self._cache, ReadAhead):
            return None
        plan = Plan(start % ADDRESSES, Step.ONCE, (Take(0, offset, 8),), heads=count, max_nodes=most)
        words: list[int] = []
        missing = ""
        for chunk in self.remote.walk(plan):
            _, faults, _, kinds, values = plan.columns(chunk.bulk)
            there = [not fault and kind == Kind.NODE for fault, kind in zip(faults, kinds, strict=True)]
            words += compress(values, there)
            if chunk.truncated:
                missing = f"there are more than {most:,}"
            elif not all(there):
                missing = "some cannot be read"
        return words, missing

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate in one request, see `Remote.lookup`."""
        return self.remote.lookup(dtb, address)

    def hold(self) -> None:
        """See `Target.hold`. Bytes read are kept, except by ``scalar``, which keeps nothing, as SEVmonitor does. The
        monitored system is stopped if the guest was made with ``freeze``.

        :raises LinkError: it can't be stopped; then nothing is held
        """
        if self._freeze:
            self._stop()
        if self._cache is not None:
            self._cache.hold()

    def release(self) -> None:
        """See `Target.release`."""
        if self._cache is not None:
            self._cache.release()
        if self._frozen:
            # An agent that can't be asked ends the freeze by itself.
            with contextlib.suppress(LinkError):
                self.remote.thaw()
            self._frozen, self.link.pinned = False, 0

    def flush(self) -> None:
        """See `Target.flush`."""
        if self._cache is not None:
            self._cache.flush()

    def close(self) -> None:
        """See `Target.close`."""
        self.release()
        self.link.close()

    def _stop(self) -> None:
        """Freeze the monitored system, and pin the session that holds the freeze."""
        while True:
            session = self.link.handshakes
            self.remote.freeze(round(self._freeze * 1000))
            if session == self.link.handshakes:
                break  # otherwise the session was lost in between, and the freeze may belong to the lost one
        self._frozen, self.link.pinned = True, session


def _same_boot(name: str, boot_id: str, agent: PublicKey, ask: Callable[[bytes], bytes]) -> None:
    """Check that a new session is with the same boot of the kernel, whose symbols are where they were.

    :raises RebootedError: it is with another boot
    """
    if Remote(ask).hello([], []).get("boot_id") != boot_id:
        raise RebootedError(f"{name!r} was booted again, and its kernel is at other addresses now: make a new Libvmi")


def connect(domain: Domain, strategy: Strategy = "batch", private: PrivateKey | None = None) -> AgentGuest:
    """Connect to a guest's agent, as its entry says.

    :param strategy: how memory is asked for
    :param private: our key, in place of the file that the entry names
    :raises AttestationError: the agent's machine does not show what the entry requires
    :raises LinkError: nothing answers there, it has another key, or it does not permit ours; or a key of the entry
        cannot be read
    :raises LibvmiError: the entry's offsets cannot be read, or are those of another kernel
    """
    if private is None:
        private = load_private(Path(domain.key).expanduser())
    public = [PublicKey.from_text(text) for text in (domain.agent_key, domain.next_agent_key) if text]
    offsets = Offsets.read(Path(domain.offsets).expanduser()) if domain.offsets else None
    kernel_key = PublicKey.from_text(domain.kernel_key) if domain.kernel_key else None
    proofs = []
    if domain.attestation is not None:
        from vmishim.attestation import attest

        proofs.append(partial(attest, domain.attestation, kernel_key=kernel_key))
    link = Link(domain.agent, private, public, domain.timeout, proofs)
    try:
        guest = AgentGuest(domain.name, link, strategy, offsets, Unsealing(private, kernel_key), domain.freeze)
        link.proofs.append(partial(_same_boot, domain.name, guest.profile.boot_id))
        return guest
    except BaseException:
        link.close()
        raise
