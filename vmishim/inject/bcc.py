"""Compile a program by bcc against the headers of one kernel, for a guest whose kernel has no BTF.

bcc only generates instructions, which needs no privilege. Where the program is loaded, its maps are made and their
descriptors are patched in (``guest_agent/bytecode.py``): bcc's own loader cannot load a syscall program, because it
cannot set BPF_F_SLEEPABLE. bcc runs in a process of its own, since Debian packages it for Debian's interpreter only,
and LLVM ends the process when it cannot compile something.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from vmishim import isolated
from vmishim.inject.errors import CompileError
from vmishim.inject.source import complaint, header, source_file
from vmishim.kernel.offsets import Offsets
from vmishim.wire.injection import INSTRUCTION, LD_IMM64, Bundle, MapDefinition

MAP_NUMBERS = {0x7601: "input", 0x7602: "output"}
"""What ``inject.h`` has in place of its maps' descriptors: ``inject_input_number``, ``inject_output_number``."""
_KINDS = ("offset", "size")
_MOV_IMM, _EXIT = 0xB7, 0x95

# Runs under the interpreter that has bcc; prints the instructions of functions in hexadecimal.
_COMPILER = """
import json, os, sys
from bcc import BPF
request = json.load(sys.stdin)
os.environ["BCC_KERNEL_SOURCE"] = request["source"]
program = BPF(text=request["text"].encode(), cflags=request["flags"])
json.dump({name: program.dump_func(name.encode()).hex() for name in request["functions"]}, sys.stdout)
"""


@dataclass(frozen=True)
class Headers:
    """The headers of one kernel.

    :ivar build: the folder of what was generated for it (its ``include/generated``)
    :ivar source: the folder of what it shares with kernels of the same version; may be the same
    :ivar release: its ``uname -r``
    """

    build: Path
    source: Path
    release: str

    @classmethod
    def find(cls, folder: Path) -> Self:
        """The headers in a folder: ``/usr/src/linux-headers-RELEASE``, ``/lib/modules/RELEASE/build``, or the same
        below another root into which packages were unpacked.

        :raises CompileError: no headers, or half of a split package
        """
        build = folder.resolve()
        said = build / "include" / "generated" / "utsrelease.h"
        found = re.search(r'UTS_RELEASE "(.+)"', said.read_text()) if said.is_file() else None
        if found is None:
            raise CompileError(
                f"{folder} holds no kernel headers (no include/generated/utsrelease.h): name the folder of "
                "linux-headers-RELEASE, where RELEASE is the guest's `uname -r`"
            )
        source = build
        if not (build / "include" / "linux" / "kconfig.h").is_file():
            # Debian splits the package: the Makefile's only line includes the other half's, by its installed path.
            makefile = build / "Makefile"
            line = re.search(
                r"^include (.+)/Makefile$", makefile.read_text() if makefile.is_file() else "", re.MULTILINE
            )
            places = [Path(line[1]), build.parent / Path(line[1]).name] if line else []
            # If packages were unpacked elsewhere, the half installed here may be of another version.
            usable = [place for place in reversed(places) if (place / "include" / "linux" / "kconfig.h").is_file()]
            if not usable:
                wanted = places[-1].name if places else "the source they were made from"
                raise CompileError(f"{folder} is only half of the headers: unpack {wanted} beside it")
            source = usable[0]
        return cls(build, source, found[1])

    @property
    def flags(self) -> list[str]:
        """Include folders for clang, beyond those of ``source``, which bcc adds by itself."""
        generated = (
            "arch/x86/include/generated",
            "include",
            "arch/x86/include/generated/uapi",
            "include/generated/uapi",
        )
        return [f"-I{self.build / part}" for part in generated]


def compile_by_headers(source: str | Path, headers: Path, *, license: str = "GPL") -> bytes:
    """Compile a program against kernel headers, to a bundle for their kernel.

    :param source: C text, or a file of it
    :param headers: see `Headers.find`
    :param license: the license given to the kernel, which allows only GPL programs to read its memory
    :raises CompileError: it does not compile, or bcc or headers are missing; ``log`` has all messages
    """
    found = Headers.find(headers)
    names = list(MAP_NUMBERS.values())
    sizes = [f"int inject_{name}_size(void *unused) {{ return sizeof(struct inject_{name}); }}" for name in names]
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        file = source_file(source, Path(folder))
        text = "\n".join((file.read_text(errors="replace"), *sizes))
        flags = ["-DBY_HEADERS", f"-I{header().parent}", f"-I{file.parent}", *found.flags]
        functions = run_bcc(found, text, flags, ["run", *(f"inject_{name}_size" for name in names)], file.name)
    maps = [MapDefinition.array(name, constant(functions[f"inject_{name}_size"])) for name in names]
    instructions = functions["run"]
    return Bundle(found.release, license, maps, _patches(instructions), instructions).pack()


HOLDERS = (
    *("linux/sched.h", "linux/sched/signal.h", "linux/cred.h", "linux/pid.h", "linux/nsproxy.h", "linux/mm_types.h"),
    *("linux/fs.h", "linux/fdtable.h", "linux/dcache.h", "linux/mount.h", "linux/path.h", "linux/module.h"),
    *("linux/netdevice.h", "net/net_namespace.h", "net/sock.h", "net/inet_sock.h", "net/inet_hashtables.h"),
)
"""Headers that declare the structures an IDS reads. The kernel's internal headers (``fs/mount.h``) are not packaged, so
their members cannot be found this way."""


