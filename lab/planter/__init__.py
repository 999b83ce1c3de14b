"""Kernel memory to plant lists in, without a module: an eBPF array map is kernel memory that user space can fill.

A process beside the agent holds the map (``plant.py``); tests and benchmarks write layouts to it, and read them back
through the agent, which knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.agent import AGENT
from lab.vm import LabVM

ROOT = Path(__file__).parents[2]
TOOL = Path(__file__).parent
WHERE = "/run/planter"
Stores = list[tuple[int, int]]
"""Words to store: (offset, value)."""


class Planter:
    """Kernel memory at ``address``, ``size`` bytes of it, zero at first. Behind it comes a page that is not there.

    :param order: carries an order, a line of JSON and its bytes, to the process that holds the memory, and brings its
        answer
    """

    def __init__(self, first: bytes, order: Callable[[bytes], bytes]) -> None:
        ground = json.loads(first)
        self.address: int = ground["address"]
        self.size: int = ground["size"]
        self._order = order

    def write(self, at: int, data: bytes) -> None:
        """Put ``data`` at ``address + at``."""
        packed = zlib.compress(data, 1)
        self._tell({"do": "write", "at": at, "size": len(packed)}, packed)

    def words(self, at: int, *values: int) -> None:
        """Put u64 values at ``address + at``."""
        self.write(at, struct.pack(f"<{len(values)}Q", *values))

    def clear(self) -> None:
        """Zeroes everywhere."""
        self.write(0, bytes(self.size))

    @contextlib.contextmanager
    def stirring(self, rounds: Sequence[Stores]) -> Iterator[list[int]]:
        """Store words round after round for as long as the block runs. The list it gives then holds how often."""
        self._tell({"do": "stir", "rounds": rounds})
        done: list[int] = []
        try:
            yield done
        finally:
            done.append(self._tell({"do": "rest"}))

    def _tell(self, order: dict[str, Any], data: bytes = b"") -> int:
        return int(self._order(json.dumps(order).encode() + b"\n" + data))


@contextlib.contextmanager
def here() -> Iterator[Planter]:
    """Ground in this machine's kernel. :raises RuntimeError: it can't be had here (no root, no eBPF, no clang)"""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_planter(Path(folder, "planter.o"))
        command = [sys.executable, "-I", str(TOOL / "plant.py"), str(ROOT), str(compiled)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        sends, answers = child.stdin, child.stdout

        def order(message: bytes) -> bytes:
            sends.write(message)
            sends.flush()
            return answers.readline()

        try:
            first = answers.readline()
            if not first:
                raise RuntimeError(f"no ground in this kernel: {child.stderr.read().decode().strip()}")
            yield Planter(first, order)
        finally:
            sends.close()
            child.wait(30)
            answers.close()
            child.stderr.close()


@contextlib.contextmanager
def inside(vm: LabVM) -> Iterator[Planter]:
    """Ground in the kernel of a lab VM that has an agent."""
    with tempfile.TemporaryDirectory() as folder:
        vm.write(f"{WHERE}/planter.o", compile_planter(Path(folder, "planter.o")).read_bytes())
    vm.write(f"{WHERE}/plant.py", (TOOL / "plant.py").read_bytes())
    vm.run("mkfifo", f"{WHERE}/in", f"{WHERE}/out")
    unit = ["systemd-run", "--quiet", "--unit=planter", "--collect", "--", "python3", f"{WHERE}/plant.py"]
    vm.run(*unit, AGENT, f"{WHERE}/planter.o", f"{WHERE}/in", f"{WHERE}/out")

    def order(message: bytes) -> bytes:
        script = f"cat >{WHERE}/in; read -r line <{WHERE}/out; echo $line"
        return vm.run("sh", "-c", script, input=message).stdout

    try:
        yield Planter(vm.run("sh", "-c", f"read -r line <{WHERE}/out; echo $line").stdout, order)
    finally:
        vm.run("systemctl", "stop", "planter", check=False)
        vm.run("rm", "-r", WHERE)


def compile_planter(target: Path) -> Path:
    """Compile ``planter.bpf.c`` to ``target`` with the flags and tools of ``bpf/Makefile``.

    :raises RuntimeError: that failed
    """
    make = ["make", "--silent", "-C", str(ROOT / "bpf"), "-f", "Makefile", f"OUT={target.parent}"]
    source = shutil.copy(TOOL / "planter.bpf.c", target.with_suffix(".bpf.c"))
    rule = [f"--eval={target}: {source} ; $(CLANG) $(CFLAGS) -c $< -o $@ && $(STRIP) -g $@", str(target)]
    made = subprocess.run([*make, *rule], capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"planter.bpf.c was not built: {made.stderr.strip()}")
    return target


@dataclass
class Layout:
    """Structures to be planted together, at addresses known before they are."""

    planter: Planter
    image: bytearray = field(default_factory=bytearray)

    def room(self, size: int) -> int:
        """The address of ``size`` zero bytes, aligned to eight."""
        address = self.planter.address + len(self.image)
        self.image += bytes(-(-size // 8) * 8)
        if len(self.image) > self.planter.size:
            raise ValueError(f"{len(self.image)} bytes do not fit in {self.planter.size}")
        return address

    def put(self, address: int, *values: int) -> None:
        """Words at ``address``."""
        struct.pack_into(f"<{len(values)}Q", self.image, address - self.planter.address, *values)

    def blob(self, address: int, data: bytes) -> None:
        """Bytes at ``address``."""
        at = address - self.planter.address
        self.image[at : at + len(data)] = data

    def plant(self) -> None:
        """Write all of it."""
        self.planter.write(0, bytes(self.image))

    def nodes(self, count: int, size: int) -> list[int]:
        """Room for nodes whose order in memory is not that of the list, each holding its number in its first word."""
        first = self.room(count * size)
        step = next(prime for prime in (7919, 104729, 1) if count % prime)
        addresses = [first + number * step % count * size for number in range(count)]
        for number, address in enumerate(addresses):
            self.put(address, number)
        return addresses

    def ring(self, links: Sequence[int]) -> None:
        """Make a ``list_head`` ring of these links, in this order; a head is one of them."""
        for at, link in enumerate(links):
            self.put(link, links[(at + 1) % len(links)], links[at - 1])

    def chain(self, head: int, links: Sequence[int], end: int = 0) -> None:
        """Make a chain of single pointers that begins at ``head`` and ends in ``end``."""
        for here, there in zip((head, *links), (*links, end), strict=True):
            self.put(here, there)
