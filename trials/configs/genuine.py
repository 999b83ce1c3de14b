"""Reads configurations and JSON profiles by the genuine LibVMI's own code, which its Python wheel carries as a library.

Run by an interpreter alone: ``python genuine.py configs|profiles JSON_LIBRARY LIBRARY``. Each line of standard input is
one file, as hex digits. Each line of standard output is what LibVMI reads of it, as JSON. Of a ``libvmi.conf``: the
settings of the domain ``domain``; null for a syntax error, ``{}`` where the file has no such entry. Of a Volatility 3
profile: the address of each symbol, the size of each structure and the offset of each member of `NAMES` that is found.
"""

import ctypes
import json
import os
import sys
from binascii import unhexlify

STRINGS = {
    "sysmap", "rekall_profile", "volatility_ist", "ostype", "pagemode",
    "aarch64_ttbr0_granule_size", "aarch64_ttbr1_granule_size",
}  # fmt: skip
"""Settings whose value is a string; that of the others is a 64-bit number."""
NAMES = [f"{letter}{number}" for letter in "stm" for number in range(4)]
"""Symbols, structures and members that a profile may have."""


def parsed(library: ctypes.CDLL, glib: ctypes.CDLL, text: bytes) -> dict[str, int | str] | None:
    """What LibVMI reads. Only once in a process: after an error its lexer goes on with the rest of the last input."""
    libc = ctypes.CDLL(None)
    libc.fmemopen.restype = libc.fopen.restype = ctypes.c_void_p
    kept = ctypes.create_string_buffer(text, len(text) or 1)
    # fmemopen() refuses an empty buffer.
    file = libc.fmemopen(kept, ctypes.c_size_t(len(text)), b"r") if text else libc.fopen(b"/dev/null", b"r")
    ctypes.c_void_p.in_dll(library, "yyin").value = file
    if library.vmi_parse_config(b"domain"):
        return None
    library.vmi_get_config.restype = ctypes.c_void_p
    table = library.vmi_get_config()
    found: dict[str, int | str] = {}

    def add(key: bytes, value: int, _: int) -> None:
        name = key.decode()
        if name in STRINGS:
            found[name] = ctypes.string_at(value).decode("ascii", "replace")
        else:
            found[name] = ctypes.c_uint64.from_address(value).value

    if table:
        each = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)(add)
        glib.g_hash_table_foreach(ctypes.c_void_p(table), each, None)
    return found


def looked_up(library: ctypes.CDLL, json_library: ctypes.CDLL, text: bytes) -> dict[str, int] | None:
    """What LibVMI finds in a profile."""
    json_library.json_tokener_parse.restype = ctypes.c_void_p
    profile = ctypes.c_void_p(json_library.json_tokener_parse(text))
    if not profile:
        return None
    found = {}
    value, size = ctypes.c_uint64(), ctypes.c_size_t()
    look = library.volatility_ist_symbol_to_rva
    for first in NAMES:
        name = first.encode()
        if not look(profile, name, None, ctypes.byref(value), None):
            found[first] = value.value
        if not look(profile, name, None, None, ctypes.byref(size)):
            found[f"{first} "] = size.value
        for second in NAMES:
            if not look(profile, name, second.encode(), ctypes.byref(value), None):
                found[f"{first} {second}"] = value.value
    return found


def main() -> None:
    """Answer each line, in a process of its own."""
    glib = ctypes.CDLL("libglib-2.0.so.0")
    json_library, library = (ctypes.CDLL(path) for path in sys.argv[2:])
    for line in sys.stdin:
        sys.stdout.flush()
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)  # the lexer prints what it passes over
            os.dup2(quiet, 2)
            text = unhexlify(line.strip())
            read = parsed(library, glib, text) if sys.argv[1] == "configs" else looked_up(library, json_library, text)
            os.write(writable, json.dumps(read).encode())
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as answer:
            print(answer.read() or '"crashed"', flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
