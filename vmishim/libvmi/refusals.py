"""What needs a hypervisor, or would change the guest: registers, events, second-level page tables.

Each call checks its arguments as LibVMI's does, then fails as LibVMI's file driver does.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from vmishim.errors import failure
from vmishim.libvmi.values import Registers, unsigned
from vmishim.libvmi.writes import READ_ONLY

NO_EVENTS = "events need a hypervisor's help, and an agent in the guest has none: look again and again instead"
NO_REGISTERS = "an agent in the guest cannot read a virtual CPU's registers; get_vcpureg knows CR3"
NO_SLAT = "second-level page tables are the hypervisor's, and an agent in the guest cannot see them"


class Refusals:
    """The calls that always fail, but for the writes."""

    __slots__ = ()

    def request_page_fault(self, vcpu: int, vaddr: int, error_code: int) -> NoReturn:
        """Refused: vmishim does not change the guest.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_request_page_fault``.
        """
        unsigned(vcpu), unsigned(vaddr), unsigned(error_code)
        raise failure(READ_ONLY)

    def get_vcpuregs(self, vcpu: int) -> Registers:
        """Refused: no agent knows another CPU's registers.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI's file driver does

        Source: ``vmi_get_vcpuregs``.
        """
        unsigned(vcpu)
        raise failure(NO_REGISTERS)

    def set_vcpureg(self, value: int, reg: int, vcpu: int) -> NoReturn:
        """Refused: vmishim does not change the guest.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_set_vcpureg``.
        """
        unsigned(value), unsigned(reg), unsigned(vcpu)
        raise failure(READ_ONLY)

    def set_vcpuregs(self, regs: Registers, vcpu: int) -> NoReturn:
        """Refused: vmishim does not change the guest.

        :raises LibvmiError: ``VMI_FAILURE``, always

        Source: ``vmi_set_vcpuregs``.
        """
        operator.attrgetter("cffi_regs")(regs), unsigned(vcpu)
        raise failure(READ_ONLY)

    def register_event(self, event: Any) -> NoReturn:
        """Refused: there are no events without a hypervisor's help.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI without ``INIT_EVENTS``

        Source: ``vmi_register_event``.
        """
        event.vmi = self
        event.to_cffi()
        raise failure(NO_EVENTS)

    def clear_event(self, event: Any) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_clear_event``."""
        event.to_cffi()
        raise failure(NO_EVENTS)

    def listen(self, timeout: int) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_events_listen``."""
        unsigned(timeout, 32)
        raise failure(NO_EVENTS)

    def are_events_pending(self) -> int:
        """-1: there are no events. Source: ``vmi_are_events_pending``."""
        return -1

    def toggle_single_step_vcpu(self, event: Any, vcpu: int, enabled: bool) -> NoReturn:
        """Refused, as ``register_event``. Source: ``vmi_toggle_single_step_vcpu``."""
        event.to_cffi()
        unsigned(vcpu, 32)
        raise failure(NO_EVENTS)

    def slat_get_domain_state(self) -> NoReturn:
        """Refused: second-level page tables are the hypervisor's.

        :raises LibvmiError: ``VMI_FAILURE``, always, as LibVMI's file driver does

        Source: ``vmi_slat_get_domain_state``.
        """
        raise failure(NO_SLAT)

    def slat_create(self) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_create``."""
        raise failure(NO_SLAT)

    def slat_destroy(self, slat_idx: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_destroy``."""
        unsigned(slat_idx, 16)
        raise failure(NO_SLAT)

    def slat_switch(self, slat_idx: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_switch``."""
        unsigned(slat_idx, 16)
        raise failure(NO_SLAT)

    def slat_change_gfn(self, slat_idx: int, old_gfn: int, new_gfn: int) -> NoReturn:
        """Refused, as ``slat_get_domain_state``. Source: ``vmi_slat_change_gfn``."""
        unsigned(slat_idx, 16), unsigned(old_gfn), unsigned(new_gfn)
        raise failure(NO_SLAT)
