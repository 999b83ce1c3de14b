"""Images of the lab VM, built from Debian packages and kept in a cache.

One image per kernel of ``ci/kernels.toml``: a kernel, an initramfs and an ext4
root file system. The guest holds what the agent needs (Python, ZeroMQ,
cryptography, libbpf) and the container it watches, but neither agent nor keys:
those are copied in after the boot, so that no image depends on our own code.

An image is keyed by a digest of its recipe (this file, the kernel's entry, the
files put in) and is built when that digest has none yet.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

HOST_PACKAGES: Final = (
    "mmdebstrap",
    "debian-archive-keyring",
    "e2fsprogs",
    "kmod",
    "qemu-system-x86",
)
"""Debian and Ubuntu packages the host needs to build and to boot."""

GUEST_PACKAGES: Final = (
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "procps",
    "iproute2",
    "busybox-static",
    "qemu-guest-agent",
    "crun",
    "catatonit",
    "python3",
    "python3-zmq",
    "python3-cryptography",
    "libbpf1",
)

SUITE: Final = "bookworm"
"""Debian's release in the guest, whatever the host is."""
MIRROR: Final = "http://deb.debian.org/debian"
"""Where its packages are, if ``VMISHIM_DEBIAN_MIRROR`` does not say; the security updates are beside it."""
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

INITRAMFS_MODULES: Final = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "ext4")
"""What the initramfs loads, in order, unless built into the kernel."""

_TOOLS: Final = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}

