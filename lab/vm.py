"""Boot the lab VM and drive it: run, plant, read, pause.

    with LabVM.boot(nokaslr=True) as vm:
        planted = vm.spawn("sleep", "infinity", count=7)
        assert planted <= vm.processes().keys()

Every wait has a deadline; its error carries the tail of the guest's console.
"""

import base64
import contextlib
import io
import itertools
import socket
import subprocess
import tarfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, Self

from lab import image as images
from lab.launch import LabError, dismiss, find_accelerator, make_run_folder, qemu_command, remove, start
from lab.qemu import GuestAgent, Monitor, ProtocolError
from lab.steps import say

CONTAINER: Final = "monitored"
"""Name of the container, for ``crun``, and of its systemd unit."""

CONTAINER_CGROUP: Final = "/sys/fs/cgroup/monitored.slice/monitored.service/container"
"""The container's own cgroup (version 2), in the guest."""

CONTAINERS_SLICE: Final = "/sys/fs/cgroup/monitored.slice"
"""A cgroup that the container is in, and that outlives it."""

GUEST_PORT: Final = 5555
"""TCP port of the guest that `LabVM.endpoint` leads to."""

HOST_ADDRESS: Final = "10.0.2.2"
"""Address under which the guest reaches ports of the host's loopback."""

BOOT_TIMEOUT: Final = 90.0
"""Seconds from QEMU's start to readiness; under TCG 8 to 12 are usual."""


class CommandError(LabError):
    """A command in the guest failed."""

    def __init__(self, done: "subprocess.CompletedProcess[bytes]") -> None:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        super().__init__(f"{done.args} ended with status {done.returncode}: {words[-2000:]}")
        self.done = done


