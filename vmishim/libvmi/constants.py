# ruff: noqa: PIE796 (LibVMI has several names for one value)
"""LibVMI's enums and constants: the names and the values of the libvmi 3.7.1 Python bindings.

Source: ``libvmi/libvmi.h`` and ``libvmi/events.h`` of LibVMI. A test compares every name and value with those of the
genuine bindings (``compat/surface.json``).
"""

from __future__ import annotations

from enum import Enum

INIT_DOMAINNAME = 1
"""``Libvmi(domain, INIT_DOMAINNAME)``: ``domain`` is a name."""
INIT_DOMAINID = 2
"""``Libvmi(domain, INIT_DOMAINID)``: ``domain`` is a number, in digits."""
INIT_EVENTS = 4
"""Ask for events as well; refused, as LibVMI refuses it without a hypervisor that has them."""
EVENTS_VERSION = 9
"""Version of LibVMI's event structure (``VMI_EVENTS_VERSION``)."""


class X86Reg(Enum):
    """Registers of an x86 virtual CPU, by the numbers of ``Libvmi.get_vcpureg`` and ``RegEvent`` (``libvmi.h``)."""

    RAX = 0
    RBX = 1
    RCX = 2
    RDX = 3
    RBP = 4
    RSI = 5
    RDI = 6
    RSP = 7
    RIP = 8
    RFLAGS = 9
    R8 = 10
    R9 = 11
    R10 = 12
    R11 = 13
    R12 = 14
    R13 = 15
    R14 = 16
    R15 = 17
    CR0 = 18
    CR2 = 19
    CR3 = 20
    CR4 = 21
    DR0 = 23
    DR1 = 24
    DR2 = 25
    DR3 = 26
    DR6 = 27
    DR7 = 28


class MSR(Enum):
    """Model-specific registers of a ``RegEvent`` (``libvmi.h``). Two MTRRs share a number, as in LibVMI."""

    ANY = 153
    ALL = 76
    FLAGS = 70
    LSTAR = 71
    CSTAR = 72
    SYSCALL_MASK = 73
    EFER = 74
    TSC_AUX = 75
    STAR = 119
    SHADOW_GS_BASE = 120
    MTRRfix64K_00000 = 121
    MTRRfix16K_80000 = 122
    MTRRfix16K_A0000 = 123
    MTRRfix4K_C0000 = 124
    MTRRfix4K_C8000 = 125
    MTRRfix4K_D0000 = 126
    MTRRfix4K_D8000 = 127
    MTRRfix4K_E0000 = 128
    MTRRfix4K_E8000 = 129
    MTRRfix4K_F0000 = 129
    MTRRfix4K_F8000 = 131
    MTRRdefType = 132
    IA32_MC0_CTL = 133
    IA32_MC0_STATUS = 134
    IA32_MC0_ADDR = 135
    IA32_MC0_MISC = 136
    IA32_MC1_CTL = 137
    IA32_MC0_CTL2 = 138
    AMD_PATCHLEVEL = 139
    AMD64_TSC_RATIO = 140
    IA32_P5_MC_ADDR = 141
    IA32_P5_MC_TYPE = 142
    IA32_TSC = 143
    IA32_PLATFORM_ID = 144
    IA32_EBL_CR_POWERON = 145
    IA32_EBC_FREQUENCY_ID = 146
    IA32_FEATURE_CONTROL = 147
    IA32_SYSENTER_CS = 148
    IA32_SYSENTER_ESP = 149
    IA32_SYSENTER_EIP = 150
    IA32_MISC_ENABLE = 151
    HYPERVISOR = 152


class VMIMode(Enum):
    """How LibVMI reaches a VM (``vmi_mode_t``)."""

    XEN = 0
    KVM = 1
    FILE = 2


class VMIConfig(Enum):
    """What kind of ``config`` is handed to ``Libvmi`` (``vmi_config_t``)."""

    GLOBAL_FILE_ENTRY = 0
    STRING = 1
    DICT = 2
    JSON_PATH = 3
    FILE_PATH = 4


