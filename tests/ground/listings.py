"""What other people's scripts say of a guest, held to its /proc, and what they cost.

Each scene runs on this machine (``tests/local``) and in the lab VM (``tests/guest``). Where others start and end
processes meanwhile, it is our own that are compared; each of them exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tests.ground.scripts import Scripts
from vmishim.errors import FaultError
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import Libvmi

WARM = 5
"""Requests that a script may take from its third pass on."""
PASSES = 8
TIMERS = """
import ctypes, time
libc, made = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
for _ in range(7):
    event = (ctypes.c_int * 16)(0, 0, 0, 1)  # struct sigevent: SIGEV_NONE
    assert not libc.timer_create(1, event, ctypes.byref(made))
time.sleep(10**6)
"""
THREADS = """
import threading, time
for _ in range(6):
    threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()
kept = [open("/etc/hostname") for _ in range(40)]
time.sleep(10**6)
"""


class Machine(Protocol):
    """What a scene needs of the machine that is read.

    :ivar others: whether processes start and end there that are not the scene's own
    """

    others: bool

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        ...

    def run(self, *command: str) -> str:
        """What a command prints."""
        ...

    def spawn(self, *command: str, count: int = 1) -> set[int]:
        """Start processes; their numbers."""
        ...

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition."""
        ...

    def guest(self) -> AgentGuest:
        """Its guest, read ahead of, by a connection of its own."""
        ...


