"""Debian's packages: where they come from, the root that they make, and the kernel's."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Final

from lab.cache import cache, digest
from lab.kernels import KERNELS, Kernel
from lab.steps import ImageError, Progress, StepError, command, step

SUITE: Final = "bookworm"
"""Debian's release in the guest, whatever the host is."""
MIRROR: Final = "http://deb.debian.org/debian"
"""Where its packages are, if ``VMISHIM_DEBIAN_MIRROR`` does not say; the security updates are beside it."""
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

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


def base_root(rebuild: bool, progress: Progress) -> Path:
    """Return the tarball of the root without a kernel, shared by all images."""
    options = [
        f"--include={','.join(GUEST_PACKAGES)}",
        *(f"--dpkgopt=path-exclude={glob}" for glob in _EXCLUDED),
    ]
    base = cache() / f"base-{digest([SUITE, options])}.tar"
    if base.exists() and not rebuild:
        os.utime(base)
        return base
    with step(f"Debian {SUITE}, {len(GUEST_PACKAGES)} packages and what they need", progress):
        partial = base.with_suffix(".partial.tar")
        _mmdebstrap("essential", partial, "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", *options)
        partial.rename(base)
    return base


def unpack_kernel(kernel: Kernel, work: Path, root: Path, result: Path) -> str:
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
    command("dpkg-deb", "--extract", package_file, files)
    (vmlinuz,) = (files / "boot").glob("vmlinuz-*")
    shutil.copyfile(vmlinuz, result / "vmlinuz")
    release = vmlinuz.name.removeprefix("vmlinuz-")
    if not release.startswith(f"{kernel.name}."):
        raise ImageError(
            f"{kernel.package} of Debian {SUITE} is Linux {release}, not {kernel.name}: correct its entry in {KERNELS}"
        )
    modules = next(path for path in (files / "lib/modules", files / "usr/lib/modules") if path.is_dir())
    (root / "usr/lib").mkdir(parents=True)
    shutil.move(modules, root / "usr/lib/modules")
    return release


def _mmdebstrap(variant: str, target: str | Path, *options: str) -> None:
    try:
        _run_mmdebstrap(variant, target, *options)
    except StepError as error:
        errors = [" ".join(line.split()[1:]) for line in error.lines if line.startswith("E: ")]
        if not errors:
            raise
        raise ImageError(
            f"cannot get Debian {SUITE}'s packages: {errors[0].rstrip('.')}. Name a mirror that serves debian and "
            "debian-security side by side, such as VMISHIM_DEBIAN_MIRROR=http://deb.debian.org/debian"
        ) from error


def _run_mmdebstrap(variant: str, target: str | Path, *options: str) -> None:
    command(
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
