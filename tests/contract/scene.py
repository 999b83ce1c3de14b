"""A lab VM as the contract needs it: a planted process, places, and the ways to read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lab.environment import genuine, symbol_map
from lab.vm import LabVM
from tests.contract.cases import Places
from tests.contract.genuine import Genuine
from vmishim.guests.ramfile import RamFile
from vmishim.libvmi import AccessContext, Libvmi
from vmishim.libvmi.config import MEMBERS
from vmishim.libvmi.constants import TranslateMechanism, VMIConfig


@dataclass
class Scene:
    """One guest for all of the contract."""

    vm: LabVM
    places: Places
    config: dict[str, int | str]
    """LibVMI's configuration of it, as a dictionary."""
    folder: Path

    @cached_property
    def python(self) -> str:
        """Interpreter of an environment that has the genuine bindings."""
        return str(genuine())

    def genuine(self) -> Genuine:
        """The genuine bindings on its memory."""
        arguments = {"config_mode": VMIConfig.DICT, "config": self.config}
        return Genuine(self.python, self.folder / "genuine.log", str(self.vm.ram), **arguments)

    def ramfile(self) -> Libvmi:
        """Ours on its memory, under the name that LibVMI's file driver has for it."""
        return Libvmi.over(RamFile(str(self.vm.ram), self.vm.ram))


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Boot a VM without KASLR, which LibVMI's file driver cannot find without being told, and plant a process.

    :param folder: for LibVMI's symbol map and its log
    """
    with LabVM.boot(nokaslr=True) as vm:
        sysmap = folder / "sysmap"
        sysmap.write_text(symbol_map(vm))
        with Libvmi.over(RamFile("lab", vm.ram)) as vmi:
            offsets = {name: vmi.get_offset(name) for name in MEMBERS}
            places = _places(vm, vmi)
        yield Scene(vm, places, {"ostype": "Linux", "sysmap": str(sysmap), **offsets}, folder)


def _planted(vm: LabVM) -> tuple[int, list[list[str]], int]:
    """A process that sleeps, the lines of its ``maps``, and where the last 8 bytes of its stack are."""
    for _ in range(10):
        (pid,) = vm.spawn("sleep", "infinity")
        maps = [line.split() for line in vm.read(f"/proc/{pid}/maps").decode().splitlines()]
        bounds = [[int(bound, 16) for bound in line[0].split("-")] for line in maps]
        (end,) = (end for line, (_, end) in zip(maps, bounds, strict=True) if line[-1] == "[stack]")
        # The vDSO is put at random, and may follow at once.
        if end not in (start for start, _ in bounds):
            return pid, maps, end - 8
    raise AssertionError("something is mapped right behind each stack")


def _places(vm: LabVM, vmi: Libvmi) -> Places:
    """From ``/proc``, and from memory what that does not say."""
    symbols = {words[2]: int(words[0], 16) for line in vm.kallsyms().decode().splitlines() if (words := line.split())}
    modules = [line.split() for line in vm.read("/proc/modules").decode().splitlines()]
    pid, maps, edge = _planted(vm)
    arguments_at = int(vm.read(f"/proc/{pid}/stat").decode().rsplit(")", 1)[1].split()[45])
    banner, init_task, dtb = symbols["linux_banner"], symbols["init_task"], vmi.pid_to_dtb(pid)
    vdso = next(int(words[0].split("-")[0], 16) for words in maps if words[-1] == "[vdso]")
    first = [line.split() for line in vm.read("/proc/1/maps").decode().splitlines()]
    libc = next(int(words[0].split("-")[0], 16) for words in first if words[-1].endswith("/libc.so.6"))

    def exported(owner: int, base: int, symbol: str) -> int:
        context = AccessContext(TranslateMechanism.PROCESS_PID, addr=base, pid=owner)
        return vmi.translate_sym2v(context, symbol) - base

    return Places(
        banner=banner,
        banner_pa=vmi.translate_kv2p(banner),
        crossing=(banner | 0xFFF) - 3,
        not_text=symbols["byte_rev_table"] + 1,
        zeros_pa=vmi.translate_kv2p(symbols["empty_zero_page"]),
        init_task=init_task,
        comm=init_task + vmi.get_offset("linux_name"),
        thread=next(int(words[5], 16) for words in modules if words[4] == "Live"),
        kpgd=vmi.get_offset("kpgd"),
        pid=pid,
        dtb=dtb,
        image=int(maps[0][0].split("-")[0], 16),
        argument=arguments_at,
        edge=edge,
        vdso=vdso,
        vdso_symbol=exported(pid, vdso, "__vdso_gettimeofday"),
        libc=libc,
        libc_symbol=exported(1, libc, "malloc"),
        memory=vmi.get_memsize(),
    )
