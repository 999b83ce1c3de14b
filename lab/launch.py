"""Start QEMU for a lab VM: its command line, its warden, the folder of its run, and whether KVM works here."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from lab.cache import cache, locked
from lab.image import HOST_PACKAGES, Image
from lab.steps import say

# LibVMI, the yardstick, walks four-level tables only: no five-level paging.
_CPU: Final = {"kvm": "host,la57=off", "tcg": "max,la57=off"}
_PREFIX: Final = "vmishim-lab-"
_SHARED_MEMORY: Final = Path("/dev/shm")


class LabError(Exception):
    """The lab VM does not boot, has ended, or missed a deadline."""


def find_accelerator(image: Image, progress: Callable[[str], None] = say) -> str:
    """Return "kvm" where it runs this kernel, otherwise "tcg".

    Decided once per boot of the host, by booting: a host may well offer
    /dev/kvm and hang every guest. ``VMISHIM_ACCEL`` overrides it.
    """
    given = os.environ.get("VMISHIM_ACCEL")
    if given:
        if given not in _CPU:
            raise LabError(f"VMISHIM_ACCEL is {given!r}; it may be {' or '.join(_CPU)}")
        return given
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = cache() / f"accelerator-{image.kernel.name}-{boot_id}"
    with locked(cache() / "accelerator.lock"):
        if not verdict.exists():
            progress("lab: trying KVM (up to 10 s)")
            found = "kvm" if _kvm_works(image) else "tcg"
            progress(f"lab: using {found}")
            verdict.write_text(found)
        return verdict.read_text()


def qemu_command(
    image: Image,
    folder: Path,
    accelerator: str,
    memory_mib: int,
    cpus: int,
    append: list[str],
    terminal: bool,
) -> list[str]:
    console = "stdio,signal=on,logfile=" if terminal else "file,path="
    return [
        "qemu-system-x86_64",
        *(
            "-M",
            "q35,memory-backend=ram",
            "-accel",
            accelerator,
            "-cpu",
            _CPU[accelerator],
            "-smp",
            str(cpus),
        ),
        *("-m", f"{memory_mib}M"),
        *("-object", f"memory-backend-file,id=ram,size={memory_mib}M,mem-path={folder / 'ram'},share=on"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-kernel", str(image.vmlinuz), "-initrd", str(image.initrd)),
        *("-append", " ".join(filter(None, append))),
        *("-chardev", f"{console}{folder / 'serial.log'},id=console", "-serial", "chardev:console"),
        *("-drive", f"file={image.root},format=raw,if=none,id=root,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=root"),
        # No boot ROM: its file is in a package of its own.
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={folder / 'agent.sock'},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-qmp", f"unix:{folder / 'monitor.sock'},server=on,wait=off"),
    ]


def start(
    command: list[str], folder: Path, terminal: bool
) -> tuple["subprocess.Popen[bytes]", "subprocess.Popen[bytes]"]:
    """Start QEMU and its warden, which ends it when this process dies."""
    if shutil.which(command[0]) is None:
        raise LabError(f"{command[0]} not found; try: apt-get install {' '.join(HOST_PACKAGES)}")
    with (folder / "qemu.log").open("wb") as log:
        qemu = subprocess.Popen(
            command,
            stdin=None if terminal else subprocess.DEVNULL,
            stdout=None if terminal else log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which ends QEMU
        )
    try:
        # Its standard input ends when this process does, however it dies. A
        # parent-death signal would also come when the thread that booted ends.
        warden = subprocess.Popen(
            [
                "sh",
                "-c",
                'read -r word || { kill -KILL "$1"; rm -rf "$2"; }',
                "sh",
                str(qemu.pid),
                str(folder),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    except BaseException:
        qemu.kill()
        qemu.wait()
        raise
    return qemu, warden


def dismiss(warden: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError, ValueError):
        warden.communicate(b"dismissed\n")


def make_run_folder(memory_mib: int) -> tuple[Path, IO[bytes]]:
    """Make the folder of a run, and hold its lock; remove those of the dead.

    It lies in shared memory if the guest's memory has room there: the file is
    written to all the time. Its path must be short, for the sockets' sake.
    """
    parents = [Path(tempfile.gettempdir())]
    if os.access(_SHARED_MEMORY, os.W_OK):
        parents.insert(0, _SHARED_MEMORY)
    # One at a time: else a folder could be swept before its lock is held.
    with locked(cache() / "runs.lock"):
        for parent in parents:
            for folder in parent.glob(f"{_PREFIX}*"):
                _sweep(folder)
        room = shutil.disk_usage(parents[0]).free >> 20
        parent = parents[0] if room > memory_mib + 64 else parents[-1]
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = (folder / "lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _sweep(folder: Path) -> None:
    """Remove a run's folder if its owner, who held the lock, is dead."""
    try:
        if folder.lstat().st_uid != os.getuid():
            return
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
    except BlockingIOError:
        return
    except OSError:
        # Its owner died before it had a lock, or has just removed it.
        remove(folder)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _kvm_works(image: Image, timeout: float = 10.0) -> bool:
    """Boot to the initramfs under KVM: whether its first program has run."""
    command = [
        "qemu-system-x86_64",
        *("-M", "q35", "-accel", "kvm", "-cpu", _CPU["kvm"], "-m", "256M", "-nodefaults", "-no-user-config"),
        *("-no-reboot", "-display", "none", "-serial", "stdio", "-monitor", "none"),
        *("-kernel", str(image.vmlinuz), "-initrd", str(image.initrd)),
        *("-append", "console=ttyS0 panic=-1 vmishim.probe"),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=timeout, check=False,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return False
    return b"vmishim: user space runs" in done.stdout
