"""A guest's memory in a file, by the agent: what other programs and the VM's own RAM say of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, BinaryIO

import pytest

from lab.agent import InstalledAgent, install
from lab.environment import interpreter
from lab.vm import CONTAINERS_SLICE, LabVM
from tests.guest import isf
from tests.guest.ids import FEW_BUCKETS
from tests.guest.test_volatility import VERSION
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests.ramfile import Ram, RamFile
from vmishim.inspection import objects
from vmishim.libvmi import Libvmi
from vmishim.memory.reader import PHYSICAL
from vmishim.wire.keys import save_private

DRGN = "0.3.0"
ONE = ("--connections", "1")
PAGE = 4096
PAGES = 64
ROUNDS = f"""\
import ctypes, mmap, sys
memory = mmap.mmap(-1, {PAGES * PAGE})
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
words = [ctypes.c_uint64.from_buffer(memory, at) for at in range(0, {PAGES * PAGE}, {PAGE})]
count = 1
while True:
    for word in words:
        word.value = count
    if count == 1:
        open("/tmp/rounds", "w").write(str(address))
    count += 1
"""
"""A process that writes the number of the round into each of its pages, one after another, as fast as it can."""


@dataclass(frozen=True)
class Dumping:
    """``vmishim dump`` of a VM, from outside."""

    vm: LabVM
    agent: InstalledAgent
    folder: Path

    @classmethod
    def of(cls, vm: LabVM, agent: InstalledAgent, folder: Path) -> Dumping:
        save_private(folder / "key", agent.private)
        entry = f'agent = "{agent.endpoint}"\nagent_key = "{agent.public.text}"\nkey = "{folder}/key"\ntimeout = 30.0\n'
        (folder / "domains.toml").write_text(f"[lab]\n{entry}\n[soon]\n{entry.replace('30.0', '2.0')}")
        return cls(vm, agent, folder)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start it."""
        command = [sys.executable, "-m", "vmishim.cli", "dump", *words]
        environment = os.environ | {"VMISHIM_CONFIG": str(self.folder / "domains.toml")}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *words: str) -> tuple[int, str, str]:
        """(exit status, what it prints, errors)."""
        child = self.begin(*words)
        out, errors = child.communicate(timeout=300)
        return child.returncode, out, errors

    def done(self, *words: str) -> str:
        """What it prints when all is well."""
        status, out, errors = self.run(*words)
        assert status == 0, errors
        return out

    def said(self, path: Path) -> dict[str, Any]:
        """The manifest."""
        found: dict[str, Any] = json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
        return found


def pieces(path: Path) -> int:
    """How many pieces an unfinished dump has."""
    journal = path.with_name(f"{path.name}.journal")
    return journal.read_text().count("\n[") if journal.exists() else 0


def wait_for(path: Path, count: int, child: subprocess.Popen[str]) -> None:
    """Wait until an unfinished dump has so many pieces."""
    until = monotonic() + 120
    while pieces(path) < count:
        assert child.poll() is None, child.communicate()
        assert monotonic() < until, f"{path} has {pieces(path)} pieces, not {count}"
        sleep(0.02)


@pytest.fixture(scope="module")
def dumping(lab: LabVM, agent: InstalledAgent, tmp_path_factory: pytest.TempPathFactory) -> Dumping:
    return Dumping.of(lab, agent, tmp_path_factory.mktemp("dump"))


