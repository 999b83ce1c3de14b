"""Images of the lab VM, built from Debian packages and kept in a cache.

One image per kernel of ``ci/kernels.toml``: a kernel, an initramfs and an ext4
root file system. The guest holds what the agent needs (Python, ZeroMQ,
cryptography, libbpf) and the container it watches, but neither agent nor keys:
those are copied in after the boot, so that no image depends on our own code.

An image is keyed by a digest of its recipe (the modules that say what is in it,
the kernel's entry, the files put in) and is built when that digest has none yet.
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from lab import debian, initrd, root
from lab.cache import cache, digest, locked, prune
from lab.kernels import Kernel, find_kernel
from lab.steps import ImageError, Progress, command, say, step

HOST_PACKAGES: Final = (
    "mmdebstrap",
    "debian-archive-keyring",
    "e2fsprogs",
    "kmod",
    "qemu-system-x86",
)
"""Debian and Ubuntu packages the host needs to build and to boot."""

_TOOLS: Final = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}

_HERE: Final = Path(__file__).resolve().parent
_MODULES: Final = ("image.py", "debian.py", "initrd.py", "root.py")
"""Those that say what is in an image."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A built image; its files are never written to again."""

    kernel: Kernel
    folder: Path

    @property
    def vmlinuz(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def root(self) -> Path:
        """The root file system, a raw ext4 file."""
        return self.folder / "root.img"

    @property
    def release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return (self.folder / "release").read_text().strip()


def image(kernel: str | None = None, *, rebuild: bool = False, progress: Progress = say) -> Image:
    """Return the image for a kernel, building it first if there is none.

    `rebuild` fetches all packages again: an image in the cache stays with the
    versions of its day.

    Raises ImageError if a tool is missing or a step fails. The same process
    does not try again then: without a mirror each try takes minutes.
    """
    entry = find_kernel(kernel)
    built = Image(entry, cache() / f"image-{entry.name}-{digest(_recipe(entry))}")
    if not built.folder.is_dir() or rebuild:
        with locked(cache() / "build.lock", progress):
            if not built.folder.is_dir() or rebuild:
                if entry.name in _failed:
                    raise _failed[entry.name]
                try:
                    _check_host()
                    _build(built, debian.base_root(rebuild, progress), progress)
                except ImageError as error:
                    _failed[entry.name] = error
                    raise
                prune()
    os.utime(built.folder)
    return built


_failed: Final[dict[str, ImageError]] = {}
"""Why the image of a kernel could not be built in this process."""


def _recipe(kernel: Kernel) -> dict[str, str]:
    put_in = [path for folder in ("overlay", "initramfs") for path in (_HERE / folder).rglob("*") if path.is_file()]
    files = [*(_HERE / name for name in _MODULES), *put_in]
    return {str(path.relative_to(_HERE)): _sha(path) for path in files} | dataclasses.asdict(kernel)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_host() -> None:
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if not debian.KEYRING.exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise ImageError(
            f"missing on this host: {', '.join(missing)}\n"
            f"try: apt-get install --no-install-recommends {' '.join(HOST_PACKAGES)}"
        )
    if os.geteuid() != 0:
        raise ImageError("building an image needs root (the files in it belong to root)")


def _build(built: Image, base: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache()) as name:
        work = Path(name)
        folder, result = work / "root", work / "image"
        folder.mkdir()
        result.mkdir()
        with step(f"kernel package of {built.kernel.package}", progress):
            release = debian.unpack_kernel(built.kernel, work, folder, result)
            (result / "release").write_text(release + "\n")
        with step("root folder", progress):
            command("tar", "-C", folder, "-xpf", base, "--numeric-owner", "--xattrs", "--exclude=./dev/*")
            command("depmod", "--basedir", folder, release)
            root.furnish(folder)
        with step("initramfs", progress):
            (result / "initrd").write_bytes(initrd.initramfs(folder, release))
        with step("root file system", progress):
            root.make_file_system(folder, result / "root.img")
        if built.folder.exists():
            built.folder.rename(work / "old")
        result.rename(built.folder)
    progress(f"image: {built.folder}")
