"""The errors of vmishim: a small tree, one edge each.

``LibvmiError``      what LibVMI's own bindings raise; every failure a script can meet is one of these
``└ LinkError``      the connection to the agent failed: a dead peer, a wrong key, a forged or truncated frame
``  └ RebootedError``  the guest was booted anew: what is known of its kernel is of the boot before
``FaultError``       guest memory that cannot be read; becomes ``LibvmiError('VMI_FAILURE')`` in the API class only
"""

from __future__ import annotations


class LibvmiError(Exception):
    """A LibVMI call failed. ``str(error)`` is LibVMI's name of the failure, such as ``VMI_FAILURE`` or ``OS``.

    Source: ``libvmi.LibvmiError`` of the libvmi Python bindings, which carry nothing but that name.
    """


class LinkError(LibvmiError):
    """The agent could not be asked, or what came back could not be trusted. Never raised for unreadable memory.

    A ``LibvmiError``, so that a script's ``except LibvmiError`` still works. The text says what to do next.
    """


class RebootedError(LinkError):
    """The guest was booted anew since it was connected to, and its kernel lies elsewhere now: connect again.

    Raised at the first request that reaches the new boot, and at each one after it.
    """


class FaultError(Exception):
    """Guest memory at ``address`` cannot be read.

    :ivar address: first unreadable byte
    :ivar data: the bytes that could be read before it (possibly none); what LibVMI hands out with ``partial=True``
    """

    def __init__(self, address: int, data: bytes = b"") -> None:
        super().__init__(f"no readable memory at {address:#x}")
        self.address = address
        self.data = data
