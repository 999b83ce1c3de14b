# Written by compat/coverage.py from the table in scalars.py: change that.
from typing import NoReturn

from vmishim.libvmi.values import AccessContext

WIDTHS: dict[str, int]
FORMS: dict[str, str]
TYPES: dict[str, str]
WHERE: dict[str, str]

def read_doc(width: str, form: str) -> str: ...
def write_doc(width: str, form: str) -> str: ...

class Scalars:
    def read_8(self, ctx: AccessContext) -> int:
        """Read an unsigned integer of 1 byte, little-endian, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: the address or its process does not exist, or is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_8``.
        """

    def read_16(self, ctx: AccessContext) -> int:
        """Read an unsigned integer of 2 bytes, little-endian, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: the address or its process does not exist, or is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_16``.
        """

    def read_32(self, ctx: AccessContext) -> int:
        """Read an unsigned integer of 4 bytes, little-endian, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: the address or its process does not exist, or is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_32``.
        """

    def read_64(self, ctx: AccessContext) -> int:
        """Read an unsigned integer of 8 bytes, little-endian, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: the address or its process does not exist, or is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_64``.
        """

    def read_addr(self, ctx: AccessContext) -> int:
        """Read an address of 8 bytes, little-endian, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: the address or its process does not exist, or is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_addr``.
        """

    def read_8_ksym(self, symbol: str) -> int:
        """Read an unsigned integer of 1 byte, little-endian, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_8_ksym``.
        """

    def read_16_ksym(self, symbol: str) -> int:
        """Read an unsigned integer of 2 bytes, little-endian, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_16_ksym``.
        """

    def read_32_ksym(self, symbol: str) -> int:
        """Read an unsigned integer of 4 bytes, little-endian, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_32_ksym``.
        """

    def read_64_ksym(self, symbol: str) -> int:
        """Read an unsigned integer of 8 bytes, little-endian, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_64_ksym``.
        """

    def read_addr_ksym(self, symbol: str) -> int:
        """Read an address of 8 bytes, little-endian, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_addr_ksym``.
        """

    def read_8_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned integer of 1 byte, little-endian, at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_8_va``.
        """

    def read_16_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned integer of 2 bytes, little-endian, at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_16_va``.
        """

    def read_32_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned integer of 4 bytes, little-endian, at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_32_va``.
        """

    def read_64_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned integer of 8 bytes, little-endian, at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_64_va``.
        """

    def read_addr_va(self, vaddr: int, pid: int) -> int:
        """Read an address of 8 bytes, little-endian, at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_addr_va``.
        """

    def read_8_pa(self, paddr: int) -> int:
        """Read an unsigned integer of 1 byte, little-endian, at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_8_pa``.
        """

    def read_16_pa(self, paddr: int) -> int:
        """Read an unsigned integer of 2 bytes, little-endian, at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_16_pa``.
        """

    def read_32_pa(self, paddr: int) -> int:
        """Read an unsigned integer of 4 bytes, little-endian, at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_32_pa``.
        """

    def read_64_pa(self, paddr: int) -> int:
        """Read an unsigned integer of 8 bytes, little-endian, at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_64_pa``.
        """

    def read_addr_pa(self, paddr: int) -> int:
        """Read an address of 8 bytes, little-endian, at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read_addr_pa``.
        """

    def write_8(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused. LibVMI would write 1 byte where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8``.
        """

    def write_16(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused. LibVMI would write 2 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16``.
        """

    def write_32(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused. LibVMI would write 4 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32``.
        """

    def write_64(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64``.
        """

    def write_addr(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr``.
        """

    def write_8_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused. LibVMI would write 1 byte at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_ksym``.
        """

    def write_16_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused. LibVMI would write 2 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_ksym``.
        """

    def write_32_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused. LibVMI would write 4 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_ksym``.
        """

    def write_64_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_ksym``.
        """

    def write_addr_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_ksym``.
        """

    def write_8_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 1 byte at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_va``.
        """

    def write_16_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 2 bytes at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_va``.
        """

    def write_32_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 4 bytes at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_va``.
        """

    def write_64_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_va``.
        """

    def write_addr_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at address ``vaddr`` of process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_va``.
        """

    def write_8_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 1 byte at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_pa``.
        """

    def write_16_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 2 bytes at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_pa``.
        """

    def write_32_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 4 bytes at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_pa``.
        """

    def write_64_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_pa``.
        """

    def write_addr_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused. LibVMI would write 8 bytes at the guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_pa``.
        """