class Listings:
    """Each scene: a script, again and again; what it says of what was planted; and its requests."""

    def check(
        self,
        machine: Machine,
        script: str,
        truth: Callable[[], Any],
        ours: Callable[[Any], Any],
        *,
        disturbed: int = WARM,
        again: bool = False,
        torn: bool = False,
    ) -> None:
        """What a script says is the truth in each pass, and from the third on it takes few requests.

        :param ours: the part of what the script says that stands still
        :param disturbed: how many requests where other processes start and end meanwhile, which are not on a trail yet
        :param torn: whether the kernel changes what the script reads while it reads it: it tries again if it misses one
        :param again: whether what was read is forgotten before each pass, as it would be a second later: of a script
            that looks at no list's head, and so begins no listing before
        """
        guest = machine.guest()
        try:
            scripts, costs, listed = Scripts(Libvmi.over(guest)), list[int](), None
            for number in range(PASSES):
                for attempt in range(20):
                    if again or (torn and attempt):
                        scripts.vmi.pagecache_flush()
                    before, said = guest.link.requests, truth()
                    try:
                        listed = ours(getattr(scripts, script)())
                    except FaultError:
                        continue  # a process ended, and its memory was used again, while the script was in it
                    if truth() == said and (listed == said or not torn):
                        break
                assert listed == said, f"pass {number}"
                costs.append(guest.link.requests - before)
            # A process that is started, or ends, is not on the trail yet: the median is what the script costs.
            most = disturbed if machine.others else WARM
            assert sorted(costs[2:])[len(costs[2:]) // 2] <= most, costs
            print(f"{script}: requests of {PASSES} passes: {costs}")
        finally:
            guest.close()

    def busy(self, machine: Machine) -> int:
        """A process with threads and open files, that sleeps."""
        (pid,) = machine.spawn("python3", "-c", THREADS)
        tasks, opened = f"/proc/{pid}/task", f"/proc/{pid}/fd"
        machine.wait_until(lambda: len(machine.run("ls", tasks).split()) == 7, "seven threads")
        machine.wait_until(lambda: len(machine.run("ls", opened).split()) >= 42, "forty open files")
        machine.wait_until(lambda: b"S (sleeping)" in machine.read(f"/proc/{pid}/status"), "it sleeps")
        return pid

    def test_paths_of_executables(self, machine: Machine) -> None:
        planted = machine.spawn("sleep", "1000000", count=5)

        def truth() -> dict[int, str]:
            return {pid: machine.run("readlink", f"/proc/{pid}/exe").strip() for pid in planted}

        self.check(machine, "executable_paths", truth, lambda listed: chosen(listed, planted))

    def test_paths_within_the_file_system(self, machine: Machine) -> None:
        planted = machine.spawn("sleep", "1000000", count=5)

        def truth() -> dict[int, str]:
            return {pid: machine.run("readlink", f"/proc/{pid}/exe").strip() for pid in planted}

        mounted = machine.run("findmnt", "-n", "-o", "TARGET", "-T", truth()[min(planted)]).strip()
        self.check(
            machine,
            "executable_dentries",
            lambda: {pid: path.removeprefix(mounted.rstrip("/")) for pid, path in truth().items()},
            lambda listed: chosen(listed, planted),
        )

    def test_processes_backward(self, machine: Machine) -> None:
        planted = machine.spawn("sleep", "1000000", count=5)
        named = dict.fromkeys(planted, "sleep")
        self.check(machine, "processes_backward", lambda: named, lambda listed: chosen(listed, planted))

    def test_children(self, machine: Machine) -> None:
        planted = machine.spawn("sleep", "1000000", count=5)

        def truth() -> dict[int, int]:
            stats = {pid: machine.read(f"/proc/{pid}/stat").decode() for pid in planted}
            return {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in stats.items()}

        self.check(machine, "family", truth, lambda listed: chosen(listed, planted), again=True)

    def test_threads(self, machine: Machine) -> None:
        pid = self.busy(machine)

        def truth() -> set[int]:
            return {int(tid) for tid in machine.run("ls", f"/proc/{pid}/task").split()}

        self.check(machine, "thread_groups", truth, lambda listed: {tid for tid, of in listed.items() if of == pid})

    def test_numbers_of_the_idr(self, machine: Machine) -> None:
        pid = self.busy(machine)

        def truth() -> set[int]:
            return {int(tid) for tid in machine.run("ls", f"/proc/{pid}/task").split()}

        self.check(machine, "all_pids", truth, lambda listed: truth() & listed.keys())

    def test_open_files(self, machine: Machine) -> None:
        pid = self.busy(machine)

        def truth() -> dict[int, int]:
            lines = machine.run("sh", "-c", f"stat -L -c '%n %i' /proc/{pid}/fd/*").splitlines()
            return {int(line.split()[0].rpartition("/")[2]): int(line.split()[1]) for line in lines}

        def ours(listed: dict[tuple[int, int], int]) -> dict[int, int]:
            return {number: inode for (of, number), inode in listed.items() if of == pid}

        self.check(machine, "all_files", truth, ours)

    def test_mounts(self, machine: Machine) -> None:
        def truth() -> dict[int, tuple[str, str]]:
            fields = [line.split() for line in machine.read("/proc/1/mountinfo").decode().splitlines()]
            after = [(int(each[0]), each[each.index("-") + 1 :]) for each in fields]
            return {number: (rest[1], rest[0].partition(".")[0]) for number, rest in after}

        # The list has the root of the namespace too, which is under all that is mounted.
        self.check(machine, "mounts", truth, lambda listed: chosen(listed, truth()))

    def test_the_tree_of_mounts(self, machine: Machine) -> None:
        def truth() -> dict[int, int]:
            fields = [line.split() for line in machine.read("/proc/1/mountinfo").decode().splitlines()]
            known = {int(each[0]) for each in fields}
            return {int(each[0]): int(each[1]) for each in fields if int(each[1]) in known}

        self.check(machine, "mount_tree", truth, dict)

    def test_super_blocks(self, machine: Machine) -> None:
        def truth() -> set[tuple[int, int]]:
            lines = machine.read("/proc/1/mountinfo").decode().splitlines()
            return {(int(each[0]), int(each[1])) for line in lines for each in [line.split()[2].split(":")]}

        def ours(listed: list[tuple[int, str]]) -> set[tuple[int, int]]:
            return {(device >> 20, device & (1 << 20) - 1) for device, _ in listed} & truth()

        self.check(machine, "super_blocks", truth, ours)

    def test_file_systems(self, machine: Machine) -> None:
        def truth() -> list[str]:
            return [line.split()[-1] for line in machine.read("/proc/filesystems").decode().splitlines()]

        def ours(listed: list[str]) -> list[str]:
            """All of them, or, where the kernel does not say where the first one is, those from process 1's root on."""
            return [*truth()[: -len(listed)], *listed]

        self.check(machine, "file_systems", truth, ours)

    def test_binary_formats(self, machine: Machine) -> None:
        names = re.compile(r"^(?:compat_)?load_(?:elf_binary|elf_fdpic_binary|script|misc_binary|aout_binary)$")

        lines = [line.split() for line in machine.read("/proc/kallsyms").decode().splitlines()]
        functions = {int(line[0], 16) for line in lines if line[1] in "tT"}

        def truth() -> set[int]:
            return {int(line[0], 16) for line in lines if names.match(line[2])}

        # What stands beside the list's head, which is no format, is no function.
        self.check(machine, "binary_formats", truth, lambda listed: listed & functions)

    def test_network_devices(self, machine: Machine) -> None:
        def truth() -> dict[str, int]:
            text = machine.run("sh", "-c", "cd /sys/class/net; grep . */ifindex")
            return {line.split("/")[0]: int(line.rpartition(":")[2]) for line in text.split()}

        self.check(machine, "net_devices", truth, lambda listed: chosen(listed, truth()))

    def test_objects_of_a_set(self, machine: Machine) -> None:
        def truth() -> set[str]:
            found = machine.run("sh", "-c", "find /sys/devices -name uevent -printf '%h\\n'").split()
            return {path.rpartition("/")[2] for path in found if not path.rpartition("/")[2].startswith(("rx-", "tx-"))}

        self.check(machine, "kobjects", truth, lambda listed: {name.replace("/", "!") for name in listed} & truth())

    def test_timers(self, machine: Machine) -> None:
        machine.spawn("sleep", "1000000", count=5)

        def truth() -> list[int]:
            text = machine.read("/proc/timer_list").decode()
            found = re.findall(r"# expires at \d+-(\d+) nsecs \[in (\d+) to", text)
            return sorted(int(end) for end, left in found if int(left) > 10**14)

        def ours(listed: Iterable[int]) -> list[int]:
            return sorted(end for end in listed if end in set(truth()))

        machine.wait_until(lambda: len(truth()) >= 5, "five timers")
        # Each timer that is new is three reads. The kernel turns the trees while they are read.
        self.check(machine, "timers", truth, ours, disturbed=100, torn=machine.others)

    def test_timers_of_processes(self, machine: Machine) -> None:
        (pid,) = machine.spawn("python3", "-c", TIMERS)

        def truth() -> set[int]:
            text = machine.read(f"/proc/{pid}/timers").decode()
            return {int(line.split()[1]) for line in text.splitlines() if line.startswith("ID:")}

        machine.wait_until(lambda: len(truth()) == 7, "seven timers")
        self.check(machine, "posix_timers", truth, lambda listed: listed[pid])

    def test_mappings(self, machine: Machine) -> None:
        pid = self.busy(machine)

        def truth() -> set[tuple[int, int, int]]:
            lines = [line.split() for line in machine.read(f"/proc/{pid}/maps").decode().splitlines()]
            ends = [(line[0].split("-"), int(line[4])) for line in lines if line[-1] != "[vsyscall]"]
            return {(int(start, 16), int(end, 16), inode) for (start, end), inode in ends}

        # What is new on one of the dozen levels of the trees is a request of its own.
        self.check(machine, "all_mappings", truth, lambda listed: listed[pid], disturbed=40)


def chosen(listed: dict[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """The part that is ours."""
    return {key: listed[key] for key in keys if key in listed}
