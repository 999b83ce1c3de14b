/* Calls LibVMI's C library in every way, and prints what comes out, a line a call: the same whichever library it is.
 *
 * program DOMAIN CONFIG NAME=NUMBER ...: the numbers are those of tests.contract.cases.Places. Every out-parameter holds
 * POISON before the call, so what a failure leaves alone shows.
 */
#include "libvmi.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define POISON 0xa5a5a5a5a5a5a5a5ULL

static int count;
static char **given;

static uint64_t place(const char *name)
{
    size_t length = strlen(name);
    for (int i = 3; i < count; i++)
        if (!strncmp(given[i], name, length) && given[i][length] == '=')
            return strtoull(given[i] + length + 1, NULL, 0);
    fprintf(stderr, "no place %s\n", name);
    exit(2);
}

static void show(const char *call, const char *how, status_t status, uint64_t value)
{
    printf("%s, %s: %s", call, how, status ? "failure" : "success");
    if (value == POISON)
        printf(", untouched\n");
    else
        printf(", %#" PRIx64 "\n", value);
}

/* The call comes first: what is shown after it is read after it. */
#define SHOW(CALL, HOW, STATUS, VALUE)                                                                                 \
    do {                                                                                                               \
        status_t status_ = STATUS;                                                                                     \
        show(CALL, HOW, status_, VALUE);                                                                               \
    } while (0)

static void show_bytes(const char *call, const char *how, status_t status, const unsigned char *bytes, size_t all,
                       size_t came)
{
    uint64_t sum = 1469598103934665603ULL; /* FNV-1a */
    for (size_t i = 0; i < all; i++)
        sum = (sum ^ bytes[i]) * 1099511628211ULL;
    printf("%s, %s: %s, %zu bytes, %#" PRIx64 "\n", call, how, status ? "failure" : "success", came, sum);
}

static void show_string(const char *call, const char *how, const char *string)
{
    printf("%s, %s: ", call, how);
    if (string == NULL)
        printf("none\n");
    else {
        for (; *string; string++)
            printf(*string >= ' ' && *string < 127 ? "%c" : "\\x%02x", (unsigned char)*string);
        printf("\n");
    }
}

static access_context_t physical(addr_t addr)
{
    return (access_context_t){.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_NONE, .addr = addr};
}

static access_context_t by_tables(addr_t addr, addr_t pt)
{
    return (access_context_t){.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_PROCESS_DTB, .addr = addr, .pt = pt};
}

static access_context_t by_pid(addr_t addr, vmi_pid_t pid)
{
    return (access_context_t){.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_PROCESS_PID, .addr = addr, .pid = pid};
}

static access_context_t by_symbol(const char *symbol)
{
    return (access_context_t){.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_KERNEL_SYMBOL, .ksym = symbol};
}

