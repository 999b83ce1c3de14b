"""Compile a program by clang to a CO-RE object, which any kernel with BTF can load."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from vmishim.inject.errors import CompileError
from vmishim.inject.source import complaint, header, source_file

OLDEST_CLANG, NEWEST_CLANG = 14, 22
"""Versions to look for by name (14 is Debian 12's); a plain ``clang`` is asked for its version."""
_ELF_OR_BTF = (b"\x7fELF", b"\x9f\xeb")


def compile_core(source: str | Path, *, vmlinux: Path | None = None) -> bytes:
    """Compile a program to a CO-RE object.

    :param source: C text, or the path of a C file
    :param vmlinux: for a source that includes ``vmlinux.h``: the file to use under that name, or an ELF or BTF file to
        generate it from with ``bpftool``; default: generated from this machine's kernel, which works for others too
    :raises CompileError: the source does not compile (``log`` has all messages), or a tool is missing
    """
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        file = source_file(source, Path(folder))
        if re.search(r'^\s*#\s*include\s*["<]vmlinux\.h[">]', file.read_text(errors="replace"), re.MULTILINE):
            _provide_vmlinux(Path(folder, "vmlinux.h"), vmlinux)
        made = Path(folder, "made.o")
        command = [find_clang(), "-g", "-O2", "-Wall", "-target", "bpf", "-mcpu=v3", "-D__TARGET_ARCH_x86"]
        command += ["-fno-color-diagnostics", f"-I{folder}", f"-I{header().parent}"]
        command += ["-idirafter", f"/usr/include/{platform.machine()}-linux-gnu"]
        done = subprocess.run([*command, "-c", file, "-o", made], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(complaint(file.name, done.stderr), done.stderr)
        # The kernel has no use for debugging sections, and with vmlinux.h they are most of the object.
        if strip := _newest("llvm-strip"):
            subprocess.run([strip, "-g", made], capture_output=True, check=False)
        return made.read_bytes()


def find_clang() -> str:
    """The compiler to use: the newest of ``clang-14`` and up, else ``clang`` if that is new enough.

    :raises CompileError: no such compiler is on the PATH
    """
    found, old = _newest("clang"), ""
    if found and found != shutil.which("clang"):
        return found
    if found:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        version_of = re.search(r"version (\d+)", said)
        if version_of and int(version_of[1]) >= OLDEST_CLANG:
            return found
        old = f" ({found} is older)"
    raise CompileError(f"no clang >= {OLDEST_CLANG} on the PATH{old}: apt install clang-16 libbpf-dev linux-libc-dev")


def _newest(tool: str) -> str | None:
    """The newest ``TOOL-VERSION`` on the PATH, else plain ``TOOL``."""
    names = [f"{tool}-{version}" for version in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)]
    return next((found for name in (*names, tool) if (found := shutil.which(name))), None)


def _provide_vmlinux(path: Path, given: Path | None) -> None:
    origin = given or Path("/sys/kernel/btf/vmlinux")
    try:
        with origin.open("rb") as file:
            is_binary = file.read(4).startswith(_ELF_OR_BTF)
    except OSError as error:
        raise CompileError(
            f"cannot generate vmlinux.h: {origin} cannot be read ({error.strerror}); name another file: vmlinux=PATH"
        ) from None
    if not is_binary:
        path.write_bytes(origin.read_bytes())
        return
    # bpftool is in /usr/sbin, which may not be on a user's PATH.
    tool = shutil.which("bpftool") or shutil.which("/usr/sbin/bpftool")
    if tool is None:
        raise CompileError(
            "bpftool is missing, which generates vmlinux.h: apt install bpftool, or name a vmlinux.h: vmlinux=PATH"
        )
    command = [tool, "btf", "dump", "file", str(origin), "format", "c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "__VMLINUX_H__" not in done.stdout:
        raise CompileError(f"bpftool cannot generate vmlinux.h from {origin}: {done.stderr.strip()}", done.stderr)
    path.write_text(done.stdout)
