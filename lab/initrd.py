"""The initramfs: the modules that find the root file system, in the order of their needs, and the archive."""

import lzma
from pathlib import Path
from typing import Final

from lab.steps import ImageError

INIT: Final = Path(__file__).resolve().parent / "initramfs" / "init"
"""What runs in it."""

MODULES: Final = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "ext4")
"""What the initramfs loads, in order, unless built into the kernel."""


def initramfs(root: Path, release: str) -> bytes:
    """Return the initramfs for a root folder with the modules of this kernel."""
    modules = root / "usr/lib/modules" / release
    archive = Cpio()
    for folder in ("bin", "modules"):
        archive.folder(folder)
    archive.file("bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755)
    archive.file("init", INIT.read_bytes(), 0o755)
    order = []
    for path in _module_order(modules, MODULES):
        data = (modules / path).read_bytes()
        name = Path(path).name.removesuffix(".xz")
        archive.file(f"modules/{name}", lzma.decompress(data) if path.endswith(".xz") else data, 0o644)
        order.append(name)
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode(), 0o644)
    # Not compressed: unpacking under TCG takes longer than loading 3 MB.
    return archive.finish()


def _module_order(modules: Path, names: tuple[str, ...]) -> list[str]:
    """Return the files of modules, each after those it depends on."""

    def name(path: str) -> str:
        return Path(path).name.split(".ko")[0].replace("-", "_")

    builtin = {name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    files = {name(path): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        # modules.dep lists all that a module needs, the nearest first.
        for other in reversed(needs[path]):
            add(other)
        if path not in order:
            order.append(path)

    for wanted in names:
        if wanted in builtin:
            continue
        if wanted not in files:
            raise ImageError(f"the kernel has no module {wanted}")
        add(files[wanted])
    return order


class Cpio:
    """An initramfs archive ("newc"), in memory.

    Format: Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self) -> None:
        self._archive = bytearray()
        self._entries = 0

    def folder(self, name: str) -> None:
        """Add an empty folder."""
        self._add(name, 0o040755, b"")

    def file(self, name: str, data: bytes, mode: int) -> None:
        """Add a file; its folder must have been added before."""
        self._add(name, 0o100000 | mode, data)

    def finish(self) -> bytes:
        """Return the whole archive."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._archive)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._entries += 1
        encoded = name.encode() + b"\0"
        fields = (self._entries, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self._archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._archive += data
        self._pad()

    def _pad(self) -> None:
        self._archive += bytes(-len(self._archive) % 4)
