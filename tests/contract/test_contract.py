"""The contract: what each call does, on the genuine bindings and on ours."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.cases import Case, cases
from tests.contract.outcome import VARIES, kind, outcome
from tests.contract.scene import Scene
from vmishim.errors import LibvmiError
from vmishim.libvmi import AccessContext, Libvmi, pause
from vmishim.libvmi.constants import VMIOS, PageMode, TranslateMechanism, X86Reg

BEHAVIOUR: dict[str, Any] = json.loads((Path(__file__).parent / "behaviour.json").read_text())

RESTLESS = {
    "get_memsize: plain",  # the guest does not count the memory that its firmware keeps
    "get_max_physical_address: plain",
    "read_str: symbol",  # LibVMI takes the address of the name, on the host, for the string's, and may cut it short
}
"""Cases whose values are not the same for all."""


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_what_comes_out(vmi: Any, backend: str, scene: Scene, case: Case) -> None:
    recorded = BEHAVIOUR["cases"][case.name]
    expected = recorded["genuine"] if backend == "genuine" else recorded.get("ours", recorded["genuine"])
    if expected == VARIES:
        return
    # Where memory ends is each one's own view.
    places = replace(scene.places, memory=vmi.get_memsize())
    assert kind(case, outcome(vmi, case, places)) == expected


def test_same_values(vmi: Any, backend: str, scene: Scene) -> None:
    """Byte for byte and number for number what our page tables in Python read of the RAM file, wherever both read.

    So each backend is compared: the agent reads by the kernel itself, and the genuine bindings by LibVMI.
    """
    restless = RESTLESS | {case.name for case in cases() if backend == "agent" and "memory" in str(case.args)}
    same = 0
    with scene.ramfile() as by_file:
        for case in cases():
            if "ours" in BEHAVIOUR["cases"][case.name] or case.name in restless:
                continue
            assert outcome(vmi, case, scene.places) == outcome(by_file, case, scene.places), case.name
            same += 1
    assert same > 550


def test_read_ksym_cuts_at_the_first_nul_and_read_va_does_not(vmi: Any, scene: Scene) -> None:
    text, count = vmi.read_ksym("linux_banner", 512)
    assert text.startswith(b"Linux version")
    assert b"\0" not in text
    assert count == 512
    data, count = vmi.read_va(scene.places.banner, 0, 512)
    assert (len(data), count) == (512, 512)
    assert data.startswith(text + b"\0")


def test_the_same_memory_by_every_backend(vmi: Any, scene: Scene) -> None:
    places = scene.places
    expected = vmi.read_va(places.banner, 0, 64)
    contexts = (
        AccessContext(TranslateMechanism.KERNEL_SYMBOL, ksym="linux_banner"),
        AccessContext(TranslateMechanism.PROCESS_PID, addr=places.banner, pid=0),
        AccessContext(TranslateMechanism.PROCESS_PID, addr=places.banner, pid=places.pid),
        AccessContext(TranslateMechanism.NONE, addr=places.banner_pa),
    )
    assert [vmi.read(context, 64) for context in contexts] == [expected] * len(contexts)
    assert vmi.read_pa(places.banner_pa, 64) == expected
    assert vmi.read_va(places.banner, places.pid, 64) == expected


def test_a_process_and_its_page_tables(vmi: Any, scene: Scene) -> None:
    places = scene.places
    assert vmi.pid_to_dtb(places.pid) == places.dtb
    assert vmi.dtb_to_pid(places.dtb) == places.pid
    assert vmi.read_str_va(places.argument, places.pid) == "sleep"
    physical = vmi.translate_uv2p(places.argument, places.pid)
    assert physical == vmi.pagetable_lookup(places.dtb, places.argument)
    assert vmi.read_str_pa(physical) == "sleep"
    assert vmi.read_va(places.image, places.pid, 4)[0] == b"\x7fELF"


def test_listing_is_what_proc_says(vmi: Any, scene: Scene) -> None:
    tasks, pid, name = (vmi.get_offset(f"linux_{what}") for what in ("tasks", "pid", "name"))
    head = vmi.translate_ksym2v("init_task") + tasks
    for _ in range(3):  # a process may come or go in the meantime
        before, listed, entry = scene.vm.processes(), {}, vmi.read_addr_va(head, 0)
        with pause(vmi):
            while entry != head:
                listed[vmi.read_32_va(entry - tasks + pid, 0)] = vmi.read_str_va(entry - tasks + name, 0)
                entry = vmi.read_addr_va(entry, 0)
        if before.keys() == scene.vm.processes().keys():
            break
    # The guest runs the commands that ask it for /proc: they are in only one of the two.
    assert scene.places.pid in listed
    assert listed.keys() >= before.keys() - _asking(before)
    assert listed[scene.places.pid] == "sleep"


def _asking(processes: dict[int, str]) -> set[int]:
    return {pid for pid, comm in processes.items() if comm in ("sh", "grep")}


def test_state(vmi: Any, scene: Scene) -> None:
    assert vmi.get_ostype() is VMIOS.LINUX
    assert vmi.get_page_mode(0) is PageMode.IA32E
    # The firmware keeps a little of it at the end; the guest itself does not count that.
    assert (1 << 30) - (1 << 20) < vmi.get_memsize() == vmi.get_max_physical_address() <= 1 << 30
    assert vmi.get_vcpureg(X86Reg.CR3.value, 0) == vmi.get_offset("kpgd") == vmi.pid_to_dtb(0)
    assert vmi.get_offset("linux_init_task") == scene.places.init_task


def test_pauses_nest_and_may_be_ended_too_often(vmi: Any, scene: Scene) -> None:
    vmi.pause_vm()
    vmi.pause_vm()
    vmi.resume_vm()
    assert vmi.read_ksym("linux_banner", 5)[0] == b"Linux"
    vmi.resume_vm()
    vmi.resume_vm()


def test_added_names_are_believed_until_flushed(vmi: Any, scene: Scene) -> None:
    vmi.symcache_add(0, 0, "made_up", scene.places.banner)
    assert vmi.translate_ksym2v("made_up") == scene.places.banner
    assert vmi.read_ksym("made_up", 5)[0] == b"Linux"
    vmi.symcache_flush()
    with pytest.raises(LibvmiError):
        vmi.translate_ksym2v("made_up")


def test_added_processes_are_believed_until_flushed(vmi: Any, scene: Scene) -> None:
    places = scene.places
    vmi.pidcache_add(places.nobody, places.dtb)
    assert vmi.read_str_va(places.argument, places.nobody) == "sleep"
    vmi.pidcache_flush()
    with pytest.raises(LibvmiError):
        vmi.pid_to_dtb(places.nobody)


def test_added_translations_are_believed_until_flushed(vmi: Any, scene: Scene) -> None:
    places = scene.places
    vmi.v2pcache_add(places.hole, places.kpgd, places.banner_pa)
    assert vmi.translate_kv2p(places.hole | 0x10) == (places.banner_pa & -4096) | 0x10
    vmi.v2pcache_flush((1 << 64) - 1)  # all: of one dtb, LibVMI itself flushes nothing
    with pytest.raises(LibvmiError):
        vmi.translate_kv2p(places.hole)


@pytest.mark.parametrize("vmi", ["ramfile", "agent"], indirect=True)
@pytest.mark.parametrize("which", ["all", "of the kernel"])
def test_added_translations_of_one_dtb_are_flushed(vmi: Libvmi, scene: Scene, which: str) -> None:
    places = scene.places
    vmi.v2pcache_add(places.hole, places.kpgd, places.banner_pa)
    vmi.v2pcache_flush(places.dtb)
    assert vmi.translate_kv2p(places.hole) == places.banner_pa & -4096
    vmi.v2pcache_flush(*([] if which == "all" else [places.kpgd]))
    with pytest.raises(LibvmiError):
        vmi.translate_kv2p(places.hole)


@pytest.mark.parametrize("vmi", ["ramfile", "agent"], indirect=True)
def test_every_page_of_a_process_by_its_page_tables(vmi: Libvmi, scene: Scene) -> None:
    places = scene.places
    pages = {page.vaddr: page for page in vmi.get_va_pages(places.dtb) if page.vaddr < 1 << 47}
    assert places.image in pages
    for page in list(pages.values())[:10]:
        assert vmi.pagetable_lookup(places.dtb, page.vaddr) == page.paddr


@pytest.mark.parametrize("vmi", ["ramfile", "agent"], indirect=True)
def test_eight_threads_share_one(vmi: Libvmi, scene: Scene) -> None:
    places = scene.places

    def reads(_: int) -> list[Any]:
        found: list[Any] = []
        for _ in range(25):
            vmi.pause_vm()
            found.append(vmi.read_str_va(places.comm, 0))
            found.append(vmi.read_str_va(places.argument, places.pid))
            found.append(vmi.read_ksym("linux_banner", 13)[0])
            vmi.resume_vm()
            with pytest.raises(LibvmiError):
                vmi.read_64_va(places.hole, 0)
        return found

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(reads, range(8)))
    assert results == [["swapper/0", "sleep", b"Linux version"] * 25] * 8