# Neither read by programs nor by tests; the hardware database alone is 20 MB.
_EXCLUDED: Final = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/lintian/*",
    "/usr/lib/udev/hwdb.d/*",
    "/usr/lib/x86_64-linux-gnu/*.a",
)

# Each costs seconds under TCG and does nothing for a VM that is thrown away.
_MASKED: Final = (
    "cryptsetup.target",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "getty.target",
    "integritysetup.target",
    "kmod-static-nodes.service",
    "proc-sys-fs-binfmt_misc.automount",
    "procps.service",
    "remote-fs.target",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-initctl.socket",
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-logind.service",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-repart.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    "veritysetup.target",
)

# They run at each boot and each daemon-reload, and find nothing to do. systemd-debug-generator stays: it is what reads
# "systemd.wants=" on the kernel's command line.
_MASKED_GENERATORS: Final = (
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-fstab-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-veritysetup-generator",
)

_WANTS: Final = {
    "sysinit.target.wants": ("qemu-guest-agent.service",),
    "multi-user.target.wants": ("monitored.service",),
}

# Programs that are planted by the thousand come from busybox in the container:
# linked statically, they start in 6 ms under TCG instead of 42.
_QUICK: Final = ("sleep", "cat")

_KEPT_DAYS: Final = 14
"""Days that an image nobody uses stays in the cache."""

_HERE: Final = Path(__file__).resolve().parent
_KERNELS: Final = _HERE.parent / "ci" / "kernels.toml"

Progress = Callable[[str], None]


class ImageError(Exception):
    """An image cannot be built; the text says what to do about it."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry of ``ci/kernels.toml``."""

    name: str
    package: str


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


def say(line: str) -> None:
    """Print one line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def cache() -> Path:
    """Return the cache folder (``VMISHIM_CACHE``), created if need be."""
    given = os.environ.get("VMISHIM_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "vmishim" / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kernels() -> dict[str, Kernel]:
    """Return the kernels of ``ci/kernels.toml`` by name, in its order."""
    entries = tomllib.loads(_KERNELS.read_text())["kernel"]
    return {entry["name"]: Kernel(**entry) for entry in entries}


def default_kernel() -> str:
    """Return the name of the kernel to use when none is asked for."""
    name = tomllib.loads(_KERNELS.read_text())["default"]
    assert isinstance(name, str)
    return name


def find_kernel(name: str | None = None) -> Kernel:
    """Return the kernel of that name; ``None`` is the default one.

    Raises ImageError if ``ci/kernels.toml`` has no such kernel.
    """
    known = kernels()
    wanted = default_kernel() if name is None else name
    if wanted not in known:
        raise ImageError(f"no kernel {wanted!r} in {_KERNELS}; there are {', '.join(known)}")
    return known[wanted]


def image(kernel: str | None = None, *, rebuild: bool = False, progress: Progress = say) -> Image:
    """Return the image for a kernel, building it first if there is none.

    `rebuild` fetches all packages again: an image in the cache stays with the
    versions of its day.

    Raises ImageError if a tool is missing or a step fails. The same process
    does not try again then: without a mirror each try takes minutes.
    """
    entry = find_kernel(kernel)
    built = Image(entry, cache() / f"image-{entry.name}-{_digest(_recipe(entry))}")
    if not built.folder.is_dir() or rebuild:
        with locked(cache() / "build.lock", progress):
            if not built.folder.is_dir() or rebuild:
                if entry.name in _failed:
                    raise _failed[entry.name]
                try:
                    _check_host()
                    _build(built, _base(rebuild, progress), progress)
                except ImageError as error:
                    _failed[entry.name] = error
                    raise
                _prune()
    os.utime(built.folder)
    return built


_failed: Final[dict[str, ImageError]] = {}
"""Why the image of a kernel could not be built in this process."""


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file; says so when it has to wait."""
    # Never through a link, and never cut short: another user may have made what has this name.
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(f"image: waiting for another build (lock {path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recipe(kernel: Kernel) -> dict[str, str]:
    files = [Path(__file__), *_put_in()]
    recipe = {path.name if path == files[0] else str(path.relative_to(_HERE)): _sha(path) for path in files}
    return recipe | dataclasses.asdict(kernel)


def _put_in() -> list[Path]:
    folders = (_HERE / "overlay", _HERE / "initramfs")
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(recipe: object) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _check_host() -> None:
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if not KEYRING.exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise ImageError(
            f"missing on this host: {', '.join(missing)}\n"
            f"try: apt-get install --no-install-recommends {' '.join(HOST_PACKAGES)}"
        )
    if os.geteuid() != 0:
        raise ImageError("building an image needs root (the files in it belong to root)")


@contextlib.contextmanager
def _step(what: str, progress: Progress) -> Iterator[None]:
    begun = time.monotonic()
    yield
    progress(f"image: {what} ({time.monotonic() - begun:.1f} s)")


def _command(*argv: str | Path, env: Mapping[str, str] | None = None) -> None:
    """Run a tool quietly; raise ImageError with its last words if it fails."""
    done = subprocess.run(
        [str(word) for word in argv],
        env=None if env is None else os.environ | dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise _StepError(str(argv[0]), done.returncode, done.stdout.decode(errors="replace").splitlines())


class _StepError(ImageError):
    """A tool failed; with what it wrote."""

    def __init__(self, tool: str, status: int, lines: list[str]) -> None:
        super().__init__(f"{tool} failed with status {status}:\n  " + "\n  ".join(lines[-20:]))
        self.lines = lines


def _mmdebstrap(variant: str, target: str | Path, *options: str) -> None:
    try:
        _run_mmdebstrap(variant, target, *options)
    except _StepError as error:
        errors = [" ".join(line.split()[1:]) for line in error.lines if line.startswith("E: ")]
        if not errors:
            raise
        raise ImageError(
            f"cannot get Debian {SUITE}'s packages: {errors[0].rstrip('.')}. Name a mirror that serves debian and "
            "debian-security side by side, such as VMISHIM_DEBIAN_MIRROR=http://deb.debian.org/debian"
        ) from error


def _run_mmdebstrap(variant: str, target: str | Path, *options: str) -> None:
    _command(
        "mmdebstrap",
        "--mode=root",
        f"--variant={variant}",
        f"--keyring={KEYRING}",
        "--architectures=amd64",
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Sandbox::User "root"',
        *options,
        SUITE,
        target,
        *sources(),
    )


def mirror() -> str:
    """Return the address of Debian's packages (``VMISHIM_DEBIAN_MIRROR``)."""
    return os.environ.get("VMISHIM_DEBIAN_MIRROR", "").rstrip("/") or MIRROR


def sources(options: str = "") -> list[str]:
    """Return apt source lines: of the lab's suite only, whatever the host's are.

    `options` are those of each line, such as "[signed-by=FILE]".
    """
    # Debian's mirrors serve .../debian and .../debian-security side by side.
    places = (("", ""), ("", "-updates"), ("-security", "-security"))
    return [
        " ".join(filter(None, ("deb", options, f"{mirror()}{folder}", f"{SUITE}{suite}", "main")))
        for folder, suite in places
    ]


def _base(rebuild: bool, progress: Progress) -> Path:
    """Return the tarball of the root without a kernel, shared by all images."""
    options = [
        f"--include={','.join(GUEST_PACKAGES)}",
        *(f"--dpkgopt=path-exclude={glob}" for glob in _EXCLUDED),
    ]
    base = cache() / f"base-{_digest([SUITE, options])}.tar"
    if base.exists() and not rebuild:
        os.utime(base)
        return base
    with _step(f"Debian {SUITE}, {len(GUEST_PACKAGES)} packages and what they need", progress):
        partial = base.with_suffix(".partial.tar")
        _mmdebstrap("essential", partial, "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", *options)
        partial.rename(base)
    return base


def _build(built: Image, base: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache()) as name:
        work = Path(name)
        root, result = work / "root", work / "image"
        root.mkdir()
        result.mkdir()
        with _step(f"kernel package of {built.kernel.package}", progress):
            release = _unpack_kernel(built.kernel, work, root, result)
            (result / "release").write_text(release + "\n")
        with _step("root folder", progress):
            _command("tar", "-C", root, "-xpf", base, "--numeric-owner", "--xattrs", "--exclude=./dev/*")
            _command("depmod", "--basedir", root, release)
            _furnish(root)
        with _step("initramfs", progress):
            (result / "initrd").write_bytes(_initramfs(root, release))
        with _step("root file system", progress):
            _make_file_system(root, result / "root.img")
        if built.folder.exists():
            built.folder.rename(work / "old")
        result.rename(built.folder)
    progress(f"image: {built.folder}")


def _prune() -> None:
    """Remove from the cache what was not used for long, or left half built.

    The caller holds the lock of builds.
    """
    old = time.time() - _KEPT_DAYS * 86400
    for path in cache().iterdir():
        unused = path.name.startswith(("image-", "base-", "accelerator-")) and path.stat().st_mtime < old
        if unused or path.name.startswith("building-"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _unpack_kernel(kernel: Kernel, work: Path, root: Path, result: Path) -> str:
    """Fetch the real kernel package; return its release (``uname -r``)."""
    package = shlex.quote(kernel.package)
    # The hook runs outside, where apt knows the host's release only, until it is given mmdebstrap's configuration.
    hook = (
        f'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && cd {shlex.quote(str(work))} && '
        f"real=$(apt-cache depends --important {package} | sed -n 's/^ *Depends: \\(linux-image-.*\\)/\\1/p') && "
        f'apt-get download "${{real:-{package}}}"'
    )
    _mmdebstrap("custom", "/dev/null", "--format=null", f"--customize-hook={hook}")
    (package_file,) = work.glob("linux-image-*.deb")
    # Not over the root: the package's /lib would replace the link to /usr/lib.
    files = work / "kernel"
    _command("dpkg-deb", "--extract", package_file, files)
    (vmlinuz,) = (files / "boot").glob("vmlinuz-*")
    shutil.copyfile(vmlinuz, result / "vmlinuz")
    release = vmlinuz.name.removeprefix("vmlinuz-")
    if not release.startswith(f"{kernel.name}."):
        raise ImageError(
            f"{kernel.package} of Debian {SUITE} is Linux {release}, not {kernel.name}: correct its entry in {_KERNELS}"
        )
    modules = next(path for path in (files / "lib/modules", files / "usr/lib/modules") if path.is_dir())
    (root / "usr/lib").mkdir(parents=True)
    shutil.move(modules, root / "usr/lib/modules")
    return release


def _furnish(root: Path) -> None:
    """Put the overlay, the masks and the container's root into the guest."""
    for source in _put_in():
        if not source.is_relative_to(_HERE / "overlay"):
            continue
        target = root / source.relative_to(_HERE / "overlay")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o644)
    units = root / "etc/systemd/system"
    # Debian's enabled units go; what the lab wants is named above.
    for wants in units.glob("*.wants"):
        shutil.rmtree(wants)
    for unit in _MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(parents=True, exist_ok=True)
    for generator in _MASKED_GENERATORS:
        (generators / generator).symlink_to("/dev/null")
    for target_wants, wanted in _WANTS.items():
        (units / target_wants).mkdir()
        for unit in wanted:
            (units / target_wants / unit).symlink_to(f"../{unit}")
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    # A fixed identity: an empty one makes systemd take each boot for the first.
    (root / "etc/machine-id").write_text("76d1a5b0c4e94f7a8a6e1f0d2b3c4d5e\n")
    (root / "etc/hostname").write_text("lab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost lab\n")
    (root / "etc/fstab").write_text("")
    quick = root / "usr/lib/vmishim-lab/bin"
    quick.mkdir()
    for applet in _QUICK:
        (quick / applet).symlink_to("/usr/bin/busybox")
    # The container sees all of /usr but this: it is masked there, which only a folder that is there can be.
    (root / "usr/lib/vmishim").mkdir()
    container = root / "var/lib/monitored/rootfs"
    for folder in ("usr", "etc", "proc", "sys", "dev", "tmp", "run", "var", "root"):
        (container / folder).mkdir(parents=True)
    for link in ("bin", "sbin", "lib", "lib64"):
        (container / link).symlink_to(f"usr/{link}")
    (container / "etc/hostname").write_text("monitored\n")
    (container / "etc/hosts").write_text("127.0.0.1 localhost monitored\n")
    (container / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (container / "etc/group").write_text("root:x:0:\n")


def _make_file_system(root: Path, file: Path) -> None:
    used = sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
    # Sparse, so room costs nothing. No journal: the image is never written to,
    # and what a VM writes on top of it is thrown away.
    with file.open("wb") as sparse:
        sparse.truncate(used * 5 // 4 + (512 << 20) & ~0xFFFFF)
    _command("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "vmishim", "-d", root, file)


def _initramfs(root: Path, release: str) -> bytes:
    modules = root / "usr/lib/modules" / release
    archive = Cpio()
    for folder in ("bin", "modules"):
        archive.folder(folder)
    archive.file("bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755)
    archive.file("init", (_HERE / "initramfs/init").read_bytes(), 0o755)
    order = []
    for path in _module_order(modules, INITRAMFS_MODULES):
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