class LabVM:
    """A running lab VM. `boot` makes it; it is a context manager that ends it."""

    def __init__(
        self,
        image: images.Image,
        run_folder: Path,
        qemu: "subprocess.Popen[bytes]",
        warden: "subprocess.Popen[bytes]",
        lock: IO[bytes],
    ) -> None:
        self.image: Final = image
        self.folder: Final = run_folder
        """Folder of this run: sockets, serial log, the guest's memory."""
        self.port = 0
        """Port on the host's loopback that leads to `GUEST_PORT`."""
        self.boot_seconds = 0.0
        """Seconds from QEMU's start until the VM was ready."""
        self._qemu = qemu
        self._warden = warden
        self._lock = lock
        self._agent = GuestAgent(run_folder / "agent.sock")
        self._monitor: Monitor | None = None

    @classmethod
    def boot(
        cls,
        kernel: str | None = None,
        *,
        memory_mib: int = 1024,
        cpus: int = 1,
        nokaslr: bool = False,
        append: str = "",
        accelerator: str | None = None,
        timeout: float = BOOT_TIMEOUT,
        terminal: bool = False,
        progress: Callable[[str], None] = say,
    ) -> Self:
        """Boot a VM and return it when agent and container are up.

        `kernel` is a name of ``ci/kernels.toml``; `append` is added to the
        kernel's command line; `accelerator` is "kvm" or "tcg" (default: what
        `accelerator()` finds); `terminal` joins the guest's serial console to
        this process's terminal. Builds the image first if it is not cached.

        Raises ImageError, or LabError if the VM is not ready after `timeout`
        seconds or ends before; nothing is left running then.
        """
        image = images.image(kernel, progress=progress)
        chosen = accelerator or find_accelerator(image, progress)
        begun = time.monotonic()
        run_folder, lock = make_run_folder(memory_mib)
        words = ["console=ttyS0", "panic=-1", "net.ifnames=0", "audit=0"]
        words += ["systemd.log_level=notice", "SYSTEMD_COLORS=0"]
        # On a busy host an emulated timer comes late: the kernel would take it for broken, and panic.
        words += ["no_timer_check"]
        words += ["nokaslr"] if nokaslr else []
        command = qemu_command(image, run_folder, chosen, memory_mib, cpus, [*words, append], terminal)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(remove, run_folder)
            on_failure.callback(lock.close)
            qemu, warden = start(command, run_folder, terminal)
            vm = cls(image, run_folder, qemu, warden, lock)
            on_failure.callback(vm.close)
            vm._await_ready(begun + timeout)
            vm.boot_seconds = time.monotonic() - begun
            on_failure.pop_all()
        progress(f"lab: {image.release} under {chosen}, ready after {vm.boot_seconds:.1f} s")
        return vm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the VM and remove its folder; a second call does nothing."""
        self._agent.close()
        if self._monitor is not None:
            self._monitor.close()
        # Nothing in the guest is worth an orderly shutdown.
        self._qemu.kill()
        self._qemu.wait()
        dismiss(self._warden)
        remove(self.folder)
        self._lock.close()

    def __repr__(self) -> str:
        state = "running" if self.alive else "ended"
        return f"<LabVM {self.image.release} {state} at {self.endpoint}>"

    @property
    def endpoint(self) -> str:
        """ZeroMQ endpoint on the host that leads to `GUEST_PORT`."""
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def ram(self) -> Path:
        """The guest's physical memory, as a file that changes as it runs."""
        return self.folder / "ram"

    @property
    def alive(self) -> bool:
        """Whether QEMU runs (it does not reboot: a panic ends it)."""
        return self._qemu.poll() is None

    @property
    def pid(self) -> int:
        """Process id of QEMU on the host."""
        return self._qemu.pid

    def serial_tail(self, lines: int = 30) -> str:
        """Return the last lines of the guest's console."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "serial.log").read_text(errors="replace")
            return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
        return ""

    def run(
        self,
        *argv: str,
        input: bytes | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command in the guest as root, outside the container.

        Returns its status (negative: minus the signal that ended it) and
        output. Raises CommandError if `check` and the status is not 0,
        LabError if it does not exist or is not done after `timeout` seconds (then
        it is killed).
        """
        deadline = time.monotonic() + timeout
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if input is not None:
            arguments["input-data"] = base64.b64encode(input).decode()
        pid = self._ask("guest-exec", deadline, **arguments)["pid"]
        for pause in _pauses(deadline):
            status = self._ask("guest-exec-status", deadline + 5.0, pid=pid)
            if status["exited"]:
                break
            time.sleep(pause)
        else:
            self._ask("guest-exec", time.monotonic() + 10.0, path="kill", arg=["-KILL", str(pid)])
            raise self._error(f"{' '.join(argv)} was not done after {timeout:g} s")
        if status.get("out-truncated") or status.get("err-truncated"):
            raise self._error(f"{' '.join(argv)} wrote more than the guest agent can carry")
        done = subprocess.CompletedProcess(
            list(argv),
            status["exitcode"] if "exitcode" in status else -status["signal"],
            base64.b64decode(status.get("out-data", "")),
            base64.b64decode(status.get("err-data", "")),
        )
        if check and done.returncode:
            raise CommandError(done)
        return done

    def container(
        self,
        *argv: str,
        input: bytes | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command inside the container; otherwise as `run`."""
        return self.run("crun", "exec", CONTAINER, *argv, input=input, timeout=timeout, check=check)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest, and the folders it lies in.

        The file appears whole or not at all.
        """
        script = 'mkdir -p "${1%/*}" && cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'
        self.run("sh", "-c", script, "sh", path, f"{mode:o}", input=data)

    def unpack(self, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Write several files in the guest by one command: absolute path -> content and mode."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path, (data, mode) in files.items():
                entry = tarfile.TarInfo(path.lstrip("/"))
                entry.size, entry.mode, entry.mtime = len(data), mode, int(time.time())
                archive.addfile(entry, io.BytesIO(data))
        self.run("tar", "-xC", "/", input=packed.getvalue())

    def read(self, path: str) -> bytes:
        """Return the content of a file in the guest; LabError if it does not exist."""
        try:
            return self._agent.read(path)
        except (OSError, ProtocolError) as error:
            raise self._error(f"reading {path}: {error}") from error

    def kallsyms(self) -> bytes:
        """Return the guest's ``/proc/kallsyms``, with addresses."""
        return self.read("/proc/kallsyms")

    def spawn(self, *argv: str, count: int = 1, comm: str = "", timeout: float = 60.0) -> set[int]:
        """Plant processes in the container; return their pids outside it.

        The pids are those of the guest's root namespace, and exact: when this
        returns all of them have executed the program. The kernel's name for
        them is that of the program, or `comm` (up to 15 bytes).
        """
        done = self.run("python3", "-IS", "/usr/lib/vmishim-lab/plant.py", str(count), comm, *argv, timeout=timeout)
        return {int(word) for word in done.stdout.split()}

    def kill(self, pids: Iterable[int], timeout: float = 30.0) -> None:
        """Kill processes of the guest and wait until they are gone."""
        doomed = set(pids)
        if doomed:
            self.run("kill", "-KILL", *map(str, sorted(doomed)), check=False)
            self.wait_until(lambda: not doomed & self.processes().keys(), "the killed processes to go", timeout)

    def processes(self) -> dict[int, str]:
        """Return the guest's processes, pid to name, from its ``/proc``.

        Thread group leaders, kernel threads too, but not the listing itself.
        The kernel decorates the names of its workers there:
        "kworker/0:1-events" is "kworker/0:1" in the task.
        """
        # grep runs once for all and repeats its prefix for a name with a newline.
        script = "echo $$; exec grep -Hs '' /proc/[0-9]*/comm"
        own, *lines = self.run("sh", "-c", script, check=False).stdout.decode(errors="surrogateescape").split("\n")
        found: dict[int, str] = {}
        for line in lines[:-1]:
            path, _, comm = line.partition(":")
            pid = int(path.split("/")[2])
            found[pid] = f"{found[pid]}\n{comm}" if pid in found else comm
        del found[int(own)]
        return found

    def wait_until(self, predicate: Callable[[], object], what: str, timeout: float = 30.0) -> None:
        """Wait for a condition; LabError names it after `timeout` seconds."""
        for pause in _pauses(time.monotonic() + timeout):
            if predicate():
                return
            time.sleep(pause)
        raise self._error(f"waited {timeout:g} s for {what}")

    def pause(self) -> None:
        """Stop the virtual CPUs, so that the guest's memory does not change."""
        self.monitor("stop")

    def resume(self) -> None:
        """Restart the virtual CPUs."""
        self.monitor("cont")

    def monitor(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Run a command of QEMU's monitor (QMP); return what it returns."""
        try:
            if self._monitor is None:
                self._monitor = Monitor(self.folder / "monitor.sock")
            return self._monitor.execute(command, arguments)
        except (OSError, ProtocolError) as error:
            raise self._error(f"monitor: {error}") from error

    def wait(self) -> None:
        """Wait for the guest to end by itself."""
        self._qemu.wait()

    def _ask(self, command: str, deadline: float, **arguments: object) -> Any:
        try:
            return self._agent.execute(command, max(deadline - time.monotonic(), 0.0), **arguments)
        except (OSError, ProtocolError) as error:
            raise self._error(f"guest agent: {error}") from error

    def _error(self, text: str) -> LabError:
        state = "" if self.alive else f"\nQEMU has ended with status {self._qemu.returncode}"
        with contextlib.suppress(FileNotFoundError):
            words = (self.folder / "qemu.log").read_text(errors="replace").strip()
            state += f"\nQEMU says: {words}" if words else ""
        tail = self.serial_tail(60).replace("\n", "\n  | ")
        return LabError(f"{text}{state}\nend of the guest's console:\n  | {tail}")

    def _await_ready(self, deadline: float) -> None:
        for pause in _pauses(deadline):
            if (self.folder / "monitor.sock").exists() or not self.alive:
                break
            time.sleep(pause)
        self._check_alive()
        self.port = self.forward(GUEST_PORT)
        while True:
            self._check_alive()
            try:
                self._agent.synchronise(min(0.5, max(deadline - time.monotonic(), 0.001)))
                break
            except (OSError, ProtocolError) as error:
                if time.monotonic() > deadline:
                    raise self._error("the guest agent did not answer in time") from error
        # Joins the job of the boot, and fails as that fails.
        left = max(deadline - time.monotonic(), 1.0)
        started = self.run("systemctl", "start", f"{CONTAINER}.service", timeout=left, check=False)
        if started.returncode:
            journal = self.run("journalctl", "-b", "-u", CONTAINER, "-o", "cat", check=False).stdout
            raise self._error(f"the container did not start:\n{journal.decode(errors='replace')}")

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._error("the VM ended while booting")

    def forward(self, port: int) -> int:
        """Forward a free port of the host's loopback to a port of the guest; return it."""
        for _ in range(20):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ours = int(probe.getsockname()[1])
            # Another process may take the port now: then QEMU says so here.
            rule = f"hostfwd_add net tcp:127.0.0.1:{ours}-:{port}"
            answer = self.monitor("human-monitor-command", {"command-line": rule})
            if not answer:
                return ours
        raise self._error(f"no port could be forwarded: {answer}")


def keep(
    *,
    kernel: str | None,
    memory_mib: int,
    cpus: int,
    nokaslr: bool,
    append: str,
    shell: bool,
    within: "Callable[[LabVM], contextlib.AbstractContextManager[None]] | None" = None,
) -> None:
    """Boot a VM and keep it until it ends or KeyboardInterrupt is raised.

    `shell` joins this terminal to a root shell on the guest's console. `within` is entered once the VM is ready.
    """
    if shell:
        append += " systemd.wants=lab-shell.service"
    with (
        _terminal_restored(),
        LabVM.boot(kernel, memory_mib=memory_mib, cpus=cpus, nokaslr=nokaslr, append=append, terminal=shell) as vm,
    ):
        say(f"lab: port {GUEST_PORT} of the guest is {vm.endpoint}")
        say(f"lab: memory {vm.ram}, console {vm.folder / 'serial.log'}; Ctrl-C ends the VM")
        with within(vm) if within else contextlib.nullcontext():
            vm.wait()


def _pauses(deadline: float) -> Iterator[float]:
    """Yield pauses between polls, 5 ms growing to 100, until the deadline."""
    for step in itertools.count():
        yield min(0.005 * 1.3**step, 0.1)
        if time.monotonic() > deadline:
            return


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    """Put the terminal back as it was: a QEMU that is killed does not."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