class VMIStatus(Enum):
    """What every C function of LibVMI returns (``status_t``)."""

    SUCCESS = 0
    FAILURE = 1


class LibvmiInitError(Enum):
    """Names of the failures of ``Libvmi(...)``, with which its ``LibvmiError`` starts (``vmi_init_error_t``)."""

    NONE = 0
    DRIVER_NOT_DETECTED = 1
    DRIVER = 2
    VM_NOT_FOUND = 3
    PAGING = 4
    OS = 5
    EVENTS = 6
    NO_CONFIG = 7
    NO_CONFIG_ENTRY = 8


class PageMode(Enum):
    """How the guest's page tables are built (``page_mode_t``). Five-level tables are ``IA32E`` too."""

    UNKNOWN = 1
    LEGACY = 2
    PAE = 3
    IA32E = 4
    AARCH32 = 5
    AARCH64 = 6


class VMIArch(Enum):
    """What LibVMI was built for (``vmi_arch_t``); ``UNKNOWN`` and ``X86`` are one, as in the genuine bindings."""

    VMI_ARCH_UNKNOWN = 1
    VMI_ARCH_X86 = 1
    VMI_ARCH_X86_64 = 2
    VMI_ARCH_ARM32 = 3
    VMI_ARCH_ARM64 = 4


class VMIOS(Enum):
    """What runs in the guest (``os_t``)."""

    UNKNOWN = 0
    LINUX = 1
    WINDOWS = 2


class VMIWinVer(Enum):
    """Windows versions (``win_ver_t``)."""

    OS_WINDOWS_NONE = 0
    OS_WINDOWS_UNKNOWN = 1
    OS_WINDOWS_2000 = 2
    OS_WINDOWS_XP = 3
    OS_WINDOWS_2003 = 4
    OS_WINDOWS_VISTA = 5
    OS_WINDOWS_2008 = 6
    OS_WINDOWS_7 = 7
    OS_WINDOWS_8 = 8
    OS_WINDOWS_10 = 9


class TranslateMechanism(Enum):
    """What the address of an ``AccessContext`` means (``translation_mechanism_t``)."""

    NONE = 0
    PROCESS_DTB = 1
    PROCESS_PT = 1
    PROCESS_PID = 2
    KERNEL_SYMBOL = 3


class VMIInitData(Enum):
    """Kinds of ``init_data`` (``vmi_init_data_type_t``)."""

    XEN_EVTCHN = 0
    MEMMAP = 1
    KVMI_SOCKET = 2


class EventType(Enum):
    """Kinds of event (``vmi_event_type_t``)."""

    INVALID = 0
    MEMORY = 1
    REGISTER = 2
    SINGLESTEP = 3
    INTERRUPT = 4
    GUEST_REQUEST = 5
    CPUID = 6
    DEBUG_EXCEPTION = 7
    PRIVILEGED_CALL = 8
    DESCRIPTOR_ACCESS = 9


class EventResponse(Enum):
    """What an event's callback asks for (``event_response_flags_t``)."""

    NONE = 0
    EMULATE = 2
    EMULATE_NOWRITE = 4
    SET_EMUL_READ_DATA = 8
    DENY = 16
    TOGGLE_SINGLESTEP = 32
    SLAT_ID = 64
    VMM_PAGETABLE_ID = 64
    SET_REGISTERS = 128
    SET_EMUL_INSN = 256
    GET_NEXT_INTERRUPT = 512


class MemAccess(Enum):
    """Kinds of memory access that a ``MemEvent`` watches (``vmi_mem_access_t``)."""

    INVALID = 0
    N = 1
    R = 2
    W = 4
    X = 8
    RW = 6
    RX = 10
    WX = 12
    RWX = 14
    W2X = 16
    RWX2N = 32


class RegAccess(Enum):
    """Kinds of register access that a ``RegEvent`` watches (``vmi_reg_access_t``)."""

    INVALID = 0
    N = 1
    R = 2
    W = 4
    RW = 6


class InterruptType(Enum):
    """Interrupts that an ``IntEvent`` watches (``interrupts_t``)."""

    INVALID = 0
    INT3 = 1
    NEXT = 2
