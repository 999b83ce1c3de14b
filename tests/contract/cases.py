"""Every call of the API with good, unmapped, unknown and wrongly typed input: what to call it with, not what comes out.

A case is a name and a call. Where it needs a place in the guest, it says so by name, ``P.banner``; the tests put the
address there. What comes out is recorded in ``behaviour.json``, from the genuine bindings, by ``record.py``.

No outcome may depend on what memory happens to hold. A case that depends on bytes reads them where the kernel's source
or its ABI fixes them: a constant table, a page of zeros, the end of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from vmishim.libvmi import AccessContext, Registers
from vmishim.libvmi.constants import MemAccess, RegAccess, TranslateMechanism, X86Reg
from vmishim.libvmi.event import DebugEvent, IntEvent, MemEvent, RegEvent, SingleStepEvent


@dataclass(frozen=True)
class Places:
    """Addresses and numbers in one guest, with a planted process that sleeps."""

    banner: int
    """Virtual address of ``linux_banner``."""
    banner_pa: int
    """Its physical address."""
    crossing: int
    """4 bytes before the end of the banner's page."""
    not_text: int
    """In ``byte_rev_table``: 0x80, 0x40, 0xc0, which no UTF-8 begins with."""
    zeros_pa: int
    """Physical address of ``empty_zero_page``: a page of zeros for ever, so page tables that map nothing."""
    init_task: int
    comm: int
    """Virtual address of ``init_task.comm``."""
    thread: int
    """Kernel virtual address in a module's text: mapped by 4 KiB pages."""
    kpgd: int
    pid: int
    """The planted process."""
    dtb: int
    """Its page tables."""
    image: int
    """Where its program's ELF header is mapped."""
    argument: int
    """Where its first argument is, a string."""
    edge: int
    """Its last 8 bytes of stack, which are always 0 (``bprm_mm_init``), with nothing mapped behind."""
    vdso: int
    """Where its vDSO is mapped."""
    vdso_symbol: int
    """Bytes from there to ``__vdso_gettimeofday``."""
    libc: int
    """Where process 1 has its C library mapped."""
    libc_symbol: int
    """Bytes from there to ``malloc``."""
    memory: int
    """Bytes of guest memory."""
    kthread: int = 2
    """``kthreadd``, which has no memory of its own."""
    hole: int = 0xFFFF_8000_0000_1000
    """Kernel virtual address that is never mapped: the guard hole for the hypervisor (mm.rst)."""
    nobody: int = 4_000_000
    """Number of no process."""


@dataclass(frozen=True)
class Place:
    """Stands for one of ``Places`` until that is known; may be shifted: ``P.banner + 8``."""

    name: str
    shift: int = 0

    def __add__(self, bytes_on: int) -> Place:
        return Place(self.name, self.shift + bytes_on)

    def __sub__(self, bytes_back: int) -> Place:
        return Place(self.name, self.shift - bytes_back)


class _P:
    """``P.banner``: the place of that name."""

    def __getattr__(self, name: str) -> Place:
        assert name in {field.name for field in fields(Places)}, name
        return Place(name)


P = _P()


