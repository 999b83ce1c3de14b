"""The guest's root: the overlay, the units that do not run, the container's root, and the file system of it all."""

import shutil
from pathlib import Path
from typing import Final

from lab.steps import command

OVERLAY: Final = Path(__file__).resolve().parent / "overlay"
"""Files that are put into the guest as they are."""

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


def furnish(root: Path) -> None:
    """Put the overlay, the masks and the container's root into the guest."""
    for source in sorted(path for path in OVERLAY.rglob("*") if path.is_file()):
        target = root / source.relative_to(OVERLAY)
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


def make_file_system(root: Path, file: Path) -> None:
    """Make a raw ext4 file of a folder."""
    used = sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
    # Sparse, so room costs nothing. No journal: the image is never written to,
    # and what a VM writes on top of it is thrown away.
    with file.open("wb") as sparse:
        sparse.truncate(used * 5 // 4 + (512 << 20) & ~0xFFFFF)
    command("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "vmishim", "-d", root, file)
