"""LibVMI's Python API over a guest that vmishim reaches: the class `Libvmi` and what its calls take and return.

Names, positions, defaults and results are those of the libvmi 3.7.1 bindings; ``docs/libvmi-api.md`` lists every call
and what it does here. Memory is read through a ``Target``: an agent in the guest, or the RAM file of an ordinary VM.
"""

from vmishim.errors import LibvmiError, LinkError
from vmishim.libvmi.constants import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    MSR,
    VMIOS,
    LibvmiInitError,
    PageMode,
    TranslateMechanism,
    VMIArch,
    VMIConfig,
    VMIInitData,
    VMIMode,
    VMIStatus,
    VMIWinVer,
    X86Reg,
)
from vmishim.libvmi.values import AccessContext, PageInfo, Registers
from vmishim.libvmi.vmi import Libvmi, check, pause

__all__ = [
    "INIT_DOMAINID",
    "INIT_DOMAINNAME",
    "INIT_EVENTS",
    "MSR",
    "VMIOS",
    "AccessContext",
    "Libvmi",
    "LibvmiError",
    "LibvmiInitError",
    "LinkError",
    "PageInfo",
    "PageMode",
    "Registers",
    "TranslateMechanism",
    "VMIArch",
    "VMIConfig",
    "VMIInitData",
    "VMIMode",
    "VMIStatus",
    "VMIWinVer",
    "X86Reg",
    "check",
    "pause",
]
