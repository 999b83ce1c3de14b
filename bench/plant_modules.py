"""Plant kernel modules: ``plant_modules.py PREFIX COUNT`` loads COUNT copies of one small module, as PREFIX0, PREFIX1,
... Runs in a lab VM, as root. The module is a character set, which does nothing until a file system asks for it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MODULE = "nls_ascii"
NAME_LEN = 56
"""MODULE_NAME_LEN of a 64-bit kernel (include/linux/moduleparam.h)."""


def main() -> None:
    """Load them."""
    prefix, count = sys.argv[1], int(sys.argv[2])
    (path,) = Path("/lib/modules", os.uname().release).rglob(f"{MODULE}.ko*")
    image = path.read_bytes()
    if path.suffix == ".xz":
        import lzma

        image = lzma.decompress(image)
    # ``struct module`` in the image has the name, and zeros up to NAME_LEN; one of its signature would be wrong now.
    field = MODULE.encode().ljust(NAME_LEN, b"\0")
    image = image.partition(b"~Module signature appended~\n")[0]
    if image.count(field) != 1:
        raise SystemExit(f"{path} does not hold its name as expected")
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(count):
        renamed = image.replace(field, f"{prefix}{number}".encode().ljust(NAME_LEN, b"\0"))
        if libc.syscall(175, renamed, ctypes.c_ulong(len(renamed)), b""):  # init_module(2)
            raise SystemExit(f"{prefix}{number} was not loaded: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