def test_what_was_read_before_ctrl_c_can_be_finished(dumping: Dumping) -> None:
    """The tests of whole dumps take longer: pytest --long."""
    path, key = dumping.folder / "part.elf", ("--key", str(dumping.folder / "key"))
    child = dumping.begin("lab", "-o", str(path), *ONE)
    wait_for(path, 4, child)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "vmishim: interrupted. " in errors
    status, _, errors = dumping.run("lab", "-o", str(path))
    assert status == 1
    assert "--resume goes on with it" in errors
    dumping.done("--finish", str(path), *key)
    dumping.done("--verify", str(path), *key)
    said = dumping.said(path)
    assert said["complete"] is False
    assert said["vmcoreinfo"] == "the guest's memory"
    assert said["ram"] == [f"{start:#x}-{end:#x}" for start, end in system_ram(dumping.vm)]
    (rest, *_) = said["not_read"]
    end = int(rest.split("-")[0], 16)
    ram = Ram(path)
    read = [(start, min(stop, end)) for start, stop in system_ram(dumping.vm) if start < end]
    for start, stop in read:
        assert len(ram.read(start, stop - start)) == stop - start
    with pytest.raises(FaultError):
        ram.read(end, 1)
    ram.close()


@dataclass(frozen=True)
class Dumped:
    path: Path
    planted: set[int]
    before: dict[int, str]
    after: dict[int, str]
    messages: list[str]
    """What was said each time that it stopped."""
    refused: str
    """What was said to its continuation with another boot of the guest."""


@pytest.fixture(scope="module")
def core(dumping: Dumping) -> Iterator[Dumped]:
    """The kernel's memory of the lab VM; ended by SIGTERM, then by an agent that ended, and resumed each time."""
    vm, path = dumping.vm, dumping.folder / "core.elf"
    planted = vm.spawn("sleep", "infinity", count=9, comm="in the dump")
    before = vm.processes()
    child = dumping.begin("soon", "-o", str(path), "--kernel-only", *ONE)
    wait_for(path, 5, child)
    child.send_signal(signal.SIGTERM)
    messages = [child.communicate(timeout=60)[1]]
    assert child.returncode == 128 + signal.SIGTERM
    have = pieces(path)
    assert have >= 5
    journal = path.with_name("core.elf.journal")
    text, boot = journal.read_text(), boot_id(vm)
    assert boot in text
    journal.write_text(text.replace(boot, boot[::-1]))
    status, _, refused = dumping.run("soon", "-o", str(path), "--resume", *ONE)
    assert status == 1
    assert journal.read_text() == text.replace(boot, boot[::-1])
    journal.write_text(text)
    child = dumping.begin("soon", "-o", str(path), "--resume", *ONE)
    wait_for(path, have + 5, child)
    vm.run("systemctl", "stop", "vmishim-agent")
    messages.append(child.communicate(timeout=60)[1])
    assert child.returncode == 1
    vm.run("systemctl", "start", "vmishim-agent", timeout=120)
    dumping.done("lab", "-o", str(path), "--resume")
    yield Dumped(path, planted, before, vm.processes(), messages, refused)
    vm.kill(planted)


@pytest.mark.long
def test_what_stopped_it_and_how_to_go_on_is_said(core: Dumped) -> None:
    terminated, lost = core.messages
    assert "vmishim: ended by SIGTERM. " in terminated
    assert re.search(r"^vmishim: .*(nothing answered at|closed the connection)", lost, re.M)
    for message in core.messages:
        assert f"an unfinished dump: `vmishim dump soon -o {core.path} --resume` goes on with it" in message


@pytest.mark.long
def test_a_dump_has_the_processes_that_were_there_all_the_time(core: Dumped) -> None:
    with Libvmi.over(RamFile("dump", core.path)) as dumped:
        tasks = {task.pid: task.comm for task in objects.tasks(dumped) if task.pid == task.tgid}
    assert {pid for pid, comm in tasks.items() if comm == "in the dump"} == core.planted
    assert core.before.keys() & core.after.keys() <= tasks.keys()
    # Nothing else but what started, and may have ended, in between.
    new = range(max(core.before) + 1, max(core.after) + 1000)
    assert tasks.keys() <= {0, *core.before, *core.after, *new}


@pytest.mark.long
def test_the_kernels_text_is_that_of_the_vms_own_ram(dumping: Dumping, core: Dumped) -> None:
    live, dumped = RamFile("live", dumping.vm.ram), RamFile("dump", core.path)
    with closing(live), closing(dumped):
        start, end = (live.profile.symbol(name) for name in ("_text", "_etext"))
        assert dumped.profile.symbol("_text") == start
        assert dumped.read(start, end - start) == live.read(start, end - start)


