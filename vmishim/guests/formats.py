"""What a file of guest memory is, by its first bytes: which formats are read, and what to do with each of the others.

``FORMATS`` is the one table: the reader (`vmishim.guests.dumps`), the error messages and docs/dumps.md follow it.

Source: documentation and headers of each maker, such as QEMU's ``docs/interop/qcow2.txt``, libvirt's
``qemu_saveimage.h``, Xen's ``xl.h`` and ``libxc-migration-stream.pandoc``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

HEAD = 4096
"""Bytes from the start of a file that tell its format."""


class Format(NamedTuple):
    """A kind of file that may hold a guest's memory."""

    name: str
    maker: str
    """What writes it."""
    marks: tuple[tuple[int, bytes], ...] = ()
    """(offset, bytes): one of them is in each such file."""
    instead: str = ""
    """What to do to have it read; empty if it is read as it is."""
    package: str = ""
    """Package on PyPI without which some of its files cannot be read."""

    @property
    def is_read(self) -> bool:
        """Whether it is read as it is."""
        return not self.instead


def _starts(*marks: bytes) -> tuple[tuple[int, bytes], ...]:
    return tuple((0, mark) for mark in marks)


UNFINISHED = b"vmishim: an unfinished dump\n"
"""What `vmishim dump` begins a file with; the headers replace it."""

_DUMP = "then, in its monitor, dump-guest-memory -z OUT"
_START = "start the VM as it was, with -S and"

_PACKAGES = "lzallright (LZO), cramjam (Snappy, Zstandard)"

RAW = Format(
    "raw image",
    "QEMU `memory-backend-file`, `pmemsave`; VMware `.vmem`; Firecracker memory file; LiME `format=padded`",
)
ELF = Format(
    "ELF core",
    "QEMU `dump-guest-memory`, `virsh dump --memory-only`, `VBoxManage debugvm NAME dumpvmcore`, `/proc/vmcore`, "
    "`makedumpfile -E`, `vmishim dump`",
    _starts(b"\x7fELF"),
)
KDUMP = Format(
    "kdump (compressed dump)",
    "`makedumpfile -c/-l/-p/-z`, QEMU `dump-guest-memory -z/-l/-s -R`",
    _starts(b"KDUMP   "),
    package=_PACKAGES,
)
FLATTENED = Format(
    "flattened dump",
    "`makedumpfile -F`, QEMU `dump-guest-memory -z/-l/-s`, `virsh dump --format kdump-...`",
    _starts(b"makedumpfile\0\0\0\0"),
    package=_PACKAGES,
)
LIME = Format("LiME image", "LiME `format=lime`; AVML; `vmishim dump --format lime`", _starts(b"EMiL"))
AVML = Format("AVML image", "AVML `--compress`", _starts(b"AVML"), package="cramjam")
XEN_CORE = Format(
    "Xen core",
    "`xl dump-core`",
    instead="run AVML or LiME in the guest, and read its image",
)
SPLIT = Format(
    "part of a split dump",
    "`makedumpfile --split`",
    instead="put all parts together: makedumpfile --reassemble PART PART... OUT",
)

