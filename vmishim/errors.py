"""The errors of vmishim: one tree.

``LibvmiError``            what LibVMI's own bindings raise; every failure that a script can see is one
``├ FaultError``           guest memory at an address cannot be read
``├ UnknownNameError``     this kernel has no such symbol, structure or member
``└ LinkError``            the connection to the agent failed: a dead peer, a wrong key, a forged or truncated frame
``  └ RebootedError``      the guest was booted again: what is known of its kernel is out of date

``str()`` of most failures is LibVMI's ``VMI_FAILURE``, which scripts compare with. What failed and why is in a note,
which a traceback shows (``error.__notes__``), and for the first two in attributes.
"""

from __future__ import annotations

from vmishim.foreign import paragraph

FAILURE = "VMI_FAILURE"
"""LibVMI's name for most failures."""


class LibvmiError(Exception):
    """A LibVMI call failed. ``str(error)`` is LibVMI's name for the failure, such as ``VMI_FAILURE`` or ``OS``.

    Its text may quote a guest, an agent or a file, so unprintable characters are escaped: a traceback, a log or a
    terminal can show it as it is.

    Source: ``libvmi.LibvmiError`` of the libvmi Python bindings, which carry only that name.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(*(paragraph(word) if isinstance(word, str) else word for word in words))

    def add_note(self, note: str) -> None:
        """As of every exception; unprintable characters are escaped."""
        super().add_note(paragraph(note))


def failure(why: str) -> LibvmiError:
    """``VMI_FAILURE`` with a note that says why, as the genuine bindings raise it without one."""
    error = LibvmiError(FAILURE)
    error.add_note(why)
    return error


class FaultError(LibvmiError):
    """Guest memory at ``address`` cannot be read.

    :ivar address: first unreadable byte
    :ivar data: the bytes that could be read before it (possibly none); what LibVMI returns with ``padding=True``
    """

    def __init__(self, address: int, data: bytes = b"") -> None:
        super().__init__(FAILURE)
        self.address = address
        self.data = data
        self.add_note(f"no readable memory at {address:#x}")

    def __reduce__(self) -> tuple[type[FaultError], tuple[int, bytes]]:
        return type(self), (self.address, self.data)


class UnknownNameError(LibvmiError):
    """The guest's kernel has no symbol, structure or member called ``name``.

    :ivar name: the symbol, or ``structure.member``
    """

    def __init__(self, name: str) -> None:
        super().__init__(FAILURE)
        self.name = name
        kind = "" if " " in name else "member " if "." in name else "symbol or structure "
        self.add_note(f"this kernel has no {kind}{name}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str]]:
        return type(self), (self.name,)


class LinkError(LibvmiError):
    """The agent could not be reached, or its reply could not be trusted. Never raised for unreadable memory.

    It is a ``LibvmiError``, so a script's ``except LibvmiError`` still works. The text says what to do next.
    """


class RebootedError(LinkError):
    """The guest was booted again since you connected to it, and its kernel is at other addresses now: connect again.

    Raised at the first request that reaches the new boot, and at each one after it.
    """
