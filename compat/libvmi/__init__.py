"""The import name of LibVMI's Python bindings, provided by vmishim.

``from libvmi import Libvmi`` in an unchanged script imports this package under ``vmishim run script.py``, or always
after ``pip install ./compat``.
"""

from vmishim.libvmi import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    MSR,
    VMIOS,
    AccessContext,
    Libvmi,
    LibvmiError,
    LibvmiInitError,
    LinkError,
    PageMode,
    Registers,
    TranslateMechanism,
    VMIArch,
    VMIConfig,
    VMIInitData,
    VMIMode,
    VMIStatus,
    VMIWinVer,
    X86Reg,
)

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
]
