"""LibVMI's events, as objects that scripts can make; ``Libvmi.register_event`` refuses them: they need a hypervisor.

Source: ``libvmi.event`` of the libvmi 3.7.1 Python bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from vmishim.libvmi.constants import (
    EVENTS_VERSION,
    MSR,
    EventResponse,
    EventType,
    InterruptType,
    MemAccess,
    RegAccess,
    X86Reg,
)

__all__ = [
    "EVENTS_VERSION",
    "DebugEvent",
    "Event",
    "EventResponse",
    "EventType",
    "IntEvent",
    "InterruptType",
    "MemAccess",
    "MemEvent",
    "RegAccess",
    "RegEvent",
    "SingleStepEvent",
]

Callback = Callable[[Any, Any], EventResponse | None]
"""``callback(vmi, event)``; it will not be called."""


class Event:
    """What all events have in common.

    :param callback: would be called with ``(vmi, event)``
    :param slat_id: second-level page table it applies to
    :param data: anything, for the callback
    """

    version = EVENTS_VERSION
    type: EventType | None = None

    def __init__(self, callback: Callback, slat_id: int = 0, data: Any = None) -> None:
        self.slat_id = slat_id
        self.data = data
        self.py_callback = callback
        self.vmi: Any = None
        self.generic_data = {"event": self}
        self.generic_handle: Any = None
        # What a hypervisor would fill in. Nothing ever happens, so all of it is 0.
        self.cffi_event = SimpleNamespace(
            vcpu_id=0, gfn=0, gla=0, offset=0, out_access=0, gptw=0, gla_valid=0, value=0, previous=0, msr=0
        )

    @property
    def vcpu_id(self) -> int:
        """The virtual CPU it happened on."""
        return int(self.cffi_event.vcpu_id)

    @property
    def x86_regs(self) -> None:
        """Registers at the time: None, because the event did not happen."""
        return

    def to_cffi(self) -> Any:
        """The event in C. There is no C library here, so this is a plain object."""
        return self.cffi_event

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return {
            "version": self.version,
            "type": self.type.name if self.type else None,
            "slat_id": self.slat_id,
            "data": self.data,
            "vcpu_id": self.vcpu_id,
        }


class _PlacedEvent(Event):
    """An event that happens at an address."""

    @property
    def gfn(self) -> int:
        """Guest frame number."""
        return int(self.cffi_event.gfn)

    @property
    def gla(self) -> int:
        """Guest linear address."""
        return int(self.cffi_event.gla)

    @property
    def offset(self) -> int:
        """Bytes from the start of the frame."""
        return int(self.cffi_event.offset)


class MemEvent(_PlacedEvent):
    """An access to memory.

    :param in_access: kinds of access to watch
    :param gfn: guest frame to watch
    :param generic: watch all frames
    """

    type = EventType.MEMORY

    def __init__(
        self,
        in_access: MemAccess,
        callback: Callback,
        gfn: int = 0,
        generic: bool = False,
        slat_id: int = 0,
        data: Any = None,
    ) -> None:
        super().__init__(callback, slat_id, data)
        self.in_access = in_access
        self.generic = generic
        self._gfn = gfn

    @property
    def out_access(self) -> MemAccess:
        """The access that happened."""
        return MemAccess(self.cffi_event.out_access)

    @property
    def gptw(self) -> bool:
        """Whether it happened in a page walk."""
        return bool(self.cffi_event.gptw)

    @property
    def gla_valid(self) -> bool:
        """Whether ``gla`` is known."""
        return bool(self.cffi_event.gla_valid)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return super().to_dict() | {
            "gfn": self.gfn,
            "in_access": self.in_access.name,
            "out_access": self.out_access.name,
            "gptw": self.gptw,
            "gla_valid": self.gla_valid,
            "gla": hex(self.gla),
            "offset": hex(self.offset),
        }


class SingleStepEvent(_PlacedEvent):
    """One instruction.

    :param vcpus: numbers of the virtual CPUs
    :param enable: whether stepping starts at once
    """

    type = EventType.SINGLESTEP

    def __init__(
        self, vcpus: Iterable[int], callback: Callback, enable: bool = True, slat_id: int = 0, data: Any = None
    ) -> None:
        super().__init__(callback, slat_id, data)
        self.vcpus = 0
        for vcpu in vcpus:
            self.vcpus |= 1 << vcpu
        self.enable = enable

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return super().to_dict() | {
            "vcpus": self.vcpus,
            "enable": self.enable,
            "gla": hex(self.gla),
            "gfn": hex(self.gfn),
            "offset": hex(self.offset),
        }


class RegEvent(Event):
    """An access to a register.

    :param register: the register
    :param in_access: kinds of access to watch
    :param equal: only when this value is written
    """

    type = EventType.REGISTER

    def __init__(
        self,
        register: X86Reg | MSR,
        in_access: RegAccess,
        callback: Callback,
        equal: int | None = None,
        slat_id: int = 0,
        data: Any = None,
    ) -> None:
        super().__init__(callback, slat_id, data)
        self.register = register
        self.in_access = in_access
        self.equal = equal or 0

    @property
    def value(self) -> int:
        """The value written."""
        return int(self.cffi_event.value)

    @value.setter
    def value(self, v: int) -> None:
        self.cffi_event.value = v

    @property
    def previous(self) -> int:
        """The value before."""
        return int(self.cffi_event.previous)

    @property
    def msr(self) -> int:
        """Which model-specific register."""
        return int(self.cffi_event.msr)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return super().to_dict() | {
            "in_access": self.in_access.name,
            "out_access": RegAccess(self.cffi_event.out_access).name,
            "value": hex(self.value),
            "previous": hex(self.previous),
            "msr": hex(self.msr),
        }


class _Reinjected(_PlacedEvent):
    """An event that can be handed on to the guest."""

    def __init__(self, callback: Callback, reinject: int, slat_id: int, data: Any) -> None:
        super().__init__(callback, slat_id, data)
        self.reinject = reinject


class IntEvent(_Reinjected):
    """An interrupt.

    :param intr: which
    :param reinject: whether the guest gets it too; -1: the callback decides
    """

    type = EventType.INTERRUPT

    def __init__(
        self,
        callback: Callback,
        intr: InterruptType = InterruptType.INT3,
        reinject: int = -1,
        slat_id: int = 0,
        data: Any = None,
    ) -> None:
        super().__init__(callback, reinject, slat_id, data)
        self.intr = intr

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return super().to_dict() | {
            "intr": self.intr.name,
            "reinject": self.reinject,
            "gla": hex(self.gla),
            "gfn": hex(self.gfn),
            "offset": hex(self.offset),
        }


class DebugEvent(_Reinjected):
    """A debug exception.

    :param reinject: whether the guest gets it too; -1: the callback decides
    """

    type = EventType.DEBUG_EXCEPTION

    def __init__(self, callback: Callback, reinject: int = -1, slat_id: int = 0, data: Any = None) -> None:
        super().__init__(callback, reinject, slat_id, data)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the event, by name."""
        return super().to_dict() | {
            "gla": hex(self.gla),
            "gfn": hex(self.gfn),
            "offset": hex(self.offset),
            "reinject": self.reinject,
        }