#define SCALAR(NAME, TYPE)                                                                                             \
    static void scalars_##NAME(vmi_instance_t vmi)                                                                     \
    {                                                                                                                  \
        TYPE value;                                                                                                    \
        uint64_t seen;                                                                                                 \
        struct {                                                                                                       \
            const char *how;                                                                                           \
            addr_t address;                                                                                            \
            vmi_pid_t pid;                                                                                             \
        } virtual[] = {                                                                                                \
            {"kernel", place("banner"), 0},           {"process", place("image"), place("pid")},                       \
            {"across pages", place("crossing") + 3, 0}, {"unmapped", place("hole"), 0},                                \
            {"nobody", place("banner"), place("nobody")}, {"address 0", 0, 0},                                         \
            {"kernel half of a process", place("banner"), place("pid")},                                               \
            {"not canonical", place("banner") - (1ULL << 60), 0},                                                      \
        };                                                                                                             \
        for (size_t i = 0; i < sizeof virtual / sizeof *virtual; i++) {                                                \
            seen = POISON, memcpy(&value, &seen, sizeof value);                                                        \
            status_t status = vmi_read_##NAME##_va(vmi, virtual[i].address, virtual[i].pid, &value);                   \
            memcpy(&seen, &value, sizeof value);                                                                       \
            show("vmi_read_" #NAME "_va", virtual[i].how, status, seen);                                               \
        }                                                                                                              \
        addr_t paddrs[] = {place("banner_pa"), place("memory") + 4096, 1ULL << 62};                                    \
        const char *hows[] = {"there", "beyond", "far beyond"};                                                        \
        for (size_t i = 0; i < 3; i++) {                                                                               \
            seen = POISON, memcpy(&value, &seen, sizeof value);                                                        \
            status_t status = vmi_read_##NAME##_pa(vmi, paddrs[i], &value);                                            \
            memcpy(&seen, &value, sizeof value);                                                                       \
            show("vmi_read_" #NAME "_pa", hows[i], status, seen);                                                      \
        }                                                                                                              \
        const char *symbols[] = {"linux_banner", "no_such_symbol", ""};                                                \
        for (size_t i = 0; i < 3; i++) {                                                                               \
            seen = POISON, memcpy(&value, &seen, sizeof value);                                                        \
            status_t status = vmi_read_##NAME##_ksym(vmi, symbols[i], &value);                                         \
            memcpy(&seen, &value, sizeof value);                                                                       \
            show("vmi_read_" #NAME "_ksym", symbols[i], status, seen);                                                 \
        }                                                                                                              \
        access_context_t contexts[] = {                                                                                \
            physical(place("banner_pa")), by_tables(place("banner"), place("kpgd")), by_pid(place("banner"), 0),       \
            by_pid(place("argument"), place("pid")), by_symbol("linux_banner"), by_symbol("no_such_symbol"),           \
            by_tables(place("hole"), place("kpgd")), by_pid(place("banner"), place("nobody")),                         \
            by_tables(place("argument"), place("dtb")),                                                                \
        };                                                                                                             \
        const char *kinds[] = {"physical", "tables",           "pid 0",            "pid",      "symbol",               \
                               "symbol unknown", "tables unmapped", "pid unknown", "tables of a process"};             \
        for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {                                                    \
            seen = POISON, memcpy(&value, &seen, sizeof value);                                                        \
            status_t status = vmi_read_##NAME(vmi, &contexts[i], &value);                                              \
            memcpy(&seen, &value, sizeof value);                                                                       \
            show("vmi_read_" #NAME, kinds[i], status, seen);                                                           \
        }                                                                                                              \
        value = 1;                                                                                                     \
        show("vmi_write_" #NAME, "pid 0", vmi_write_##NAME(vmi, &contexts[2], &value), POISON);                        \
        show("vmi_write_" #NAME "_va", "kernel", vmi_write_##NAME##_va(vmi, place("banner"), 0, &value), POISON);      \
        show("vmi_write_" #NAME "_pa", "there", vmi_write_##NAME##_pa(vmi, place("banner_pa"), &value), POISON);       \
        show("vmi_write_" #NAME "_ksym", "known", vmi_write_##NAME##_ksym(vmi, "linux_banner", &value), POISON);       \
    }
SCALAR(8, uint8_t)
SCALAR(16, uint16_t)
SCALAR(32, uint32_t)
SCALAR(64, uint64_t)
SCALAR(addr, addr_t)

static void bytes(vmi_instance_t vmi)
{
    static unsigned char buffer[16384];
    size_t came;
    struct {
        const char *how;
        addr_t address;
        vmi_pid_t pid;
        size_t count;
    } reads[] = {
        {"kernel", place("banner"), 0, 64},
        {"module", place("thread"), 0, 16},
        {"across pages", place("crossing"), 0, 8},
        {"several pages", place("crossing"), 0, 9000},
        {"nothing", place("banner"), 0, 0},
        {"nothing unmapped", place("hole"), 0, 0},
        {"nothing of nobody", place("banner"), place("nobody"), 0},
        {"unmapped", place("hole"), 0, 8},
        {"into a hole", place("edge"), place("pid"), 16},
        {"up to a hole", place("edge"), place("pid"), 8},
        {"process", place("image"), place("pid"), 64},
        {"user address in the kernel", place("image"), 0, 64},
        {"kernel thread", place("banner"), place("kthread"), 16},
        {"negative pid", place("image"), -1, 16},
        {"last bytes", UINT64_MAX - 7, 0, 8},
    };
    for (size_t i = 0; i < sizeof reads / sizeof *reads; i++) {
        memset(buffer, 0xa5, sizeof buffer);
        came = 99;
        status_t status = vmi_read_va(vmi, reads[i].address, reads[i].pid, reads[i].count, buffer, &came);
        show_bytes("vmi_read_va", reads[i].how, status, buffer, sizeof buffer, came);
    }
    memset(buffer, 0xa5, sizeof buffer);
    status_t status = vmi_read_va(vmi, place("banner"), 0, 32, buffer, NULL);
    show_bytes("vmi_read_va", "without a count", status, buffer, sizeof buffer, 0);
    SHOW("vmi_read_va", "without a buffer", vmi_read_va(vmi, place("banner"), 0, 32, NULL, &came), came);
    addr_t memory = place("memory");
    struct {
        const char *how;
        addr_t address;
        size_t count;
    } physicals[] = {
        {"there", place("banner_pa"), 64}, {"beyond", memory + 4096, 8},        {"over the end", memory - 8, 16},
        {"two pages", 0x1000, 8192},       {"far beyond", 1ULL << 62, 4096},
    };
    for (size_t i = 0; i < sizeof physicals / sizeof *physicals; i++) {
        memset(buffer, 0xa5, sizeof buffer);
        came = 99;
        status = vmi_read_pa(vmi, physicals[i].address, physicals[i].count, buffer, &came);
        show_bytes("vmi_read_pa", physicals[i].how, status, buffer, sizeof buffer, came);
    }
    const char *symbols[] = {"linux_banner", "no_such_symbol"};
    for (size_t i = 0; i < 2; i++) {
        memset(buffer, 0xa5, sizeof buffer);
        came = 99;
        status = vmi_read_ksym(vmi, symbols[i], 64, buffer, &came);
        show_bytes("vmi_read_ksym", symbols[i], status, buffer, sizeof buffer, came);
    }
    came = 99;
    SHOW("vmi_write_va", "kernel", vmi_write_va(vmi, place("banner"), 0, 8, buffer, &came), came);
    came = 99;
    SHOW("vmi_write_va", "nothing", vmi_write_va(vmi, place("banner"), 0, 0, buffer, &came), came);
    came = 99;
    SHOW("vmi_write_pa", "there", vmi_write_pa(vmi, place("banner_pa"), 8, buffer, &came), came);
    came = 99;
    SHOW("vmi_write_ksym", "unknown", vmi_write_ksym(vmi, "no_such_symbol", 8, buffer, &came), came);
}

static void strings(vmi_instance_t vmi)
{
    struct {
        const char *how;
        addr_t address;
        vmi_pid_t pid;
    } texts[] = {
        {"kernel", place("banner"), 0},        {"comm", place("comm"), 0},
        {"process", place("argument"), place("pid")}, {"not UTF-8", place("not_text"), 0},
        {"unmapped", place("hole"), 0},        {"nobody", place("argument"), place("nobody")},
        {"up to a hole", place("edge"), place("pid")},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char *text = vmi_read_str_va(vmi, texts[i].address, texts[i].pid);
        show_string("vmi_read_str_va", texts[i].how, text);
        free(text);
        access_context_t ctx = by_pid(texts[i].address, texts[i].pid);
        text = vmi_read_str(vmi, &ctx);
        show_string("vmi_read_str", texts[i].how, text);
        free(text);
        if (texts[i].address & 1)
            continue; /* where a page boundary splits a character, LibVMI's vmi_read_wstr does not return */
        uint16_t *wide = vmi_read_wstr_va(vmi, texts[i].address, texts[i].pid);
        size_t length = 0;
        while (wide && wide[length])
            length++;
        show_bytes("vmi_read_wstr_va", texts[i].how, wide == NULL, (void *)wide, 2 * length, 2 * length);
        free(wide);
    }
    char *text = vmi_read_str_pa(vmi, place("banner_pa"));
    show_string("vmi_read_str_pa", "there", text);
    free(text);
    show_string("vmi_read_str_pa", "beyond", vmi_read_str_pa(vmi, place("memory") + 4096));
    text = vmi_read_str_ksym(vmi, "hex_asc");
    show_string("vmi_read_str_ksym", "hex_asc", text ? (text[16] = 0, text) : text);
    free(text);
    access_context_t ctx = by_pid(place("banner"), 0);
    printf("vmi_read_unicode_str: %s\n", vmi_read_unicode_str(vmi, &ctx) ? "some" : "none");
    printf("vmi_read_unicode_str_va: %s\n", vmi_read_unicode_str_va(vmi, place("banner"), 0) ? "some" : "none");
    unicode_string_t in = {8, (uint8_t *)"a\0b\0c\0\xe4\0", "UTF-16LE"}, out = {9, NULL, NULL};
    status_t status = vmi_convert_str_encoding(&in, &out, "UTF-8");
    show_bytes("vmi_convert_str_encoding", "UTF-16", status, out.contents, out.length, out.length);
    free(out.contents);
    in.encoding = "no such encoding";
    SHOW("vmi_convert_str_encoding", "unknown", vmi_convert_str_encoding(&in, &out, "UTF-8"), out.length);
}

static void show_entries(const char *how, status_t status, const page_info_t *info)
{
    printf("vmi_pagetable_lookup_extended, %s: %s", how, status ? "failure" : "success");
    if (!status) {
        const struct entries *e = &info->x86_ia32e;
        const addr_t MASK = ~(addr_t)0x60; /* the CPU sets the bits "accessed" and "dirty" at any time */
        printf(", %#" PRIx64 " %#" PRIx64 " %#x %#" PRIx64 ": %#" PRIx64 " %#" PRIx64 " %#" PRIx64 " %#" PRIx64 " %#" PRIx64
               " %#" PRIx64 " %#" PRIx64 " %#" PRIx64,
               info->vaddr, info->paddr, info->size, info->pt, e->pte_location, e->pte_value & MASK, e->pgd_location,
               e->pgd_value & MASK, e->pdpte_location, e->pdpte_value & MASK, e->pml4e_location,
               e->pml4e_value & MASK);
    }
    printf("\n");
}

struct list {
    void *data;
    struct list *next;
};

static void translations(vmi_instance_t vmi)
{
    struct {
        const char *how;
        addr_t tables, address;
    } lookups[] = {
        {"large", place("kpgd"), place("banner")},   {"small", place("kpgd"), place("thread")},
        {"process", place("dtb"), place("image")},   {"PCID", place("dtb") + 5, place("image")},
        {"unmapped", place("kpgd"), place("hole")},  {"no tables", place("zeros_pa"), place("banner")},
        {"beyond", place("memory") + 4096, place("banner")},
    };
    for (size_t i = 0; i < sizeof lookups / sizeof *lookups; i++) {
        addr_t paddr = POISON, naddr = POISON;
        SHOW("vmi_pagetable_lookup", lookups[i].how,
             vmi_pagetable_lookup(vmi, lookups[i].tables, lookups[i].address, &paddr), paddr);
        paddr = POISON;
        SHOW("vmi_nested_pagetable_lookup", lookups[i].how,
             vmi_nested_pagetable_lookup(vmi, 0, 0, lookups[i].tables, VMI_PM_IA32E, lookups[i].address, &paddr, &naddr),
             paddr);
        page_info_t info = {0};
        status_t status = vmi_pagetable_lookup_extended(vmi, lookups[i].tables, lookups[i].address, &info);
        show_entries(lookups[i].how, status, &info);
        const access_context_t *fault = vmi_get_last_pagetable_lookup_fault(vmi);
        printf("vmi_get_last_pagetable_lookup_fault, %s: ", lookups[i].how);
        if (fault)
            printf("%#" PRIx64 " by %#" PRIx64 "\n", fault->addr, fault->pt);
        else
            printf("none\n");
    }
    addr_t value = POISON;
    SHOW("vmi_translate_kv2p", "kernel", vmi_translate_kv2p(vmi, place("banner"), &value), value);
    value = POISON;
    SHOW("vmi_translate_kv2p", "unmapped", vmi_translate_kv2p(vmi, place("hole"), &value), value);
    value = POISON;
    SHOW("vmi_translate_uv2p", "process", vmi_translate_uv2p(vmi, place("image"), place("pid"), &value), value);
    value = POISON;
    SHOW("vmi_translate_uv2p", "unmapped", vmi_translate_uv2p(vmi, place("hole"), place("pid"), &value), value);
    value = POISON;
    SHOW("vmi_translate_uv2p", "nobody", vmi_translate_uv2p(vmi, place("image"), place("nobody"), &value), value);
    value = POISON;
    SHOW("vmi_translate_ksym2v", "known", vmi_translate_ksym2v(vmi, "init_task", &value), value);
    value = POISON;
    SHOW("vmi_translate_ksym2v", "unknown", vmi_translate_ksym2v(vmi, "no_such_symbol", &value), value);
    value = POISON;
    access_context_t libc = by_pid(place("libc"), 1), kernel = by_pid(0, 0), ctx = physical(place("libc"));
    SHOW("vmi_translate_sym2v", "library", vmi_translate_sym2v(vmi, &libc, "malloc", &value), value);
    value = POISON;
    SHOW("vmi_translate_sym2v", "physical", vmi_translate_sym2v(vmi, &ctx, "malloc", &value), value);
    show_string("vmi_translate_v2sym", "library", vmi_translate_v2sym(vmi, &libc, place("libc_symbol")));
    show_string("vmi_translate_v2sym", "inside", vmi_translate_v2sym(vmi, &libc, place("libc_symbol") + 1));
    show_string("vmi_translate_v2ksym", "kernel", vmi_translate_v2ksym(vmi, &kernel, place("init_task")));
    show_string("vmi_translate_v2ksym", "inside", vmi_translate_v2ksym(vmi, &kernel, place("init_task") + 8));
    value = POISON;
    SHOW("vmi_pid_to_dtb", "process", vmi_pid_to_dtb(vmi, place("pid"), &value), value);
    value = POISON;
    SHOW("vmi_pid_to_dtb", "kernel", vmi_pid_to_dtb(vmi, 0, &value), value);
    value = POISON;
    SHOW("vmi_pid_to_dtb", "nobody", vmi_pid_to_dtb(vmi, place("nobody"), &value), value);
    vmi_pid_t pid = 77;
    SHOW("vmi_dtb_to_pid", "process", vmi_dtb_to_pid(vmi, place("dtb"), &pid), pid);
    pid = 77;
    SHOW("vmi_dtb_to_pid", "no tables", vmi_dtb_to_pid(vmi, place("zeros_pa"), &pid), (uint32_t)pid);
    /* The list is freed by the program's own GLib. */
    void *glib = dlopen("libglib-2.0.so.0", RTLD_NOW);
    void (*free_full)(void *, void (*)(void *)) = glib ? dlsym(glib, "g_slist_free_full") : NULL;
    void (*g_free)(void *) = glib ? dlsym(glib, "g_free") : NULL;
    struct list *pages = (void *)vmi_get_va_pages(vmi, place("dtb"));
    uint64_t user = 0;
    for (struct list *at = pages; at; at = at->next) {
        page_info_t *info = at->data;
        if (info->vaddr < 1ULL << 47)
            user = user * 31 + info->vaddr + info->paddr + info->size;
    }
    show("vmi_get_va_pages", "process", pages == NULL, user);
    if (free_full)
        free_full(pages, g_free);
    SHOW("vmi_get_va_pages", "no tables", vmi_get_va_pages(vmi, place("zeros_pa")) == NULL, 0);
}

static void state(vmi_instance_t vmi)
{
    uint64_t value;
    const char *names[] = {"linux_tasks",     "linux_mm", "linux_pid", "linux_name",    "linux_pgd",
                           "linux_init_task", "kpgd",     "win_tasks", "linux_nonsense"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        value = POISON;
        status_t status = vmi_get_offset(vmi, names[i], &value);
        show("vmi_get_offset", names[i], status, value);
    }
    vmi_mode_t mode = 9;
    SHOW("vmi_get_access_mode", "opened", vmi_get_access_mode(vmi, NULL, 0, NULL, &mode), 0);
    char *name = vmi_get_name(vmi);
    printf("vmi_get_name: %s\n", name ? "some" : "none");
    free(name);
    printf("widths: %d, mode %u, os %d, architecture %d\n", vmi_get_address_width(vmi), vmi_get_page_mode(vmi, 0),
           vmi_get_ostype(vmi), vmi_get_library_arch());
    printf("windows: %d %s %d\n", vmi_get_winver(vmi), vmi_get_winver_str(vmi), vmi_get_win_buildnumber(vmi));
    printf("memory: %d\n", vmi_get_memsize(vmi) == vmi_get_max_physical_address(vmi) && vmi_get_memsize(vmi) > 0);
    printf("next gfn: %" PRIu64 "\n", vmi_get_next_available_gfn(vmi));
    printf("freebsd: %s\n", vmi_get_freebsd_sysmap(vmi) ? "some" : "none");
    printf("rekall: %s\n", vmi_get_rekall_path(vmi) ? "some" : "none");
    value = POISON;
    SHOW("vmi_get_vcpureg", "CR3", vmi_get_vcpureg(vmi, &value, CR3, 0), value);
    value = POISON;
    SHOW("vmi_get_vcpureg", "RIP", vmi_get_vcpureg(vmi, &value, 8, 0), value);
    static uint64_t room[128];
    memset(room, 0xa5, sizeof room);
    SHOW("vmi_get_vcpuregs", "all", vmi_get_vcpuregs(vmi, (void *)room, 0), room[0]);
    SHOW("vmi_set_vcpureg", "RIP", vmi_set_vcpureg(vmi, 1, 8, 0), POISON);
    SHOW("vmi_set_vcpuregs", "all", vmi_set_vcpuregs(vmi, (void *)room, 0), POISON);
    SHOW("vmi_get_vcpumtrr", "all", vmi_get_vcpumtrr(vmi, (void *)room, 0), room[0]);
    SHOW("vmi_get_xsave_info", "all", vmi_get_xsave_info(vmi, 0, (void *)room), room[0]);
    SHOW("vmi_get_tsc_info", "all",
         vmi_get_tsc_info(vmi, (void *)room, room + 1, (void *)(room + 2), (void *)(room + 3)), room[1]);
    SHOW("vmi_alloc_gfn", "any", vmi_alloc_gfn(vmi, 1), POISON);
    SHOW("vmi_free_gfn", "any", vmi_free_gfn(vmi, 1), POISON);
    SHOW("vmi_request_page_fault", "any", vmi_request_page_fault(vmi, 0, place("hole"), 0), POISON);
    SHOW("vmi_read_disk", "any", vmi_read_disk(vmi, "hda", 0, 8, room), room[0]);
    SHOW("vmi_get_domain_status", "any", vmi_get_domain_status(vmi, (void *)room), room[0]);
    void *pages[1] = {(void *)POISON};
    SHOW("vmi_mmap_guest_pa", "there", vmi_mmap_guest_pa(vmi, place("banner_pa"), 1, 1, pages), (uint64_t)pages[0]);
    bool slat = true;
    uint16_t id = 7;
    SHOW("vmi_slat_get_domain_state", "any", vmi_slat_get_domain_state(vmi, &slat), slat);
    SHOW("vmi_slat_set_domain_state", "any", vmi_slat_set_domain_state(vmi, true), POISON);
    SHOW("vmi_slat_create", "any", vmi_slat_create(vmi, &id), id);
    SHOW("vmi_slat_destroy", "any", vmi_slat_destroy(vmi, 0), POISON);
    SHOW("vmi_slat_switch", "any", vmi_slat_switch(vmi, 0), POISON);
    SHOW("vmi_slat_change_gfn", "any", vmi_slat_change_gfn(vmi, 0, 0, 0), POISON);
}

static void events(vmi_instance_t vmi)
{
    static uint64_t event[16] = {9};
    printf("vmi_events_version: %u\n", vmi_events_version());
    printf("vmi_are_events_pending: %d\n", vmi_are_events_pending(vmi));
    SHOW("vmi_register_event", "any", vmi_register_event(vmi, (void *)event), POISON);
    SHOW("vmi_clear_event", "any", vmi_clear_event(vmi, (void *)event, NULL), POISON);
    SHOW("vmi_events_listen", "at once", vmi_events_listen(vmi, 0), POISON);
    SHOW("vmi_event_listener_required", "any", vmi_event_listener_required(vmi, false), POISON);
    SHOW("vmi_toggle_single_step_vcpu", "on", vmi_toggle_single_step_vcpu(vmi, (void *)event, 0, true), POISON);
    SHOW("vmi_stop_single_step_vcpu", "any", vmi_stop_single_step_vcpu(vmi, (void *)event, 0), POISON);
    SHOW("vmi_shutdown_single_step", "any", vmi_shutdown_single_step(vmi), POISON);
}

static void beliefs(vmi_instance_t vmi)
{
    addr_t value = POISON;
    vmi_symcache_add(vmi, 0, 0, "made_up", place("banner"));
    SHOW("vmi_symcache_add", "made up", vmi_translate_ksym2v(vmi, "made_up", &value), value);
    vmi_symcache_flush(vmi);
    value = POISON;
    SHOW("vmi_symcache_flush", "made up", vmi_translate_ksym2v(vmi, "made_up", &value), value);
    vmi_pidcache_add(vmi, place("nobody"), place("dtb"));
    value = POISON;
    SHOW("vmi_pidcache_add", "nobody", vmi_pid_to_dtb(vmi, place("nobody"), &value), value);
    vmi_pidcache_flush(vmi);
    value = POISON;
    SHOW("vmi_pidcache_flush", "nobody", vmi_pid_to_dtb(vmi, place("nobody"), &value), value);
    vmi_v2pcache_add(vmi, place("hole"), place("kpgd"), place("banner_pa"));
    value = POISON;
    SHOW("vmi_v2pcache_add", "hole", vmi_translate_kv2p(vmi, place("hole") + 16, &value), value);
    vmi_v2pcache_flush(vmi, UINT64_MAX);
    value = POISON;
    SHOW("vmi_v2pcache_flush", "hole", vmi_translate_kv2p(vmi, place("hole"), &value), value);
    access_context_t libc = by_pid(place("libc"), 1);
    vmi_rvacache_add(vmi, place("libc"), 1, 3, "named");
    show_string("vmi_rvacache_add", "library", vmi_translate_v2sym(vmi, &libc, 3));
    vmi_rvacache_flush(vmi);
    vmi_pagecache_flush(vmi);
    SHOW("vmi_pagecache_flush", "read", vmi_read_64_va(vmi, place("banner"), 0, &value), value);
}

static void listing(vmi_instance_t vmi)
{
    addr_t tasks, pids, names, head, at;
    vmi_get_offset(vmi, "linux_tasks", &tasks);
    vmi_get_offset(vmi, "linux_pid", &pids);
    vmi_get_offset(vmi, "linux_name", &names);
    vmi_translate_ksym2v(vmi, "init_task", &head);
    at = head += tasks;
    do {
        uint32_t pid = 0;
        char *name = vmi_read_str_va(vmi, at - tasks + names, 0);
        vmi_read_32_va(vmi, at - tasks + pids, 0, &pid);
        printf("task %u %s\n", pid, name ? name : "none");
        free(name);
    } while (vmi_read_addr_va(vmi, at, 0, &at) == VMI_SUCCESS && at != head);
}

static void windows(void)
{
    static union {
        uint8_t bytes[1024];
        struct dos_header dos;
    } image;
    printf("peparse_validate_pe_image, nothing: %d\n", peparse_validate_pe_image(image.bytes, sizeof image));
    image.dos.signature = 0x5a4d, image.dos.offset_to_pe = 128;
    struct pe_header *pe = (void *)(image.bytes + 128);
    struct optional_header_pe32plus *plus = (void *)(pe + 1);
    pe->signature = 0x4550, plus->magic = 0x20b, plus->number_of_rva_and_sizes = 16;
    plus->idd[0].virtual_address = 0x1234, plus->idd[0].size = 0x56;
    printf("peparse_validate_pe_image, good: %d\n", peparse_validate_pe_image(image.bytes, sizeof image));
    printf("peparse_validate_pe_image, short: %d\n", peparse_validate_pe_image(image.bytes, 200));
    uint16_t magic = 0;
    void *optional = NULL;
    peparse_assign_headers(image.bytes, NULL, NULL, &magic, &optional, NULL, NULL);
    printf("peparse_get_idd_rva: %#" PRIx64 "\n", peparse_get_idd_rva(0, &magic, optional, NULL, NULL));
    printf("peparse_get_idd_size: %#zx\n", peparse_get_idd_size(0, &magic, optional, NULL, NULL));
    printf("peparse_get_idd_rva, by header: %#" PRIx64 "\n", peparse_get_idd_rva(0, NULL, NULL, NULL, plus));
}

/* What cannot be opened, and how the error is told. */
static void refusals(void)
{
    vmi_instance_t vmi = (vmi_instance_t)POISON;
    vmi_init_error_t error = 99;
    char domain[] = "/no/such/domain";
    SHOW("vmi_init_complete", "no such domain",
         vmi_init_complete(&vmi, domain, VMI_INIT_DOMAINNAME, NULL, VMI_CONFIG_STRING, "{}", &error), (uint64_t)vmi);
    printf("its error: %d\n", error);
    vmi_mode_t mode = 9;
    SHOW("vmi_get_access_mode", "no such domain",
         vmi_get_access_mode(NULL, domain, VMI_INIT_DOMAINNAME, NULL, &mode), mode);
    SHOW("vmi_destroy", "none", vmi_destroy(NULL), 0);
}

static void config_by_table(const char *domain, const char *config)
{
    /* The same as the text, in a GHashTable: strings as they are, numbers by pointer. */
    void *glib = dlopen("libglib-2.0.so.0", RTLD_NOW);
    if (glib == NULL) {
        fprintf(stderr, "no GLib\n");
        exit(2);
    }
    void *(*create)(void *, void *) = dlsym(glib, "g_hash_table_new");
    int (*insert)(void *, void *, void *) = dlsym(glib, "g_hash_table_insert");
    void *table = create(dlsym(glib, "g_str_hash"), dlsym(glib, "g_str_equal"));
    static uint64_t numbers[16];
    static char copy[4096];
    int number = 0;
    strncpy(copy, config, sizeof copy - 1);
    for (char *key = strtok(copy, "{} ="); key; key = strtok(NULL, "{} =;\"")) {
        char *value = strtok(NULL, " =;\"");
        if (value == NULL || number == 16)
            break;
        if (!strcmp(key, "ostype") || !strcmp(key, "sysmap"))
            insert(table, key, value);
        else {
            numbers[number] = strtoull(value, NULL, 0);
            insert(table, key, &numbers[number++]);
        }
    }
    vmi_instance_t vmi = NULL;
    status_t status =
        vmi_init_complete(&vmi, domain, VMI_INIT_DOMAINNAME, NULL, VMI_CONFIG_GHASHTABLE, table, NULL);
    addr_t value = POISON;
    if (status == VMI_SUCCESS)
        vmi_get_offset(vmi, "linux_pid", &value);
    show("vmi_init_complete", "GHashTable", status, value);
    vmi_destroy(vmi);
}

/* Step by step, as programs do that know the driver. */
static void by_steps(const char *domain, char *config)
{
    vmi_instance_t vmi = NULL;
    vmi_init_error_t error = 99;
    vmi_mode_t mode = 9;
    addr_t value = POISON;
    vmi_get_access_mode(NULL, domain, VMI_INIT_DOMAINNAME, NULL, &mode);
    SHOW("vmi_init", "steps", vmi_init(&vmi, mode, domain, VMI_INIT_DOMAINNAME, NULL, &error), error);
    SHOW("vmi_read_64_pa", "steps", vmi_read_64_pa(vmi, place("banner_pa"), &value), value);
    value = POISON;
    SHOW("vmi_translate_ksym2v", "steps", vmi_translate_ksym2v(vmi, "init_task", &value), value);
    printf("steps: os %d, mode %u, width %d\n", vmi_get_ostype(vmi), vmi_get_page_mode(vmi, 0),
           vmi_get_address_width(vmi));
    printf("vmi_init_os, steps: %d\n", vmi_init_os(vmi, VMI_CONFIG_STRING, config, &error));
    printf("steps: os %d, mode %u, width %d\n", vmi_get_ostype(vmi), vmi_get_page_mode(vmi, 0),
           vmi_get_address_width(vmi));
    value = POISON;
    SHOW("vmi_translate_ksym2v", "steps", vmi_translate_ksym2v(vmi, "init_task", &value), value);
    vmi_destroy(vmi);
}

int main(int argc, char **argv)
{
    count = argc, given = argv;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 3)
        return 2;
    refusals();
    vmi_instance_t vmi = NULL;
    vmi_init_error_t error = 99;
    SHOW("vmi_init_complete", "string",
         vmi_init_complete(&vmi, argv[1], VMI_INIT_DOMAINNAME, NULL, VMI_CONFIG_STRING, argv[2], &error), error);
    if (vmi == NULL)
        return 1;
    SHOW("vmi_pause_vm", "once", vmi_pause_vm(vmi), 0);
    SHOW("vmi_pause_vm", "twice", vmi_pause_vm(vmi), 0);
    scalars_8(vmi);
    scalars_16(vmi);
    scalars_32(vmi);
    scalars_64(vmi);
    scalars_addr(vmi);
    bytes(vmi);
    strings(vmi);
    translations(vmi);
    state(vmi);
    events(vmi);
    listing(vmi);
    listing(vmi);
    vmi_print_hex_va(vmi, place("banner"), 0, 40);
    vmi_print_hex_pa(vmi, place("banner_pa"), 16);
    vmi_print_hex_ksym(vmi, "linux_banner", 3);
    vmi_print_hex_va(vmi, place("hole"), 0, 16);
    SHOW("vmi_resume_vm", "once", vmi_resume_vm(vmi), 0);
    SHOW("vmi_resume_vm", "twice", vmi_resume_vm(vmi), 0);
    SHOW("vmi_resume_vm", "too often", vmi_resume_vm(vmi), 0);
    beliefs(vmi);
    windows();
    fflush(stdout);
    if (fork() == 0) {
        uint64_t value = POISON;
        SHOW("vmi_read_64_va", "in a forked child", vmi_read_64_va(vmi, place("banner"), 0, &value), value);
        fflush(stdout);
        _exit(0);
    }
    wait(NULL);
    SHOW("vmi_destroy", "opened", vmi_destroy(vmi), 0);
    config_by_table(argv[1], argv[2]);
    by_steps(argv[1], argv[2]);
    return 0;
}
