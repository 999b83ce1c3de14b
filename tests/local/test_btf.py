"""BTF of this machine's own kernel, with bpftool as the oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmishim.kernel.btf import Btf

RUNNING = Path("/sys/kernel/btf/vmlinux")


def _sizes(types: dict[int, dict[str, Any]]) -> dict[int, int]:
    def size(number: int) -> int:
        kind = types.get(number, {"kind": "VOID"})
        match kind["kind"]:
            case "PTR":
                return 8
            case "ARRAY":
                return int(kind["nr_elems"]) * size(kind["type_id"])
            case "TYPEDEF" | "CONST" | "VOLATILE" | "RESTRICT" | "TYPE_TAG":
                return size(kind["type_id"])
            case _:
                return int(kind.get("size", 0))

    return {number: size(number) for number in types}


@pytest.mark.skipif(not RUNNING.exists() or not shutil.which("bpftool"), reason="needs a kernel with BTF, and bpftool")
def test_every_structure_of_this_kernel_agrees_with_bpftool() -> None:
    dump = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", str(RUNNING)], capture_output=True, check=True
    ).stdout
    types = {entry["id"]: entry for entry in json.loads(dump)["types"]}
    sizes = _sizes(types)
    btf = Btf(RUNNING.read_bytes())
    seen: set[str] = set()
    for entry in types.values():
        if entry["kind"] not in ("STRUCT", "UNION") or entry["name"] == "(anon)" or entry["name"] in seen:
            continue
        seen.add(entry["name"])
        assert btf.size(entry["name"]) == entry["size"]
        layout = btf.layout(entry["name"])
        for member in entry["members"]:
            if member["name"] == "(anon)":
                continue
            found, size = layout[member["name"]], sizes[member["type_id"]]
            assert found.size == size
            if member.get("bitfield_size"):
                assert found.offset * 8 <= member["bits_offset"]
                assert member["bits_offset"] + member["bitfield_size"] <= (found.offset + size) * 8
            else:
                assert found.offset * 8 == member["bits_offset"]
    assert seen == set(btf.structs())


def test_pointees() -> None:
    """By the running kernel's own BTF: what members point to, an array of pointers, and behind it."""
    kernel = Btf(RUNNING.read_bytes())

    def at(of_type: str | int, offset: int) -> tuple[int, int]:
        found = kernel.pointee(of_type, offset)
        assert found is not None
        return found

    mm = at("task_struct", kernel.member("task_struct", "mm").offset)
    assert mm[1] == kernel.size("mm_struct")
    file = at(mm[0], kernel.member("mm_struct", "exe_file").offset)
    assert file[1] == kernel.size("file")
    slots = at("fdtable", kernel.member("fdtable", "fd").offset)
    assert slots[1] == 8
    assert at(slots[0], 0) == at(slots[0], 24) == file
    assert kernel.pointee("task_struct", kernel.member("task_struct", "pid").offset) is None
    assert kernel.pointee(0, 0) is None
    with pytest.raises(KeyError):
        kernel.pointee("no_such_struct", 0)
