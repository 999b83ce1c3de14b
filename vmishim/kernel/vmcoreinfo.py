"""VMCOREINFO, what a kernel leaves in its memory for crash dump programs: parsed, and made where a kernel has none.

Source: ``Documentation/admin-guide/kdump/vmcoreinfo.rst``, ``kernel/vmcore_info.c`` and
``arch/x86/kernel/vmcore_info_64.c`` of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from vmishim.kernel.btf import Btf

SIZE_MAX = 4096
"""Bytes of the kernel's own (``VMCOREINFO_BYTES``)."""
SYMBOLS = (
    *("init_uts_ns", "node_online_map", "swapper_pg_dir", "_stext", "node_data", "init_top_pgt", "prb", "log_buf"),
    *("kallsyms_names", "kallsyms_num_syms", "kallsyms_token_table", "kallsyms_token_index", "kallsyms_offsets"),
    *("kallsyms_relative_base", "init_mm", "vmap_area_list", "vmap_nodes"),
)
SIZES = (
    *("page", "pglist_data", "zone", "free_area", "list_head", "mem_section", "printk_ringbuffer", "prb_desc_ring"),
    *("prb_desc", "prb_data_ring", "printk_info", "nodemask_t"),
)
OFFSETS = (
    *("page.flags", "page._refcount", "page.mapping", "page.lru", "page._mapcount", "page.private"),
    *("page.compound_head", "pglist_data.node_zones", "pglist_data.nr_zones", "pglist_data.node_start_pfn"),
    *("pglist_data.node_spanned_pages", "pglist_data.node_id", "zone.free_area", "zone.vm_stat", "zone.spanned_pages"),
    *("free_area.free_list", "list_head.next", "list_head.prev", "mem_section.section_mem_map", "uts_namespace.name"),
    *("printk_ringbuffer.desc_ring", "printk_ringbuffer.text_data_ring", "printk_ringbuffer.fail"),
    *("prb_desc_ring.count_bits", "prb_desc_ring.descs", "prb_desc_ring.infos", "prb_desc_ring.head_id"),
    *("prb_desc_ring.tail_id", "prb_desc.state_var", "prb_desc.text_blk_lpos", "prb_data_blk_lpos.begin"),
    *("prb_data_blk_lpos.next", "printk_info.seq", "printk_info.ts_nsec", "printk_info.text_len"),
    *("printk_info.caller_id", "printk_info.dev_info", "prb_data_ring.size_bits", "prb_data_ring.data"),
    *("atomic_long_t.counter",),
)
_SECTION_BITS = 27
_IMAGE_SIZE = 1 << 30


def parse(data: bytes) -> dict[str, str]:
    """The values by name, such as ``SYMBOL(init_uts_ns)``; what is not a line of a name and a value is passed over."""
    found: dict[str, str] = {}
    for line in data[:SIZE_MAX].split(b"\0")[0].decode("ascii", "replace").splitlines():
        name, is_value, value = line.partition("=")
        if is_value:
            found.setdefault(name, value)
    return found


def make(
    release: str,
    symbols: Mapping[str, int],
    types: Btf,
    *,
    moved: int,
    phys_base: int,
    levels: int,
    sme_mask: int = 0,
    mem_section: int = 0,
) -> bytes:
    """What a kernel's VMCOREINFO would say, of what is known about it.

    :param symbols: addresses by name, KASLR applied
    :param moved: how far KASLR moved the image, in bytes
    :param phys_base: the kernel's variable of this name: how far the image was moved physically
    :param levels: page-table levels: 4 or 5
    :param sme_mask: the bit of page-table entries that says that a page is encrypted, 0 if unknown
    :param mem_section: the kernel's pointer of this name, 0 if unknown
    """
    said: dict[str, object] = {"OSRELEASE": release, "PAGESIZE": 4096}
    for name in SYMBOLS:
        if name in symbols:
            said[f"SYMBOL({name})"] = f"{symbols[name]:x}"
    if mem_section:
        said["SYMBOL(mem_section)"] = f"{mem_section:x}"
    if "swapper_pg_dir" not in symbols and "init_top_pgt" in symbols:
        said["SYMBOL(swapper_pg_dir)"] = f"{symbols['init_top_pgt']:x}"  # its name in C is a macro
    with suppress(KeyError):
        section = types.size("mem_section")
        roots = (1 << (46 if levels == 4 else 52) - _SECTION_BITS) // (4096 // section or 1)
        said |= {"LENGTH(mem_section)": roots, "NUMBER(SECTION_SIZE_BITS)": _SECTION_BITS}
        said["NUMBER(MAX_PHYSMEM_BITS)"] = 46 if levels == 4 else 52
    for name in SIZES:
        with suppress(KeyError):
            said[f"SIZE({name})"] = types.size(name)
    for name in OFFSETS:
        with suppress(KeyError):
            said[f"OFFSET({name})"] = types.member(*name.split(".", 1)).offset
    said |= {
        "NUMBER(phys_base)": phys_base,
        "NUMBER(pgtable_l5_enabled)": int(levels == 5),
        "KERNELOFFSET": f"{moved:x}",
        "NUMBER(KERNEL_IMAGE_SIZE)": _IMAGE_SIZE,
        "NUMBER(sme_mask)": sme_mask,
    }
    return "".join(f"{name}={value}\n" for name, value in said.items()).encode()
