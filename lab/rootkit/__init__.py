"""A rootkit of our own, for intrusion detection to find: built against Debian's headers of a lab kernel, loaded into a
lab VM."""

from __future__ import annotations

from pathlib import Path

from lab import modules
from lab.vm import LabVM

HERE = Path(__file__).parent
PLACE = "/run/rootkit.ko"
COMMAND = "/sys/module/rootkit/parameters/command"


class Rootkit:
    """The module in a running lab VM.

    :param vm: where it is loaded
    :raises lab.vm.CommandError: the kernel does not take it
    """

    def __init__(self, vm: LabVM) -> None:
        self.vm = vm
        self.symbols = _addresses(vm)
        vm.write(PLACE, modules.build(HERE, vm.image.release).read_bytes())
        places = (f"{name}_at={self.symbols[name]:#x}" for name in ("tasklist_lock", "modules"))
        vm.run("insmod", PLACE, *places)
        self.symbols = _addresses(vm)

    def do(self, verb: str, *numbers: int) -> None:
        """Give a command of ``rootkit.c``. :raises lab.vm.CommandError: the module refused it"""
        line = " ".join([verb, *map(hex, numbers)])
        self.vm.run("sh", "-c", 'printf %s "$1" >"$2"', "sh", line, COMMAND)

    def restore(self) -> None:
        """Undo all that was done."""
        self.do("restore")

    def unload(self) -> None:
        """Undo all, and leave."""
        self.restore()
        self.vm.run("rmmod", "rootkit")


def _addresses(vm: LabVM) -> dict[str, int]:
    """Addresses of the kernel's symbols, and of its modules'; of names that occur twice the first."""
    found: dict[str, int] = {}
    for line in vm.kallsyms().decode().splitlines():
        address, _, name, *_ = line.split()
        found.setdefault(name, int(address, 16))
    return found
