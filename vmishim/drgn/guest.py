"""A guest as a ``drgn.Program``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import drgn
except ImportError as error:
    raise ImportError(f"drgn cannot be imported ({error}); it comes with pip install 'vmishim[drgn]'") from None

from vmishim.drgn.finders import Finders
from vmishim.drgn.memory import Segments
from vmishim.drgn.plans import register_plans
from vmishim.errors import LibvmiError
from vmishim.guests.description import describe
from vmishim.guests.resolver import Resolver, current
from vmishim.guests.target import Target, direct
from vmishim.memory.lifetimes import STALE
from vmishim.memory.pagecache import PageCache

CONFIG = "vmishim"
"""Where ``Program.config`` has the `Guest`."""


class Guest:
    """One guest, open for drgn. Use `program` for the usual case.

    :param target: the guest; stays the caller's to close
    :param lifetime: seconds for which memory that was read may be used again (docs/freshness.md)
    :ivar prog: the ``drgn.Program``
    :ivar cache: its memory
    :raises LibvmiError: the guest's kernel has no BTF or no symbol table, or leaves its variables out of it
    :raises LinkError: the guest could not be asked
    """

    def __init__(self, target: Target, lifetime: float = STALE) -> None:
        if not hasattr(drgn.Program, "set_linux_kernel_custom"):
            raise LibvmiError(f"drgn {drgn.__version__} cannot read a guest: pip install -U 'vmishim[drgn]'")
        self.target = target
        self.kernel = describe(target)
        if not self.kernel.has_variables:
            raise LibvmiError(
                f"OS: the symbol table of Linux {self.kernel.release} leaves out its variables, so drgn finds none: "
                "build the kernel with CONFIG_KALLSYMS_ALL, as distributions do"
            )
        self.cache = PageCache(direct(target), lifetime=lifetime)
        self.prog = prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
        profile = target.profile
        prog.set_linux_kernel_custom(self.kernel.vmcoreinfo, True)
        # After it, since that adds a segment whose addresses are translated by page tables. The last one counts.
        Segments(self.cache, profile.page_offset, profile.memory_size).register(prog)
        self._symbols: tuple[float, drgn.SymbolIndex] | None = None
        Finders(prog, self.kernel, self._module_symbols).register()
        if target.agent is not None:
            register_plans(self.cache, target.agent, profile, self.kernel.types)
        prog.config[CONFIG] = self

    def refresh(self) -> None:
        """Forget all memory that was read: what is read from here on is asked of the guest."""
        self.cache.refresh()
        self._symbols = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Everything that is read within the block is kept until its end, and of one instant if the guest's entry says
        ``freeze`` (docs/freshness.md).

        :raises LinkError: the guest could not be asked, or its agent does not stop it
        """
        self.target.hold()
        self.cache.hold()
        try:
            yield
        finally:
            self.cache.release()
            self.target.release()

    def _module_symbols(self) -> drgn.SymbolIndex:
        from drgn.helpers.linux.kallsyms import load_module_kallsyms

        now = time.monotonic()
        if self._symbols is None or now - self._symbols[0] >= self.cache.lifetime:
            self._symbols = now, load_module_kallsyms(self.prog)
        return self._symbols[1]


def program(domain: str, lifetime: float = STALE, *, resolver: Resolver | None = None) -> drgn.Program:
    """A guest as a ``drgn.Program``, for drgn's helpers and scripts. It stays connected as long as the program exists.

    :param domain: the guest's name
    :param lifetime: seconds for which memory that was read may be used again; ``math.inf``: until `refresh`
    :param resolver: finds and opens the guest (default: as ``Libvmi(domain)`` would)
    :raises LibvmiError: no such domain; or its kernel lacks what drgn needs, see `Guest`
    :raises LinkError: the guest's agent could not be reached
    """
    resolver = resolver or current()
    target = resolver.reach(resolver.find(domain, False))
    try:
        return Guest(target, lifetime).prog
    except BaseException:
        target.close()
        raise


def guest_of(prog: drgn.Program) -> Guest:
    """The guest of a program that `program` opened. :raises ValueError: it is another program"""
    guest = prog.config.get(CONFIG)
    if not isinstance(guest, Guest):
        raise ValueError("this program was not opened by vmishim.drgn.program")
    return guest


def refresh(prog: drgn.Program) -> None:
    """Forget all memory that a program has read of its guest. :raises ValueError: it is another program"""
    guest_of(prog).refresh()


@contextmanager
def held(prog: drgn.Program) -> Iterator[None]:
    """See `Guest.held`. :raises ValueError: it is another program"""
    with guest_of(prog).held():
        yield


def close(prog: drgn.Program) -> None:
    """Let go of a program's guest: further reads raise ``LinkError``. :raises ValueError: it is another program"""
    guest = guest_of(prog)
    guest.refresh()
    guest.target.close()
