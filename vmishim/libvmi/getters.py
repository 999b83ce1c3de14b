"""What LibVMI tells of a guest: its name, kernel, memory and CPUs."""

from __future__ import annotations

from typing import Any

from vmishim.errors import FaultError, LibvmiError, UnknownNameError, failure
from vmishim.guests import resolver
from vmishim.libvmi.config import MEMBERS
from vmishim.libvmi.constants import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    VMIOS,
    PageMode,
    VMIArch,
    VMIMode,
    VMIWinVer,
    X86Reg,
)
from vmishim.libvmi.opened import NO_OS
from vmishim.libvmi.symbols import Symbols
from vmishim.libvmi.values import unsigned
from vmishim.memory.reader import PAGE_SIZE

_PHYSICAL_END = 1 << 52
"""No physical address is above this, whatever a broken kernel says."""


class Getters(Symbols):
    """The calls ``get_...`` that read no memory."""

    __slots__ = ()

    def get_library_arch(self) -> VMIArch:
        """What the library is for: x86-64 guests. Source: ``vmi_get_library_arch``."""
        return VMIArch.VMI_ARCH_X86_64

    def get_rekall_path(self) -> str | None:
        """Path of the JSON profile in use, None without one. Source: ``vmi_get_rekall_path``."""
        return self._json_profile

    def get_name(self) -> str:
        """The domain's name. Source: ``vmi_get_name``."""
        return self._target.name

    def get_vmid(self) -> int:
        """The domain's number: ``id`` of ``domains.toml``, 0 without one. Source: ``vmi_get_vmid``."""
        return self._vmid

    def get_access_mode(self, domain: str, init_flags: int, init_data: Any) -> VMIMode:
        """How a domain would be reached: ``FILE`` for a RAM file, else ``KVM``, since the guest is running.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such domain
        :raises RuntimeError: ``init_flags`` has neither ``INIT_DOMAINNAME`` nor ``INIT_DOMAINID``

        Source: ``vmi_get_access_mode``.
        """
        if not init_flags & (INIT_DOMAINNAME | INIT_DOMAINID):
            raise RuntimeError("init_flags must be either INIT_DOMAINAME or INIT_DOMAINID")
        domain.encode()
        try:
            found = resolver.current().find(domain, not init_flags & INIT_DOMAINNAME)
        except LibvmiError as error:
            raise failure(str(error)) from None
        return VMIMode.FILE if found.ramfile else VMIMode.KVM

    def get_page_mode(self, vcpu: int) -> PageMode:
        """How page tables are built: ``IA32E``; ``UNKNOWN`` after a partial init. Source: ``vmi_get_page_mode``."""
        unsigned(vcpu)
        return PageMode.IA32E if self._paging else PageMode.UNKNOWN

    def get_address_width(self) -> int:
        """Bytes of an address: 8; 0 after a partial init. Source: ``vmi_get_address_width``."""
        return 8 if self._paging else 0

    def get_ostype(self) -> VMIOS:
        """What runs in the guest: ``LINUX``; ``UNKNOWN`` after a partial init. Source: ``vmi_get_ostype``."""
        return VMIOS.LINUX if self._os else VMIOS.UNKNOWN

    def get_winver(self) -> VMIWinVer:
        """``OS_WINDOWS_NONE``: not Windows. Source: ``vmi_get_winver``."""
        return VMIWinVer.OS_WINDOWS_NONE

    def get_winver_str(self) -> str:
        """The name of that: ``VMI_OS_WINDOWS_NONE``. Source: ``vmi_get_winver_str``."""
        return "VMI_OS_WINDOWS_NONE"

    def get_winver_manual(self, kdvb_pa: int) -> VMIWinVer:
        """``OS_WINDOWS_NONE``, whatever the address. Source: ``vmi_get_winver_manual``."""
        unsigned(kdvb_pa)
        return VMIWinVer.OS_WINDOWS_NONE

    def get_offset(self, offset_name: str) -> int:
        """An offset or address by LibVMI's name for it.

        :param offset_name: ``linux_tasks``, ``linux_mm``, ``linux_pid``, ``linux_name``, ``linux_pgd`` (bytes from the
            structure's start), ``linux_kaslr`` (bytes), ``linux_init_task`` (virtual address), ``kpgd`` (physical
            address)
        :raises LibvmiError: ``VMI_FAILURE``: LibVMI has no such name

        Source: ``vmi_get_offset``.
        """
        offset_name.encode()
        if not self._os:
            raise failure(NO_OS)
        if offset_name == "linux_kaslr":
            return self._profile.kaslr_offset
        if offset_name == "linux_init_task":
            return self._symbol("init_task")
        if offset_name == "kpgd":
            return self._kernel_tables()
        if offset_name not in MEMBERS:
            raise UnknownNameError(offset_name)
        return self._offset(*MEMBERS[offset_name])

    def get_kernel_struct_offset(self, struct_name: str, member: str) -> int:
        """Bytes from the start of a kernel structure to one of its members.

        :param member: may be dotted (``"f_path.dentry"``); anonymous members are seen through
        :raises LibvmiError: ``VMI_FAILURE``: this kernel has no such structure or member

        Source: ``vmi_get_kernel_struct_offset``, which needs a JSON profile; here the guest itself tells.
        """
        struct_name.encode(), member.encode()
        if not self._os:
            raise failure(NO_OS)
        return self._offset(struct_name, member)

    def get_memsize(self) -> int:
        """Bytes of guest memory, up to the end of the highest there is now. Over an agent, of what its kernel has:
        LibVMI also counts what firmware keeps at the end of memory, less than 1 MiB. Source: ``vmi_get_memsize``."""
        return self._memory_end()

    def get_max_physical_address(self) -> int:
        """End of the highest guest memory, bytes. Over an agent as ``get_memsize``: 1,073,598,464 instead of
        1,073,741,824 in a VM of 1 GiB, for what firmware keeps is not in the kernel's direct map.

        Source: ``vmi_get_max_physical_address``.
        """
        return self._memory_end()

    def _memory_end(self) -> int:
        # The kernel raises max_pfn when memory is plugged in, and never lowers it (update_end_of_memory_vars).
        try:
            last = self._target.reader.read(self._target.profile.symbol("max_pfn"), 8)
        except (KeyError, FaultError):
            return self._profile.memory_size
        end = int.from_bytes(last, "little") * PAGE_SIZE
        return end if self._profile.memory_size < end <= _PHYSICAL_END else self._profile.memory_size

    def get_num_vcpus(self) -> int:
        """Virtual CPUs that are online; 0 when unknown. Source: ``vmi_get_num_vcpus``."""
        return self._profile.vcpus

    def get_vcpureg(self, reg: int, vcpu: int) -> int:
        """A register of a virtual CPU: only CR3 is known, as the kernel's page tables, like in LibVMI's file driver.

        :param reg: value of an ``X86Reg``
        :raises LibvmiError: ``VMI_FAILURE``: any other register

        Source: ``vmi_get_vcpureg``.
        """
        wanted = unsigned(reg)
        unsigned(vcpu)
        if wanted != X86Reg.CR3.value:
            raise failure("only CR3 is known: an agent in the guest cannot read a virtual CPU's other registers")
        return self._kernel_tables()
