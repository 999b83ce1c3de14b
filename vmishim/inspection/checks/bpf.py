"""eBPF programs, maps and links that the guest's own tools do not see.

``bpftool`` and everything else asks the kernel for the entries of its tables of numbers (``prog_idr``, ``map_idr``,
``link_idr``). What else leads to a program, map or link is compared with these: the list of compiled programs, the
links and their programs, the programs' maps, and the files that processes hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.inspection.checks.view import View, named
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.lists import ring
from vmishim.inspection.structures import BrokenError

OBJECTS_MAX = 1 << 18
"""Compiled programs that are read."""
MAPS_MAX = 64
"""Maps of one program (``MAX_USED_MAPS``)."""
NAME_MAX = 16
COMPILED, FILES, LINKS, MAPS = (
    "the list of compiled programs",
    "the files that processes hold",
    "the table of links",
    "the maps of the programs",
)


def bpf_objects(view: View) -> Iterator[Finding]:
    """eBPF programs, maps and links that are missing from the kernel's tables of numbers."""
    tables = {
        "program": {entry for _, entry in view.idr(view.symbol("prog_idr"), "the table of eBPF programs")},
        "map": {entry for _, entry in view.idr(view.symbol("map_idr"), "the table of eBPF maps")},
        "link": {entry for _, entry in view.idr(view.symbol("link_idr"), "the table of eBPF links")},
    }
    met: dict[tuple[str, int], str] = {}
    for address in _compiled(view):
        met.setdefault(("program", address), COMPILED)
    for what, address, whose in _held(view):
        met.setdefault((what, address), f"{FILES}: {whose}")
    for link in sorted(tables["link"] | {address for what, address in met if what == "link"}):
        with view.marking(f"the eBPF link at {link:#x}"):
            if program := view.field(link, "bpf_link prog"):
                met.setdefault(("program", program), LINKS)
    for program in sorted(tables["program"] | {address for what, address in met if what == "program"}):
        with view.marking(f"the maps of the eBPF program at {program:#x}"):
            for used in _maps(view, program):
                met.setdefault(("map", used), MAPS)
    for (what, address), where in sorted(met.items()):
        if address not in tables[what]:
            yield from _hidden(view, what, address, where)


def _compiled(view: View) -> Iterator[int]:
    """Programs in the list of compiled code; without parts of programs, which have no number."""
    link = view.at("bpf_prog_aux ksym") + view.at("bpf_ksym lnode")
    prog = view.at("bpf_prog_aux ksym") + view.at("bpf_ksym prog")
    for aux in ring(view.vmi, view.symbol("bpf_kallsyms"), link, OBJECTS_MAX, view.damage, COMPILED):
        with view.marking(f"{COMPILED}, {aux:#x}"):
            # A trampoline or dispatcher has the same list entry, but in another structure.
            if view.number(aux + prog, 1) and view.value(aux, "bpf_prog_aux id"):
                yield view.field(aux, "bpf_prog_aux prog")


def _held(view: View) -> Iterator[tuple[str, int, str]]:
    """(kind, address, process) of each eBPF object that an open file stands for."""
    kinds = {
        view.symbol(symbol): what
        for symbol, what in (
            *(("bpf_prog_fops", "program"), ("bpf_map_fops", "map")),
            *(("bpf_link_fops", "link"), ("bpf_link_fops_poll", "link")),
        )
        if view.has_symbol(symbol)
    }
    for task, file in view.files:
        with view.marking(f"a file of {named(task)}"):
            what = kinds.get(view.field(file, "file f_op"))
            if what is not None and (address := view.field(file, "file private_data")):
                yield what, address, named(task)


def _maps(view: View, program: int) -> list[int]:
    aux = view.field(program, "bpf_prog aux")
    count = view.value(aux, "bpf_prog_aux used_map_cnt")
    if count > MAPS_MAX:
        raise BrokenError(f"it has {count} maps")
    used = view.field(aux, "bpf_prog_aux used_maps") if count else 0
    return [address for address in view.words(used, count) if address]


def _hidden(view: View, what: str, address: int, where: str) -> Iterator[Finding]:
    name = number = None
    with view.marking(f"the eBPF {what} at {address:#x}"):
        if what == "program":
            aux = view.field(address, "bpf_prog aux")
            number, at = view.value(aux, "bpf_prog_aux id"), aux + view.at("bpf_prog_aux name")
            name = view.text(at, NAME_MAX)
        elif what == "map":
            number = view.value(address, "bpf_map id")
            name = view.text(address + view.at("bpf_map name"), NAME_MAX)
        else:
            number, name = view.value(address, "bpf_link id"), ""
    if number == 0 and what != "program":
        return  # being made, or being removed
    called = f"{'?' if number is None else number}{f' {name}' if name else ''}"
    yield Finding(
        f"hidden-bpf-{what}",
        Severity.HIGH,
        name or what,
        f"the eBPF {what} {called} is missing from the kernel's table of {what}s, which bpftool shows",
        f"{where}, with the table of {what}s",
        {what: address},
        "what it is attached to, and who holds it; hidden modules, as the kernel was changed",
        "T1014",
    )