FORMATS: tuple[Format, ...] = (
    RAW,
    ELF,
    KDUMP,
    FLATTENED,
    LIME,
    AVML,
    SPLIT,
    XEN_CORE,
    Format(
        "unfinished dump",
        "`vmishim dump`",
        _starts(UNFINISHED),
        "go on with it: vmishim dump DOMAIN -o FILE --resume; or finish what there is: vmishim dump --finish FILE",
    ),
    Format(
        "QEMU migration stream",
        "QEMU `migrate file:...`, `migrate exec:...`",
        _starts(b"QEVM"),
        f"{_START} -incoming 'exec:cat FILE', {_DUMP}",
    ),
    Format(
        "libvirt saved domain",
        "`virsh save`, `virsh managedsave`",
        _starts(b"LibvirtQemudSave", b"LibvirtQemudPart"),
        "virsh restore FILE --paused, then virsh dump --memory-only DOMAIN OUT",
    ),
    Format(
        "qcow2 disk image",
        "QEMU `savevm`, which stores memory in it; `qemu-img`",
        _starts(b"QFI\xfb"),
        f"if it has a snapshot with memory (qemu-img snapshot -l FILE): {_START} -loadvm SNAPSHOT, {_DUMP}",
    ),
    Format(
        "VMware saved state",
        "VMware `.vmss`, `.vmsn`",
        _starts(*(bytes.fromhex(mark) for mark in ("d0bed2be", "d1bad1ba", "d2bed2be", "d3bed3be"))),
        "read the .vmem file beside it; if there is none: vmss2core -N6 FILE, and read the core",
    ),
    Format(
        "VMware disk image",
        "VMware `.vmdk`",
        _starts(b"KDMV"),
        "this is a disk; suspend or snapshot the VM, and read its .vmem file",
    ),
    Format(
        "VirtualBox saved state",
        "VirtualBox `.sav`",
        _starts(b"\x7fVirtualBox SavedState"),
        "start the VM and pause it, then VBoxManage debugvm NAME dumpvmcore --filename OUT",
    ),
    Format(
        "Xen saved domain",
        "`xl save`",
        (*_starts(b"Xen saved domain, xl format"), (8, b"XENF")),
        "restore it (xl restore FILE), run AVML or LiME in the guest, and read its image",
    ),
    Format(
        "Firecracker state",
        "Firecracker `snapshot_path`",
        _starts(bytes.fromhex("0000648684191007")),
        "read the file that the snapshot named as mem_file_path",
    ),
    Format(
        "Windows crash dump",
        "QEMU `dump-guest-memory -w`, Windows",
        _starts(b"PAGEDU64", b"PAGEDUMP"),
        "dump the guest without -w: dump-guest-memory -z OUT",
    ),
    Format(
        "diskdump (the format before kdump)",
        "kernels before 2.6.13",
        _starts(b"DISKDUMP"),
        "it is from a kernel too old to be read; use crash",
    ),
    Format("EWF image", "EnCase, `ewfacquire`", _starts(b"EVF\x09\x0d\x0a\xff\0"), "ewfexport -f raw -t OUT FILE"),
    Format("gzip file", "`gzip`", _starts(b"\x1f\x8b\x08"), "gunzip -k FILE"),
    Format("xz file", "`xz`", _starts(b"\xfd7zXZ\0"), "xz -dk FILE"),
    Format("Zstandard file", "`zstd`", _starts(b"\x28\xb5\x2f\xfd"), "zstd -d FILE"),
    Format("bzip2 file", "`bzip2`", ((4, b"1AY&SY"),), "bunzip2 -k FILE"),
    Format("LZ4 file", "`lz4`", _starts(b"\x04\x22\x4d\x18"), "lz4 -dk FILE"),
    Format("lzop file", "`lzop`, libvirt's `save_image_format`", _starts(b"\x89LZO\0\r\n\x1a\n"), "lzop -dk FILE"),
    Format("Snappy file", "`snzip`", _starts(b"\xff\x06\0\0sNaPpY"), "snzip -dk FILE"),
    Format("zip archive", "`zip`", _starts(b"PK\x03\x04"), "unzip FILE"),
    Format("7z archive", "`7z`", _starts(b"7z\xbc\xaf\x27\x1c"), "7z x FILE"),
    Format("tar archive", "`tar`", ((257, b"ustar"),), "tar -xf FILE"),
)


def sniff(head: bytes) -> Format:
    """The format of a file that begins so: ``RAW``, which has no mark, if it is none of the others.

    :param head: its first ``HEAD`` bytes, or all of a shorter file
    """
    for format in FORMATS:
        if any(head.startswith(mark, at) for at, mark in format.marks):
            return format
    return RAW


class NotReadError(ValueError):
    """A file is of a format that is known, but not read."""

    def __init__(self, format: Format) -> None:
        super().__init__(f"its format is {format.name}, which is not read as it is; {format.instead}")


def table() -> Iterator[str]:
    """The lines of docs/dumps.md's table."""
    yield "| format | written by | read, or what to do |"
    yield "|---|---|---|"
    for format in FORMATS:
        needs = f"; needs {format.package}" if format.package else ""
        yield f"| {format.name} | {format.maker} | {'read' + needs if format.is_read else format.instead} |"