@pytest.mark.long
def test_memory_of_a_process_is_left_out_and_faults(core: Dumped) -> None:
    pid = min(core.planted)
    with Libvmi.over(RamFile("dump", core.path)) as vmi:
        task = next(task for task in objects.tasks(vmi) if task.pid == pid)
        mm = vmi.read_addr_va(task.address + vmi.vmi.profile.member("task_struct", "mm").offset, 0)
        stack = vmi.read_addr_va(mm + vmi.vmi.profile.member("mm_struct", "start_stack").offset, 0)
        assert vmi.translate_uv2p(stack, pid)  # its page tables are the kernel's
        with pytest.raises(LibvmiError, match="VMI_FAILURE"):
            vmi.read_64_va(stack & -PAGE, pid)


@pytest.mark.long
def test_a_dump_says_what_it_is_and_a_changed_byte_is_found(dumping: Dumping, core: Dumped) -> None:
    key = ("--key", str(dumping.folder / "key"))
    assert "is as it was written" in dumping.done("--verify", str(core.path), *key)
    said = dumping.said(core.path)
    assert said["complete"] is True
    assert said["kernel_only"] is True
    assert said["unreadable"] == []
    assert said["vmcoreinfo"] == "the guest's memory"
    assert len(said["sessions"]) == 3
    assert said["ram"] == [f"{start:#x}-{end:#x}" for start, end in system_ram(dumping.vm)]
    assert said["guest"]["boot_id"] == boot_id(dumping.vm)
    changed = dumping.folder / "changed.elf"
    for suffix in ("", ".manifest.json", ".manifest.sig"):
        shutil.copy(f"{core.path}{suffix}", f"{changed}{suffix}")
    chunk = said["chunks"][7]
    address, size, offset = (int(word, 0) for word in chunk.split()[:3])
    with changed.open("r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)[0]
        file.seek(offset + size // 2)
        file.write(bytes([byte ^ 1]))
    status, out, _ = dumping.run("--verify", str(changed), *key)
    assert status == 1
    assert f"the memory from {address:#x} to {address + size:#x}" in out


@pytest.mark.long
def test_makedumpfile_finds_the_kernels_log(dumping: Dumping, core: Dumped) -> None:
    log = dumping.folder / "log.txt"
    done = subprocess.run(["makedumpfile", "--dump-dmesg", str(core.path), str(log)], capture_output=True, text=True)
    assert done.returncode == 0, done
    lines = {line.partition("] ")[2] for line in log.read_text(errors="replace").splitlines()}
    guest = dumping.vm.run("dmesg").stdout.decode(errors="replace").splitlines()
    expected = [line.partition("] ")[2] for line in guest[:100]]
    assert len(expected) == 100
    assert set(expected) <= lines


@pytest.mark.long
def test_drgn_reads_a_core_by_all_its_addresses(core: Dumped) -> None:
    """By physical addresses, by those of the direct map and of the image, and by page tables (``vmalloc``)."""
    with closing(RamFile("dump", core.path)) as dumped:
        profile = dumped.profile
        pointers = (
            profile.symbol("modules"),
            profile.symbol("init_task") + profile.member("task_struct", "tasks").offset,
        )
        module, task = (int.from_bytes(dumped.read(at, 8), "little") for at in pointers)
        places = [(at, 64) for at in (profile.symbol("linux_banner"), module, task, profile.page_offset + 0x1000)]
        expected = [dumped.read(*place).hex() for place in places]
        physical = dumped.read(0x1000, 64, PHYSICAL).hex()
    script = (
        "import drgn, sys; prog = drgn.Program(); prog.set_core_dump(sys.argv[1])\n"
        f"print(*(prog.read(*place).hex() for place in {places!r}), prog.read(0x1000, 64, physical=True).hex())\n"
        "print(prog['UTS_RELEASE'].string_().decode())"
    )
    command = [str(interpreter("drgn", DRGN)), "-I", "-c", script, str(core.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:-1] == [*expected, physical]
    assert words[-1] == profile.release


@pytest.mark.long
def test_volatility_lists_the_same_tasks(dumping: Dumping, core: Dumped) -> None:
    symbols, cache = dumping.folder / "symbols" / "linux", dumping.folder / "cache"
    symbols.mkdir(parents=True)
    cache.mkdir()
    with Libvmi.over(RamFile("dump", core.path)) as dumped:
        tasks = {(task.pid, task.comm) for task in objects.tasks(dumped) if task.pid == task.tgid}
        moved = dumped.vmi.profile.kaslr_offset
        banner = dumped.read_va(dumped.translate_ksym2v("linux_banner"), 0, 512)[0].split(b"\0")[0] + b"\0"
    made = isf.make(dumping.vm.run("cat", "/sys/kernel/btf/vmlinux").stdout, dumping.vm.kallsyms(), moved, banner)
    (symbols / "kernel.json").write_text(json.dumps(made))
    program = str(interpreter("volatility3", VERSION).with_name("vol"))
    places = ["-s", str(symbols.parent), "--cache-path", str(cache), "-f", str(core.path)]
    command = [program, "-q", "--offline", *places, "-r", "json", "linux.pslist"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {(row["PID"], row["COMM"]) for row in json.loads(done.stdout)} == tasks - {(0, "swapper/0")}


@pytest.mark.long
def test_another_boot_of_the_guest_is_refused(core: Dumped) -> None:
    assert "was begun on another boot of soon" in core.refused
    assert "--finish" in core.refused


@pytest.mark.long
@pytest.mark.parametrize(("format", "bit"), [("elf", 51), ("lime", 51), ("lime", 47)])
def test_a_dump_of_a_guest_under_amd_sev_is_read(dumping: Dumping, core: Dumped, format: str, bit: int) -> None:
    """What the lab VM's memory would be there: the C-bit in each page-table entry, and where the kernel says it is."""
    path = dumping.folder / f"sev-{bit}.{format}"
    if format == "elf":
        shutil.copy(core.path, path)
    else:
        with (dumping.folder / "domains.toml").open("a") as file:
            file.write(f'\n[core-{bit}]\nramfile = "{core.path}"\n')
        key = ("--key", str(dumping.folder / "key"))
        dumping.done(f"core-{bit}", "-o", str(path), "--format", format, "--kernel-only", *key)
    with Libvmi.over(RamFile("dump", core.path)) as plain:
        tasks, modules = list(objects.tasks(plain)), list(objects.modules(plain))
        roots = {plain.vmi.profile.root}
        for task in tasks:
            with suppress(LibvmiError):  # kernel threads have none of their own
                roots.add(plain.pid_to_dtb(task.pid))
        mask = plain.translate_ksym2v("sme_me_mask")
        with closing(Ram(path)) as ram, path.open("r+b") as file:
            set_bit(ram, file, roots, plain.vmi.profile.levels, 1 << bit)
            put(ram, file, plain.translate_kv2p(mask), struct.pack("<Q", 1 << bit))
            if format == "elf":
                head = os.pread(file.fileno(), 1 << 20, 0)
                old = b"NUMBER(KERNEL_IMAGE_SIZE)=1073741824\nNUMBER(sme_mask)=0\n"
                assert head.count(old) == 1
                new = (b"NUMBER(sme_mask)=%d\nPAD=" % (1 << bit)).ljust(len(old) - 1, b"x") + b"\n"
                os.pwrite(file.fileno(), new, head.index(old))
    with Libvmi.over(RamFile("sev", path)) as read:
        assert list(objects.tasks(read)) == tasks
        assert list(objects.modules(read)) == modules
    path.unlink()


def set_bit(ram: Ram, file: BinaryIO, roots: set[int], levels: int, bit: int) -> None:
    """Set a bit in each present entry of all page tables below ``roots``."""
    done: set[int] = set()
    waiting = [(root, levels) for root in roots]
    while waiting:
        table, level = waiting.pop()
        if table in done:
            continue
        done.add(table)
        try:
            entries = struct.unpack("<512Q", ram.read(table, PAGE))
        except FaultError:
            continue
        below = [entry for entry in entries if entry & 1 and level > 1 and not (level < 4 and entry & 0x80)]
        waiting += [(entry & 0x000F_FFFF_FFFF_F000, level - 1) for entry in below]
        put(ram, file, table, struct.pack("<512Q", *(entry | bit if entry & 1 else entry for entry in entries)))


def put(ram: Ram, file: BinaryIO, address: int, data: bytes) -> None:
    """Write to a dump by guest physical address."""
    segment = ram.segment(address)
    os.pwrite(file.fileno(), data, address - segment.start + segment.offset)


# ---- all RAM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    """A small one."""
    with LabVM.boot(request.param, memory_mib=320, append=FEW_BUCKETS) as booted:
        yield booted


@pytest.mark.long
def test_a_frozen_container_is_of_one_instant_and_everything_is_in_the_file(vm: LabVM, tmp_path: Path) -> None:
    """All RAM, with the container frozen: a process that never rests has no two pages of different rounds but one."""
    dumping = Dumping.of(vm, install(vm, "--freeze", CONTAINERS_SLICE), tmp_path)
    (pid,) = vm.spawn("python3", "-IS", "-c", ROUNDS, comm="rounds")
    planted = f"/proc/{pid}/root/tmp/rounds"
    vm.wait_until(lambda: vm.run("test", "-s", planted, check=False).returncode == 0, "the rounds to begin")
    address = int(vm.read(planted))
    path = tmp_path / "all.elf"
    said = dumping.done("lab", "-o", str(path), "--freeze")
    assert "frozen all the time" in said
    with Libvmi.over(RamFile("dump", path)) as dumped:
        rounds = [dumped.read_64_va(address + at, pid) for at in range(0, PAGES * PAGE, PAGE)]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] - rounds[-1] <= 1
    # The process goes on.
    with Libvmi.over(RamFile("live", vm.ram)) as live:
        vm.wait_until(lambda: live.read_64_va(address, pid) > rounds[0], "the rounds to go on")
    everything_is_there(vm, path)
    lime = tmp_path / "all.lime"
    with (tmp_path / "domains.toml").open("a") as file:
        file.write(f'\n[core]\nramfile = "{path}"\n')
    dumping.done("core", "-o", str(lime), "--format", "lime", "--key", str(tmp_path / "key"))
    one, other = Ram(path), Ram(lime)
    for start, end, _ in other.segments:
        for at in range(start, end, 1 << 20):
            size = min(1 << 20, end - at)
            assert one.read(at, size) == other.read(at, size)
    one.close()
    other.close()


def everything_is_there(vm: LabVM, path: Path) -> None:
    """All of the kernel's RAM is in the file, and none but that."""
    ram = Ram(path)
    for start, end in system_ram(vm):
        for at in range(start, end, 1 << 20):
            assert len(ram.read(at, min(1 << 20, end - at))) == min(1 << 20, end - at)
        for outside in (start - 1, end):
            with pytest.raises(FaultError):
                ram.read(outside, 1)
    ram.close()


def boot_id(vm: LabVM) -> str:
    """Which boot this is."""
    return vm.run("cat", "/proc/sys/kernel/random/boot_id").stdout.decode().strip()


def system_ram(vm: LabVM) -> list[tuple[int, int]]:
    """The kernel's RAM, by ``/proc/iomem``."""
    found = re.findall(r"(?m)^(\w+)-(\w+) : System RAM$", vm.read("/proc/iomem").decode())
    return [(int(start, 16), int(end, 16) + 1) for start, end in found]
