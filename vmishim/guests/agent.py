"""A guest reached through its agent: the `Target` that puts link, profile and read-ahead together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from vmishim.client import Remote
from vmishim.errors import LinkError, RebootedError
from vmishim.guests.agent_profile import AgentProfile
from vmishim.kernel.offsets import Offsets
from vmishim.link import Link
from vmishim.memory.pages import Pages
from vmishim.memory.reader import Extent, MemoryReader
from vmishim.readahead.catalogue import KNOWN, found
from vmishim.readahead.readahead import ReadAhead
from vmishim.wire.keys import PrivateKey, PublicKey
from vmishim.wire.sealed import Unsealing

if TYPE_CHECKING:
    from vmishim.attestation import Requirements

Strategy = Literal["batch", "page", "scalar"]
"""How memory is asked for: ``batch`` reads ahead; ``page`` fetches and keeps whole pages; ``scalar`` asks for each
read, as SEVmonitor does. The last two are there to be compared with."""
STRATEGIES: tuple[Strategy, ...] = ("batch", "page", "scalar")

# What LibVMI's get_offset and its examples ask for, so that it comes with the first reply.
SYMBOLS = ("init_task", "modules", "tcp_hashinfo", "linux_banner", "_text", "init_mm")
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
    """One guest, by its agent. Implements `vmishim.guests.target.Target`.

    :param name: the domain's name
    :param link: the connection to the agent; closed with the guest
    :param strategy: how memory is asked for
    :param offsets: where members are that the kernel does not tell for lack of BTF
    :param unsealing: for a guest whose kernel encrypts by itself
    :param freeze: seconds; if they are more than 0, `hold` stops the monitored system, which goes on by itself when
        this guest has not been asked for so long
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
            self.reader = self._cache = ReadAhead(self.remote, found(self.profile))
            self.words, self.cells = self._cache.words, self._cache.cells
        elif strategy == "page":
            self.reader = self._cache = Pages(self.remote)

    def learned(self, extents: Iterable[Extent]) -> None:
        """Know memory that came another way, from an injected program; see `ReadAhead.learned`."""
        if isinstance(self._cache, ReadAhead):
            self._cache.learned(extents)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate in one request, see `Remote.lookup`."""
        return self.remote.lookup(dtb, address)

    def hold(self) -> None:
        """See `Target.hold`. What is read is kept; ``scalar`` keeps nothing, as SEVmonitor does. Whether the monitored
        system runs on, ``freeze`` has said.

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
            # An agent that can't be asked needs no telling: it lets go by itself.
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
        """Freeze, and pin the session that holds the freeze."""
        while True:
            session = self.link.handshakes
            self.remote.freeze(round(self._freeze * 1000))
            if session == self.link.handshakes:
                break  # else it was lost meanwhile, and the freeze may be the lost one's
        self._frozen, self.link.pinned = True, session


def _same_boot(name: str, boot_id: str, agent: PublicKey, ask: Callable[[bytes], bytes]) -> None:
    """A session after the first is with the same boot of the kernel, which has its symbols where they were.

    :raises RebootedError: it is another
    """
    if Remote(ask).hello([], []).get("boot_id") != boot_id:
        raise RebootedError(f"{name!r} was booted anew, and its kernel lies elsewhere now: make a new Libvmi")


def connect(
    name: str,
    endpoint: str,
    private: PrivateKey,
    public: PublicKey | Sequence[PublicKey],
    timeout: float = 5.0,
    strategy: Strategy = "batch",
    offsets: Offsets | None = None,
    requirements: Requirements | None = None,
    kernel_key: PublicKey | None = None,
    freeze: float = 0.0,
) -> AgentGuest:
    """Connect to an agent.

    :param endpoint: ZeroMQ's, ``tcp://HOST:PORT`` or ``ipc://PATH``
    :param private: our key, which the agent must permit
    :param public: the agent's key, or several while it is being changed
    :param timeout: seconds one request may take
    :param strategy: how memory is asked for
    :param offsets: where members are that the kernel does not tell for lack of BTF
    :param requirements: what the agent's machine must show in each session; a report of AMD SEV-SNP is asked for then
    :param kernel_key: the guest's kernel must encrypt, by keys that the holder of this one made
    :param freeze: seconds, see `AgentGuest`
    :raises AttestationError: it does not show that
    :raises LinkError: nothing answers there, it has another key, or ours is not permitted
    """
    proofs = []
    if requirements is not None:
        from vmishim.attestation import attest

        proofs.append(partial(attest, requirements))
    link = Link(endpoint, private, public, timeout, proofs)
    try:
        guest = AgentGuest(name, link, strategy, offsets, Unsealing(private, kernel_key), freeze)
        link.proofs.append(partial(_same_boot, name, guest.profile.boot_id))
        return guest
    except BaseException:
        link.close()
        raise
