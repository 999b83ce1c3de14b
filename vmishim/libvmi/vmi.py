"""The class `Libvmi`: a guest is opened, held still and closed here. Its calls are in the modules it is made of."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmishim.endpoint import is_endpoint
from vmishim.errors import FAILURE, LibvmiError
from vmishim.guests import resolver
from vmishim.guests.domains import Domain
from vmishim.guests.target import Target
from vmishim.libvmi import config as configuration
from vmishim.libvmi.caches import FOREVER, Caches
from vmishim.libvmi.config import Config, ConfigError
from vmishim.libvmi.constants import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    VMIOS,
    LibvmiInitError,
    PageMode,
    VMIConfig,
    VMIInitData,
    VMIMode,
    VMIStatus,
)
from vmishim.libvmi.getters import Getters
from vmishim.libvmi.reads import Reads
from vmishim.libvmi.refusals import Refusals
from vmishim.libvmi.values import unsigned
from vmishim.libvmi.writes import Writes

if TYPE_CHECKING:
    from vmishim.inject import InjectedProgram


class Libvmi(Reads, Writes, Caches, Getters, Refusals):
    """One guest, as LibVMI's Python bindings show it. Use it in a ``with`` statement, or call ``destroy``.

    :param domain: name of the guest, from ``domains.toml`` (see ``vmishim.guests.domains``)
    :param init_flags: ``INIT_DOMAINNAME``, or ``INIT_DOMAINID`` if ``domain`` is an ``id`` of ``domains.toml`` in
        digits; with ``INIT_EVENTS``, refused
    :param init_data: ``VMIInitData`` to strings; a ``KVMI_SOCKET`` such as ``tcp://10.0.0.5:5555`` replaces the
        agent's endpoint
    :param config_mode: what ``config`` is; none is needed, a given one wins where it says something
    :param config: see ``VMIConfig``
    :param mode: accepted but not needed: the domain's entry says how it is reached
    :param partial: only physical memory until ``init_paging`` and ``init_os`` are called
    :raises LibvmiError: ``VM_NOT_FOUND``: no such domain; ``NO_CONFIG``, ``NO_CONFIG_ENTRY``, ``OS``: the configuration
        given cannot be used; ``EVENTS``: events were asked for
    :raises LinkError: the agent could not be reached, or is not the one that is enrolled

    Several threads can share one ``Libvmi``. Source: ``vmi_init_complete``, ``vmi_init``.
    """

    __slots__ = ()

    def __init__(
        self,
        domain: str,
        init_flags: int = INIT_DOMAINNAME,
        init_data: Mapping[VMIInitData, str] | None = None,
        config_mode: VMIConfig = VMIConfig.GLOBAL_FILE_ENTRY,
        config: Any = None,
        mode: VMIMode | None = None,
        partial: bool = False,
    ) -> None:
        found = _find(domain, init_flags, init_data, mode, partial)
        given = None if partial else configuration.read(config_mode, config, domain)
        endpoint = (init_data or {}).get(VMIInitData.KVMI_SOCKET, "")
        if found.agent and is_endpoint(endpoint):
            found = replace(found, agent=endpoint)
        target = resolver.current().reach(found)
        try:
            self._open(target, given, found.id, initialised=not partial)
        except BaseException:
            target.close()
            raise

    @classmethod
    def over(cls, target: Target, config: Config | None = None) -> Libvmi:
        """A ``Libvmi`` of a target that you have opened; ``destroy`` closes it. Not part of LibVMI.

        :param config: a configuration, which wins over what the guest says
        """
        vmi = cls.__new__(cls)
        vmi._open(target, config)
        return vmi

    def _open(self, target: Target, given: Config | None, vmid: int = 0, initialised: bool = True) -> None:
        super()._open(target, given, vmid, initialised)
        _living.add(self)

    def __enter__(self) -> Libvmi:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        return f"<Libvmi of {self._target.name!r}, Linux {self._target.profile.release}>"

    def init_paging(self, flags: int) -> PageMode:
        """After a partial init: make page tables usable (``pagetable_lookup`` and ``PROCESS_DTB``).

        :param flags: not used
        :returns: the guest's page mode

        Source: ``vmi_init_paging``.
        """
        unsigned(flags)
        self._paging = True
        return PageMode.IA32E

    def init_os(self, config_mode: VMIConfig = VMIConfig.GLOBAL_FILE_ENTRY, config: Any = None) -> tuple[VMIOS, int]:
        """After a partial init: make processes, symbols and kernel addresses usable.

        :param config_mode: what ``config`` is, as for ``Libvmi`` itself
        :param config: a configuration, which wins over what the guest says
        :returns: (operating system, value of a ``LibvmiInitError``); if the configuration given cannot be used,
            ``UNKNOWN`` and the reason, with a warning that says more
        :raises LinkError: the guest could not be asked

        Source: ``vmi_init_os``.
        """
        try:
            self._configure(configuration.read(config_mode, config, self._target.name))
        except ConfigError as error:
            warnings.warn(str(error), stacklevel=2)
            return VMIOS.UNKNOWN, error.reason.value
        self._initialise()
        return VMIOS.LINUX, LibvmiInitError.NONE.value

    def destroy(self) -> None:
        """End every pause and close the connection to the guest. A second call does nothing.

        Source: ``vmi_destroy``.
        """
        if self.vmi is None:
            return
        self.vmi = self.opaque_vmi = None
        self._cells, self._words = {}, {}
        with self._lock:
            held, self._holds = self._holds, 0
        try:
            if held:
                self._target.release()
        finally:
            self._target.close()

    def pause_vm(self) -> None:
        """Hold the guest still: until ``resume_vm``, everything read is as of one hold. Pauses nest.

        The guest runs on, unless its entry in ``domains.toml`` says ``freeze``: then its agent stops the monitored
        system, see docs/freshness.md.

        :raises LinkError: the guest could not be asked, or its agent does not stop it; nothing is paused then

        Source: ``vmi_pause_vm``.
        """
        with self._lock:
            if self._holds == 0:
                self._dtbs = {pid: kept for pid, kept in self._dtbs.items() if kept[1] == FOREVER}
                self._held_pages = {}
                self._target.hold()
            self._holds += 1

    def resume_vm(self) -> None:
        """End one ``pause_vm``; the last one lets the guest go on. Without a pause, nothing happens.

        :raises LinkError: the guest could not be asked

        Source: ``vmi_resume_vm``.
        """
        with self._lock:
            if self._holds:
                self._holds -= 1
                if self._holds == 0:
                    self._target.release()

    def inject(
        self,
        program: str | bytes | Path,
        *,
        name: str = "",
        headers: Path | None = None,
        vmlinux: Path | None = None,
    ) -> InjectedProgram:
        """Load an eBPF program of your own into the guest's agent; ``run()`` on the result gives what it read.

        Not part of LibVMI: see ``docs/injection.md``, and `vmishim.inject.inject` for parameters and errors.
        """
        from vmishim.inject import inject  # it needs a compiler, which scripts that only read can do without

        return inject(self._target, program, name=name, headers=headers, vmlinux=vmlinux)


def check(status: int | VMIStatus, error: str = FAILURE) -> None:
    """Raise ``LibvmiError(error)`` unless ``status`` is a success.

    Source: ``libvmi.libvmi.check`` of the Python bindings.
    """
    if VMIStatus(status) is not VMIStatus.SUCCESS:
        raise LibvmiError(error)


@contextmanager
def pause(vmi: Libvmi) -> Iterator[None]:
    """Hold the guest still during a ``with`` block, and let it go on if the block raises, too.

    Source: ``pause`` in ``examples/utils.py`` of the Python bindings, which most scripts have a copy of.
    """
    vmi.pause_vm()
    try:
        yield
    finally:
        vmi.resume_vm()


def _find(
    domain: str, init_flags: int, init_data: Mapping[VMIInitData, str] | None, mode: VMIMode | None, partial: bool
) -> Domain:
    """The entry of a domain. Wrong arguments raise what the genuine bindings raise."""
    for kind, value in (init_data or {}).items():
        if not isinstance(kind.value, int) or not isinstance(value, str):
            raise RuntimeError("Passing anything else than a string as init_data value is not implemented")
    if partial and mode is not None and not isinstance(mode, VMIMode):
        raise RuntimeError("mode is not an instance of VMIMode")
    if not init_flags & (INIT_DOMAINNAME | INIT_DOMAINID):
        if partial:
            raise RuntimeError("Partial init, init_flags must be either INIT_DOMAINAME or INIT_DOMAINID")
        raise TypeError("init_flags must hold INIT_DOMAINNAME or INIT_DOMAINID")
    domain.encode()
    if init_flags & INIT_EVENTS:
        raise LibvmiError("EVENTS: vmishim has no events; leave out INIT_EVENTS")
    return resolver.current().find(domain, not init_flags & INIT_DOMAINNAME)


_living: weakref.WeakSet[Libvmi] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: another thread of the parent may have been about to pause."""
    for vmi in list(_living):
        vmi._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