class Case(NamedTuple):
    """One call."""

    name: str
    call: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def put(self, places: Places) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with addresses in place of names."""
        return [_put(value, places) for value in self.args], {key: _put(v, places) for key, v in self.kwargs.items()}


def _put(value: Any, places: Places) -> Any:
    if isinstance(value, Place):
        return getattr(places, value.name) + value.shift
    if isinstance(value, Context):
        return AccessContext(value.mechanism, **{name: _put(item, places) for name, item in value.fields.items()})
    return value


@dataclass(frozen=True)
class Context:
    """An ``AccessContext`` to be."""

    mechanism: TranslateMechanism
    fields: dict[str, Any] = field(default_factory=dict)


NONE, DTB, PID, KSYM = (
    TranslateMechanism.NONE,
    TranslateMechanism.PROCESS_DTB,
    TranslateMechanism.PROCESS_PID,
    TranslateMechanism.KERNEL_SYMBOL,
)
MAX = (1 << 64) - 1

# Numbers that no address can be, and things that are none.
NO_ADDRESS = {"negative": -1, "too big": 1 << 64, "float": 1.5, "text": "x", "none": None}
CONTEXTS = {
    "physical": Context(NONE, {"addr": P.banner_pa}),
    "physical beyond": Context(NONE, {"addr": P.memory + 4096}),
    "dtb": Context(DTB, {"addr": P.banner, "dtb": P.kpgd}),
    "dtb of process": Context(DTB, {"addr": P.argument, "dtb": P.dtb}),
    "dtb unmapped": Context(DTB, {"addr": P.hole, "dtb": P.kpgd}),
    "pid 0": Context(PID, {"addr": P.banner}),
    "pid": Context(PID, {"addr": P.argument, "pid": P.pid}),
    "pid unknown": Context(PID, {"addr": P.banner, "pid": P.nobody}),
    "pid unmapped": Context(PID, {"addr": P.hole}),
    "symbol": Context(KSYM, {"ksym": "linux_banner"}),
    "symbol unknown": Context(KSYM, {"ksym": "no_such_symbol"}),
    "wrong": 5,
}


def _never(vmi: Any, event: Any) -> None:
    """The callback of events that never come."""


def cases() -> list[Case]:
    """All of them."""
    found: list[Case] = []

    def add(call: str, variants: dict[str, Any]) -> None:
        for name, arguments in variants.items():
            args, kwargs = (arguments[:-1], arguments[-1]) if isinstance(arguments[-1], dict) else (arguments, {})
            found.append(Case(f"{call}: {name}", call, tuple(args), kwargs))

    def on_contexts(call: str, *more: Any) -> None:
        add(call, {name: (context, *more) for name, context in CONTEXTS.items()})

    # bytes
    on_contexts("read", 16)
    add(
        "read",
        {
            "nothing": (CONTEXTS["pid 0"], 0),
            "nothing unmapped": (CONTEXTS["pid unmapped"], 0),
            "negative": (CONTEXTS["pid 0"], -1),
            "no number": (CONTEXTS["pid 0"], "x"),
            "more than there is": (CONTEXTS["physical beyond"], 8192),
        },
    )
    add(
        "read_va",
        {
            "kernel": (P.banner, 0, 64),
            "module": (P.thread, 0, 16),
            "across pages": (P.crossing, 0, 8),
            "several pages": (P.crossing, 0, 9000),
            "nothing": (P.banner, 0, 0),
            "nothing unmapped": (P.hole, 0, 0),
            "nothing of nobody": (P.banner, P.nobody, 0),
            "unmapped": (P.hole, 0, 8),
            "into a hole": (P.edge, P.pid, 16),
            "up to a hole": (P.edge, P.pid, 8),
            "process": (P.image, P.pid, 64),
            "process of its kernel half": (P.banner, P.pid, 64),
            "user address in the kernel": (P.image, 0, 64),
            "kernel thread": (P.banner, P.kthread, 16),
            "nobody": (P.image, P.nobody, 16),
            "negative pid": (P.image, -1, 16),
            "not canonical": (P.banner - (0xFFFF << 48), 0, 16),
            "not canonical, kernel half": (P.banner - (1 << 60), 0, 16),
            "last bytes": (MAX - 7, 0, 8),
            "around the end": (MAX - 7, 0, 16),
            "address 0": (0, 0, 8),
            "negative count": (P.banner, 0, -1),
            "huge count": (P.banner, 0, 1 << 45),
            "impossible count": (P.banner, 0, 1 << 64),
            "text count": (P.banner, 0, "x"),
            "float count": (P.banner, 0, 1.5),
            "pid too big": (P.banner, 1 << 31, 8),
            "pid text": (P.banner, "x", 8),
            "pid none": (P.banner, None, 8),
            "by name": ({"vaddr": P.banner, "pid": 0, "count": 8},),
            "missing": (P.banner, 0),
            **{f"address {name}": (value, 0, 8) for name, value in NO_ADDRESS.items()},
        },
    )
    add(
        "read_ksym",
        {
            "text": ("hex_asc", 64),  # 16 digits
            "short": ("linux_banner", 5),
            "starts with NUL": ("empty_zero_page", 8),
            "nothing": ("linux_banner", 0),
            "unknown": ("no_such_symbol", 8),
            "unknown nothing": ("no_such_symbol", 0),
            "empty": ("", 8),
            "no text": (5, 8),
            "bytes": (b"linux_banner", 8),
            "negative": ("linux_banner", -1),
        },
    )
    add(
        "read_pa",
        {
            "there": (P.banner_pa, 64),
            "beyond": (P.memory + 4096, 8),
            "over the end": (P.memory - 8, 16),
            "over the end, padded": (P.memory - 8, 16, True),
            "beyond, padded": (P.memory + 4096, 16, {"padding": True}),
            "there, padded": (P.banner_pa, 16, {"padding": True}),
            "nothing": (P.banner_pa, 0),
            "negative count": (P.banner_pa, -1),
            **{name: (value, 8) for name, value in NO_ADDRESS.items()},
        },
    )

    # numbers
    for width in ("8", "16", "32", "64", "addr"):
        on_contexts(f"read_{width}")
        add(
            f"read_{width}_ksym",
            {"known": ("linux_banner",), "unknown": ("no_such_symbol",), "no text": (5,)},
        )
        add(
            f"read_{width}_va",
            {
                "kernel": (P.banner, 0),
                "process": (P.image, P.pid),
                "across pages": (P.crossing + 3, 0),
                "unmapped": (P.hole, 0),
                "into a hole": (P.edge + 7, P.pid),
                "nobody": (P.banner, P.nobody),
                "pid none": (P.banner, None),
                **{name: (value, 0) for name, value in NO_ADDRESS.items()},
            },
        )
        add(
            f"read_{width}_pa",
            {
                "there": (P.banner_pa,),
                "beyond": (P.memory + 4096,),
                "over the end": (P.memory - 1,),
                **{name: (value,) for name, value in NO_ADDRESS.items()},
            },
        )
        value = {"good": 1, "negative": -1, "too big": 1 << 64, "text": "x", "none": None}
        add(f"write_{width}", {name: (CONTEXTS["pid 0"], number) for name, number in value.items()})
        add(f"write_{width}_ksym", {name: ("linux_banner", number) for name, number in value.items()})
        add(f"write_{width}_va", {name: (P.banner, 0, number) for name, number in value.items()})
        add(f"write_{width}_pa", {name: (P.banner_pa, number) for name, number in value.items()})
        add(f"write_{width}_ksym", {"unknown": ("no_such_symbol", 1), "no text": (5, 1)})
        add(f"write_{width}_va", {"unmapped": (P.hole, 0, 1), "nobody": (P.banner, P.nobody, 1)})

    # strings
    on_contexts("read_str")
    add(
        "read_str_va",
        {
            "kernel": (P.banner, 0),
            "comm": (P.comm, 0),
            "process": (P.argument, P.pid),
            "up to a hole": (P.edge, P.pid),
            "not UTF-8": (P.not_text, 0),
            "unmapped": (P.hole, 0),
            "nobody": (P.argument, P.nobody),
            "pid none": (P.banner, None),
            **{name: (value, 0) for name, value in NO_ADDRESS.items()},
        },
    )
    add("read_str_pa", {"there": (P.banner_pa,), "beyond": (P.memory + 4096,), "text": ("x",), "negative": (-1,)})
    on_contexts("read_unicode_str")
    add("read_unicode_str_va", {"kernel": (P.banner, 0), "unmapped": (P.hole, 0), "text": ("x", 0)})

    # translations
    addresses = {
        "kernel": (P.banner,),
        "unmapped": (P.hole,),
        "module": (P.thread,),
        "not canonical": (P.banner - (1 << 60),),
    }
    add("translate_kv2p", addresses | {name: (value,) for name, value in NO_ADDRESS.items()})
    add(
        "translate_uv2p",
        {
            "process": (P.image, P.pid),
            "kernel half": (P.banner, P.pid),
            "kernel": (P.banner, 0),
            "unmapped": (P.hole, P.pid),
            "nobody": (P.image, P.nobody),
            "kernel thread": (P.banner, P.kthread),
            "text": ("x", 0),
        },
    )
    symbols = {
        "known": ("linux_banner",),
        "unknown": ("no_such_symbol",),
        "empty": ("",),
        "no text": (5,),
        "none": (None,),
    }
    add("translate_ksym2v", symbols)
    on_contexts("translate_sym2v", "__vdso_gettimeofday")
    add(
        "translate_sym2v",
        {
            "vdso": (Context(PID, {"addr": P.vdso, "pid": P.pid}), "__vdso_gettimeofday"),
            "vdso by dtb": (Context(DTB, {"addr": P.vdso, "dtb": P.dtb}), "__vdso_gettimeofday"),
            "vdso unknown": (Context(PID, {"addr": P.vdso, "pid": P.pid}), "no_such_symbol"),
        },
    )
    libc = Context(PID, {"addr": P.libc, "pid": 1})
    add("translate_sym2v", {"library": (libc, "malloc"), "library unknown": (libc, "no_such_symbol")})
    add("translate_v2sym", {"library": (libc, P.libc_symbol), "library inside": (libc, P.libc_symbol + 1)})
    on_contexts("translate_v2sym", 16)
    add(
        "translate_v2sym",
        {"vdso": (Context(PID, {"addr": P.vdso, "pid": P.pid}), P.vdso_symbol)},
    )
    on_contexts("translate_v2ksym", P.init_task)
    add(
        "translate_v2ksym",
        {
            "kernel": (Context(PID), P.init_task),
            "kernel by dtb": (Context(DTB, {"dtb": P.kpgd}), P.init_task),
            "inside": (Context(PID), P.init_task + 8),
            "text": (Context(PID), "x"),
        },
    )
    add(
        "pid_to_dtb",
        {
            "process": (P.pid,),
            "kernel": (0,),
            "nobody": (P.nobody,),
            "kernel thread": (P.kthread,),
            "negative": (-1,),
            "too big": (1 << 31,),
            "text": ("x",),
        },
    )
    add(
        "dtb_to_pid",
        {
            "process": (P.dtb,),
            "user half": (P.dtb + 0x1000,),
            "kernel": (P.kpgd,),
            "none": (P.zeros_pa,),
            "zero": (0,),
            "text": ("x",),
            "negative": (-1,),
        },
    )
    for call in ("pagetable_lookup", "pagetable_lookup_extended"):
        add(
            call,
            {
                "large": (P.kpgd, P.banner),
                "small": (P.kpgd, P.thread),
                "process": (P.dtb, P.image),
                "PCID": (P.dtb + 5, P.image),
                "unmapped": (P.kpgd, P.hole),
                "not canonical": (P.kpgd, P.banner - (1 << 60)),
                "no tables": (P.zeros_pa, P.banner),
                "beyond": (P.memory + 4096, P.banner),
                "text": ("x", 0),
                "negative": (-1, 0),
            },
        )
    add("get_va_pages", {"kernel": (P.kpgd,), "beyond": (P.memory + 4096,), "no tables": (P.zeros_pa,), "text": ("x",)})

    # state
    plain = "get_library_arch get_rekall_path get_name get_vmid get_address_width get_ostype get_winver get_winver_str"
    plain += " get_memsize get_max_physical_address get_num_vcpus are_events_pending slat_get_domain_state slat_create"
    plain += " pause_vm resume_vm resume_vm symcache_flush rvacache_flush pidcache_flush pagecache_flush v2pcache_flush"
    for number, call in enumerate(plain.split()):
        found.append(Case(f"{call}: {number}" if call == "resume_vm" else f"{call}: plain", call, (), {}))
    add("get_page_mode", {"cpu 0": (0,), "cpu 99": (99,), "text": ("x",), "negative": (-1,)})
    add("get_winver_manual", {"zero": (0,), "text": ("x",)})
    offsets = (
        "linux_tasks linux_mm linux_pid linux_name linux_pgd linux_kaslr linux_init_task kpgd win_tasks linux_nonsense"
    )
    add("get_offset", {name: (name,) for name in offsets.split()} | {"empty": ("",), "no text": (5,)})
    add(
        "get_kernel_struct_offset",
        {
            "known": ("task_struct", "tasks"),
            "unknown member": ("task_struct", "nonsense"),
            "unknown struct": ("nonsense", "tasks"),
            "no text": (5, "tasks"),
        },
    )
    add("get_access_mode", {"nobody": ("no-such-domain", 1, None), "no flags": ("lab", 0, None)})
    add(
        "get_vcpureg",
        {
            "CR3": (X86Reg.CR3.value, 0),
            "CR3 of cpu 99": (X86Reg.CR3.value, 99),
            "RIP": (X86Reg.RIP.value, 0),
            "enum": (X86Reg.CR3, 0),
            "text": ("x", 0),
        },
    )
    add("get_vcpuregs", {"cpu 0": (0,), "text": ("x",)})
    add("set_vcpureg", {"RIP": (1, X86Reg.RIP.value, 0), "text": ("x", 0, 0)})
    add("set_vcpuregs", {"all": (Registers(), 0), "wrong": (5, 0)})
    add("request_page_fault", {"any": (0, P.hole, 0), "text": ("x", 0, 0)})

    # caches
    add("v2pcache_flush", {"dtb": (P.dtb,), "text": ("x",), "negative": (-1,)})
    add("v2pcache_add", {"good": (0x1000, 0x123000, 0x4000), "text": ("x", 0, 0), "negative": (-1, 0, 0)})
    add("symcache_add", {"good": (0, 0, "not_yet_there", 1), "text": ("x", 0, "name", 0), "no text": (0, 0, 5, 0)})
    add("rvacache_add", {"good": (P.vdso, P.pid, 3, "name"), "text": ("x", 0, 0, "name")})
    add("pidcache_add", {"good": (P.nobody + 1, 0x123000), "text": ("x", 0), "too big": (1 << 31, 0)})

    # writes of bytes
    add(
        "write",
        {"good": (CONTEXTS["pid 0"], b"abc"), "nothing": (CONTEXTS["pid 0"], b""), "text": (CONTEXTS["pid 0"], "abc")},
    )
    add("write", {"wrong": (5, b"abc"), "symbol": (CONTEXTS["symbol"], b"abc")})
    add("write_ksym", {"good": ("linux_banner", b"abc"), "unknown": ("no_such_symbol", b"abc")})
    add("write_va", {"good": (P.banner, 0, b"abc"), "nothing": (P.banner, 0, b""), "text": (P.banner, 0, "abc")})
    add(
        "write_va",
        {"unmapped": (P.hole, 0, b"abc"), "nobody": (P.banner, P.nobody, b"abc"), "no address": ("x", 0, b"abc")},
    )
    add("write_pa", {"good": (P.banner_pa, b"abc"), "nothing": (P.banner_pa, b""), "text": (P.banner_pa, "abc")})
    add("write_pa", {"beyond": (P.memory + 4096, b"abc")})

    # events and second-level tables
    step = SingleStepEvent([0], _never)
    events = (
        MemEvent(MemAccess.RW, _never),
        RegEvent(X86Reg.CR3, RegAccess.W, _never),
        IntEvent(_never),
        DebugEvent(_never),
    )
    for event in (step, *events):
        add("register_event", {type(event).__name__: (event,)})
    add("register_event", {"wrong": (5,)})
    add("clear_event", {"MemEvent": (events[0],), "wrong": (5,)})
    add("listen", {"at once": (0,), "text": ("x",), "negative": (-1,)})
    add("toggle_single_step_vcpu", {"on": (step, 0, True), "wrong": (5, 0, True)})
    add("slat_destroy", {"any": (0,), "text": ("x",)})
    add("slat_switch", {"any": (0,), "text": ("x",)})
    add("slat_change_gfn", {"any": (0, 0, 0), "text": ("x", 0, 0)})
    add("free_unicode_str", {"wrong": (5,)})

    names = [case.name for case in found]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    return found
