"""vmishim: LibVMI's Python API for confidential VMs, answered by an eBPF agent in the guest.

``from vmishim import Libvmi`` is the class that scripts know as ``libvmi.Libvmi``. Nothing heavy is imported until a
name is used: the guest agent ships this package's ``wire`` part and must not load the host side.
"""

from importlib import import_module
from typing import Any

from vmishim.version import __version__

_LAZY = {
    "Libvmi": "vmishim.libvmi",
    "AccessContext": "vmishim.libvmi",
    "LibvmiError": "vmishim.errors",
    "LinkError": "vmishim.errors",
    "RebootedError": "vmishim.errors",
    "FaultError": "vmishim.errors",
}
__all__ = ["AccessContext", "FaultError", "Libvmi", "LibvmiError", "LinkError", "RebootedError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vmishim' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