def member_offsets(headers: Path, names: Iterable[str], holders: Sequence[str] = HOLDERS) -> Offsets:
    """Offsets and sizes of members in the kernel of these headers; members they do not declare are left out.

    :param names: ``"task_struct comm"``, ``"sock __sk_common.skc_num"``; a structure alone asks for its size
    :param holders: headers to include
    :raises CompileError: bcc or headers are missing, or the headers do not compile; ``log`` has all messages
    """
    found = Headers.find(headers)
    left = sorted(set(names))
    for name in left:
        if not re.fullmatch(r"\w+( [\w.]+)?", name):
            raise CompileError(f"{name!r} is not a member: give a structure and a member, such as 'task_struct comm'")
    text = "".join(f"#include <{holder}>\n" for holder in holders)
    first = text.count("\n") + 1
    # One line for each name, so that an error's line number tells which name the kernel does not have. The compiler
    # reports all of them at once, so a second attempt is enough.
    for _ in range(2):
        lines = []
        for number, name in enumerate(left):
            struct, _, member = name.partition(" ")
            offset = f"offsetof(struct {struct}, {member})" if member else "0"
            size = f"sizeof(((struct {struct} *)0)->{member})" if member else f"sizeof(struct {struct})"
            lines.append(
                f"int offset_{number}(void *u) {{ return {offset}; }} int size_{number}(void *u) {{ return {size}; }}\n"
            )
        functions = [f"{kind}_{number}" for number in range(len(left)) for kind in _KINDS]
        try:
            made = run_bcc(found, text + "".join(lines), [*found.flags, "-ferror-limit=0"], functions, "the headers")
            break
        except CompileError as error:
            wrong = {int(line) - first for line in re.findall(r"main\.c:(\d+):\d+: error:", error.log)}
            if not wrong or not all(0 <= number < len(left) for number in wrong):
                raise
            left = [name for number, name in enumerate(left) if number not in wrong]
    else:
        raise CompileError("the headers declare none of these members")
    return Offsets(
        found.release,
        {name: [constant(made[f"{kind}_{number}"]) for kind in _KINDS] for number, name in enumerate(left)},
    )


def run_bcc(headers: Headers, text: str, flags: list[str], functions: list[str], name: str) -> dict[str, bytes]:
    """Compile a text and return the instructions of its functions.

    :raises CompileError: see `compile_by_headers`
    """
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        # bcc puts its own copy of linux/bpf.h before everything, so structures that a newer kernel added to it are
        # missing where that kernel's other headers need them (6.12 with bcc 0.26).
        newer = Path(folder, "newer.h")
        newer.touch()
        request = {"source": str(headers.source), "text": text, "functions": functions}
        request["flags"] = [*flags, "-include", str(newer)]
        done = _compile(request)
        missing = set(re.findall(r"incomplete type 'struct (bpf_\w+)'", done.stderr)) if done.returncode else set()
        if missing:
            kernels = (headers.source / "include" / "uapi" / "linux" / "bpf.h").read_text()
            found = [
                re.search(rf"^struct {each} \{{.*?^\}}.*?;", kernels, re.MULTILINE | re.DOTALL) for each in missing
            ]
            newer.write_text("\n".join(definition[0] for definition in found if definition) + "\n")
            done = _compile(request)
    if done.returncode:
        if "Unknown program" in done.stderr:
            raise CompileError(f'{name} has no SEC("syscall") int run(void *)', done.stderr)
        raise CompileError(complaint(name, _without_traceback(done.stderr)), done.stderr)
    return {function: bytes.fromhex(code) for function, code in json.loads(done.stdout).items()}


def _compile(request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [_interpreter(), "-I", "-c", _COMPILER]
    return subprocess.run(
        command,
        cwd="/",
        env=isolated.environment(),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )


def constant(instructions: bytes) -> int:
    """The constant that a function returns. :raises CompileError: it does anything else"""
    if len(instructions) != 2 * INSTRUCTION or instructions[0] != _MOV_IMM or instructions[INSTRUCTION] != _EXIT:
        raise CompileError("bcc compiled a constant to something else: report this")
    return int.from_bytes(instructions[4:INSTRUCTION], "little", signed=True)


def _patches(instructions: bytes) -> list[tuple[int, int]]:
    names = list(MAP_NUMBERS)
    patches = []
    at = 0
    while at < len(instructions):
        wide = instructions[at] == LD_IMM64
        if wide and instructions[at + 1] >> 4:
            number = int.from_bytes(instructions[at + 4 : at + 8], "little")
            if number not in MAP_NUMBERS:
                raise CompileError(
                    "the program defines a map, which bcc would create on this machine: use only INPUT and EMIT"
                )
            patches.append((at // INSTRUCTION, names.index(number)))
        at += 2 * INSTRUCTION if wide else INSTRUCTION
    return patches


def _without_traceback(messages: str) -> str:
    return messages.partition("Traceback (most recent call last)")[0] or messages


@cache
def _interpreter() -> str:
    """A Python interpreter that has bcc. :raises CompileError: none has"""
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        try:
            tried: subprocess.CompletedProcess[Any] = subprocess.run(
                [python, "-I", "-c", "import bcc; bcc.BPF"],
                cwd="/",
                env=isolated.environment(),
                capture_output=True,
                check=False,
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return python
    raise CompileError("compiling against kernel headers needs bcc, which is not installed: apt install python3-bpfcc")
