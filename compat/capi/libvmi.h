/* The interface of LibVMI's C library, declared by us from its documentation: what libvmi.so.0 exports and how its
 * arguments and structures are laid out on x86-64. libvmi.c defines it; the contract program of the tests calls it.
 *
 * Two ABIs exist under the soname libvmi.so.0. 0.15 is what LibVMI's Python wheel 3.7.1 and its development branch have;
 * 0.14 is the last release that was tagged. What differs between them is declared twice here, with the suffix _14.
 */
#ifndef VMISHIM_LIBVMI_H
#define VMISHIM_LIBVMI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t addr_t;
typedef int32_t vmi_pid_t;
typedef uint64_t reg_t;
typedef struct vmi_instance *vmi_instance_t;

typedef enum { VMI_SUCCESS, VMI_FAILURE } status_t;
typedef enum { VMI_XEN, VMI_KVM, VMI_FILE, VMI_BAREFLANK } vmi_mode_t;
typedef enum {
    VMI_CONFIG_GLOBAL_FILE_ENTRY, VMI_CONFIG_STRING, VMI_CONFIG_GHASHTABLE, VMI_CONFIG_JSON_PATH, VMI_CONFIG_FILE_PATH
} vmi_config_t;
typedef enum {
    VMI_INIT_ERROR_NONE, VMI_INIT_ERROR_DRIVER_NOT_DETECTED, VMI_INIT_ERROR_DRIVER, VMI_INIT_ERROR_VM_NOT_FOUND,
    VMI_INIT_ERROR_PAGING, VMI_INIT_ERROR_OS, VMI_INIT_ERROR_EVENTS, VMI_INIT_ERROR_NO_CONFIG,
    VMI_INIT_ERROR_NO_CONFIG_ENTRY
} vmi_init_error_t;
typedef enum { VMI_OS_UNKNOWN, VMI_OS_LINUX } os_t;
typedef enum { VMI_OS_WINDOWS_NONE } win_ver_t;
typedef enum { VMI_ARCH_UNKNOWN, VMI_ARCH_X86, VMI_ARCH_X86_64 } vmi_arch_t;

enum {
    VMI_INIT_DOMAINNAME = 1, VMI_INIT_DOMAINID = 2, VMI_INIT_EVENTS = 4, VMI_INIT_DOMAINUUID = 8,
    VMI_INIT_DOMAINWATCH = 16
};
enum { VMI_INIT_DATA_KVMI_SOCKET = 2 };
enum { CR3 = 20 };

/* Page modes. 0.15 put VMI_PM_NONE before all others. */
typedef uint32_t page_mode_t;
enum { VMI_PM_NONE = 0, VMI_PM_UNKNOWN = 1, VMI_PM_IA32E = 4, VMI_PM_EPT_4L = 7, VMI_PM_EPT_5L = 8 };
enum { VMI_PM_UNKNOWN_14 = 0, VMI_PM_IA32E_14 = 3 };

/* Ways to translate. 0.14 had VMI_TM_INVALID before all others. */
enum { VMI_TM_NONE, VMI_TM_PROCESS_DTB, VMI_TM_PROCESS_PID, VMI_TM_KERNEL_SYMBOL };
enum { VMI_TM_INVALID_14, VMI_TM_NONE_14, VMI_TM_PROCESS_DTB_14, VMI_TM_PROCESS_PID_14, VMI_TM_KERNEL_SYMBOL_14 };

enum { ACCESS_CONTEXT_VERSION = 1 };

typedef struct {
    uint32_t version, unused;
    page_mode_t pm, npm;
    addr_t npt;
    uint32_t tm, unused_too;
    union {
        struct {
            addr_t addr;
            union {
                addr_t pt;
                vmi_pid_t pid;
            };
        };
        const char *ksym;
    };
} access_context_t;

typedef struct {
    uint32_t tm;
    addr_t addr;
    const char *ksym;
    addr_t dtb;
    vmi_pid_t pid;
} access_context_14_t;

/* The page-table entries that lead to a page. */
struct entries {
    addr_t pte_location, pte_value, pgd_location, pgd_value, pdpte_location, pdpte_value, pml4e_location, pml4e_value;
};

typedef struct {
    addr_t vaddr, paddr, naddr;
    uint32_t size, nsize;
    addr_t pt;
    page_mode_t pm;
    addr_t npt;
    page_mode_t npm;
    struct entries x86_ia32e;
} page_info_t;

typedef struct {
    addr_t vaddr, dtb, paddr;
    uint32_t size;
    struct entries x86_ia32e;
} page_info_14_t;

typedef struct {
    uint64_t type;
    void *data;
} vmi_init_data_entry_t;

typedef struct {
    uint64_t count;
    vmi_init_data_entry_t entry[];
} vmi_init_data_t;

typedef struct {
    size_t length;
    uint8_t *contents;
    const char *encoding;
} unicode_string_t;

/* What is only passed through, or never filled in. */
typedef struct vmi_event vmi_event_t;
typedef struct registers registers_t;
typedef struct x86_mtrr_regs mtrr_regs_t;
typedef struct xsave_area xsave_area_t;
typedef struct domain_status domain_status_t;
typedef struct win_build_info win_build_info_t;
typedef struct json_object json_object;
typedef struct _GSList GSList;
typedef void (*vmi_event_free_t)(vmi_event_t *event, status_t status);
typedef uint32_t (*event_callback_t)(vmi_instance_t vmi, vmi_event_t *event);

/* Headers of Windows executables (Microsoft, PE Format). */
struct dos_header {
    uint16_t signature, fields[29];
    uint32_t offset_to_pe;
} __attribute__((packed));
struct pe_header {
    uint32_t signature;
    uint16_t machine, number_of_sections;
    uint32_t time_date_stamp, pointer_to_symbol_table, number_of_symbols;
    uint16_t size_of_optional_header, characteristics;
} __attribute__((packed));
struct image_data_directory {
    uint32_t virtual_address, size;
} __attribute__((packed));
struct optional_header_pe32 {
    uint16_t magic;
    uint8_t fields[90];
    uint32_t number_of_rva_and_sizes;
    struct image_data_directory idd[16];
} __attribute__((packed));
struct optional_header_pe32plus {
    uint16_t magic;
    uint8_t fields[106];
    uint32_t number_of_rva_and_sizes;
    struct image_data_directory idd[16];
} __attribute__((packed));
struct export_table {
    uint32_t export_flags, time_date_stamp;
    uint16_t major_version, minor_version;
    uint32_t name, base, number_of_functions, number_of_names, address_of_functions, address_of_names,
        address_of_name_ordinals;
} __attribute__((packed));

#pragma GCC visibility push(default)

/* A guest is opened, held still and closed. */
status_t vmi_init(vmi_instance_t *vmi, vmi_mode_t mode, const void *domain, uint64_t flags, vmi_init_data_t *data,
                  vmi_init_error_t *error);
status_t vmi_init_complete(vmi_instance_t *vmi, const void *domain, uint64_t flags, vmi_init_data_t *data,
                           vmi_config_t mode, void *config, vmi_init_error_t *error);
page_mode_t vmi_init_paging(vmi_instance_t vmi, uint64_t flags);
os_t vmi_init_os(vmi_instance_t vmi, vmi_config_t mode, void *config, vmi_init_error_t *error);
os_t vmi_init_profile(vmi_instance_t vmi, vmi_config_t mode, void *config);
status_t vmi_destroy(vmi_instance_t vmi);
status_t vmi_pause_vm(vmi_instance_t vmi);
status_t vmi_resume_vm(vmi_instance_t vmi);

/* Addresses. */
status_t vmi_translate_kv2p(vmi_instance_t vmi, addr_t vaddr, addr_t *paddr);
status_t vmi_translate_uv2p(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, addr_t *paddr);
status_t vmi_translate_ksym2v(vmi_instance_t vmi, const char *symbol, addr_t *vaddr);
status_t vmi_translate_sym2v(vmi_instance_t vmi, const access_context_t *ctx, const char *symbol, addr_t *vaddr);
const char *vmi_translate_v2sym(vmi_instance_t vmi, const access_context_t *ctx, addr_t rva);
const char *vmi_translate_v2ksym(vmi_instance_t vmi, const access_context_t *ctx, addr_t va);
status_t vmi_pid_to_dtb(vmi_instance_t vmi, vmi_pid_t pid, addr_t *dtb);
status_t vmi_dtb_to_pid(vmi_instance_t vmi, addr_t dtb, vmi_pid_t *pid);
status_t vmi_pagetable_lookup(vmi_instance_t vmi, addr_t pt, addr_t vaddr, addr_t *paddr);
status_t vmi_pagetable_lookup_extended(vmi_instance_t vmi, addr_t pt, addr_t vaddr, page_info_t *info);
status_t vmi_nested_pagetable_lookup(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt, page_mode_t pm,
                                     addr_t vaddr, addr_t *paddr, addr_t *naddr);
status_t vmi_nested_pagetable_lookup_extended(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt,
                                              page_mode_t pm, addr_t vaddr, page_info_t *info);
GSList *vmi_get_va_pages(vmi_instance_t vmi, addr_t pt);
GSList *vmi_get_nested_va_pages(vmi_instance_t vmi, addr_t npt, page_mode_t npm, addr_t pt, page_mode_t pm);

/* Reads. */
status_t vmi_read(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *bytes_read);
status_t vmi_read_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t count, void *buf, size_t *bytes_read);
status_t vmi_read_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *bytes_read);
status_t vmi_read_ksym(vmi_instance_t vmi, const char *sym, size_t count, void *buf, size_t *bytes_read);
#define VMI_READS(NAME, TYPE)                                                                                          \
    status_t vmi_read_##NAME(vmi_instance_t vmi, const access_context_t *ctx, TYPE *value);                            \
    status_t vmi_read_##NAME##_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, TYPE *value);                       \
    status_t vmi_read_##NAME##_pa(vmi_instance_t vmi, addr_t paddr, TYPE *value);                                      \
    status_t vmi_read_##NAME##_ksym(vmi_instance_t vmi, const char *sym, TYPE *value);                                 \
    status_t vmi_write_##NAME(vmi_instance_t vmi, const access_context_t *ctx, TYPE *value);                           \
    status_t vmi_write_##NAME##_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, TYPE *value);                      \
    status_t vmi_write_##NAME##_pa(vmi_instance_t vmi, addr_t paddr, TYPE *value);                                     \
    status_t vmi_write_##NAME##_ksym(vmi_instance_t vmi, const char *sym, TYPE *value)
VMI_READS(8, uint8_t);
VMI_READS(16, uint16_t);
VMI_READS(32, uint32_t);
VMI_READS(64, uint64_t);
VMI_READS(addr, addr_t);
char *vmi_read_str(vmi_instance_t vmi, const access_context_t *ctx);
char *vmi_read_str_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid);
char *vmi_read_str_pa(vmi_instance_t vmi, addr_t paddr);
char *vmi_read_str_ksym(vmi_instance_t vmi, const char *sym);
uint16_t *vmi_read_wstr(vmi_instance_t vmi, const access_context_t *ctx);
uint16_t *vmi_read_wstr_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid);
uint16_t *vmi_read_wstr_pa(vmi_instance_t vmi, addr_t paddr);
unicode_string_t *vmi_read_unicode_str(vmi_instance_t vmi, const access_context_t *ctx);
unicode_string_t *vmi_read_unicode_str_pm(vmi_instance_t vmi, const access_context_t *ctx, page_mode_t mode);
unicode_string_t *vmi_read_unicode_str_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid);
status_t vmi_convert_str_encoding(const unicode_string_t *in, unicode_string_t *out, const char *outencoding);
void vmi_free_unicode_str(unicode_string_t *p_us);
/* 0.14 has no prot: its fourth argument is access_ptrs. */
status_t vmi_mmap_guest(vmi_instance_t vmi, const access_context_t *ctx, size_t num_pages, int prot,
                        void **access_ptrs);
status_t vmi_mmap_guest_pfns(vmi_instance_t vmi, unsigned long *pfns, size_t num_pages, int prot, void **access_ptrs);
status_t vmi_mmap_guest_pa(vmi_instance_t vmi, addr_t paddr, size_t num_pages, int prot, void **access_ptrs);
status_t vmi_read_disk(vmi_instance_t vmi, const char *device_id, uint64_t offset, uint64_t count, void *buffer);
char **vmi_get_disks(vmi_instance_t vmi, unsigned int *num);
status_t vmi_disk_is_bootable(vmi_instance_t vmi, const char *device_id, bool *bootable);

/* Writes. */
status_t vmi_write(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *bytes_written);
status_t vmi_write_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t count, void *buf, size_t *bytes_written);
status_t vmi_write_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *bytes_written);
status_t vmi_write_ksym(vmi_instance_t vmi, const char *sym, size_t count, void *buf, size_t *bytes_written);

/* Output on standard output. */
void vmi_print_hex(const unsigned char *data, unsigned long length);
void vmi_print_hex_va(vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid, size_t length);
void vmi_print_hex_pa(vmi_instance_t vmi, addr_t paddr, size_t length);
void vmi_print_hex_ksym(vmi_instance_t vmi, const char *sym, size_t length);

/* The guest. */
vmi_arch_t vmi_get_library_arch(void);
char *vmi_get_name(vmi_instance_t vmi);
uint64_t vmi_get_vmid(vmi_instance_t vmi);
status_t vmi_get_access_mode(vmi_instance_t vmi, const void *domain, uint64_t flags, vmi_init_data_t *data,
                             vmi_mode_t *mode);
page_mode_t vmi_get_page_mode(vmi_instance_t vmi, unsigned long vcpu);
uint8_t vmi_get_address_width(vmi_instance_t vmi);
os_t vmi_get_ostype(vmi_instance_t vmi);
bool vmi_get_windows_build_info(vmi_instance_t vmi, win_build_info_t *info);
win_ver_t vmi_get_winver(vmi_instance_t vmi);
uint16_t vmi_get_win_buildnumber(vmi_instance_t vmi);
const char *vmi_get_winver_str(vmi_instance_t vmi);
win_ver_t vmi_get_winver_manual(vmi_instance_t vmi, addr_t kdvb_pa);
status_t vmi_get_offset(vmi_instance_t vmi, const char *offset_name, addr_t *offset);
status_t vmi_get_kernel_struct_offset(vmi_instance_t vmi, const char *struct_name, const char *member, addr_t *addr);
const access_context_t *vmi_get_last_pagetable_lookup_fault(vmi_instance_t vmi);
uint64_t vmi_get_memsize(vmi_instance_t vmi);
addr_t vmi_get_max_physical_address(vmi_instance_t vmi);
addr_t vmi_get_next_available_gfn(vmi_instance_t vmi);
unsigned int vmi_get_num_vcpus(vmi_instance_t vmi);
status_t vmi_get_domain_status(vmi_instance_t vmi, domain_status_t *status);
const char *vmi_get_linux_sysmap(vmi_instance_t vmi);
const char *vmi_get_freebsd_sysmap(vmi_instance_t vmi);
const char *vmi_get_rekall_path(vmi_instance_t vmi);
const char *vmi_get_os_profile_path(vmi_instance_t vmi);

/* What needs a hypervisor. */
status_t vmi_request_page_fault(vmi_instance_t vmi, unsigned long vcpu, uint64_t address, uint32_t error_code);
status_t vmi_get_tsc_info(vmi_instance_t vmi, uint32_t *mode, uint64_t *nsec, uint32_t *khz, uint32_t *incarnation);
status_t vmi_get_xsave_info(vmi_instance_t vmi, unsigned long vcpu, xsave_area_t *xsave);
status_t vmi_get_vcpumtrr(vmi_instance_t vmi, mtrr_regs_t *mtrr, unsigned long vcpu);
status_t vmi_get_vcpureg(vmi_instance_t vmi, uint64_t *value, reg_t reg, unsigned long vcpu);
status_t vmi_get_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu);
status_t vmi_set_vcpureg(vmi_instance_t vmi, uint64_t value, reg_t reg, unsigned long vcpu);
status_t vmi_set_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu);
status_t vmi_alloc_gfn(vmi_instance_t vmi, uint64_t gfn);
status_t vmi_free_gfn(vmi_instance_t vmi, uint64_t gfn);
status_t vmi_slat_get_domain_state(vmi_instance_t vmi, bool *state);
status_t vmi_slat_state(vmi_instance_t vmi, bool *state);
status_t vmi_slat_set_domain_state(vmi_instance_t vmi, bool state);
status_t vmi_slat_control(vmi_instance_t vmi, bool state);
status_t vmi_slat_create(vmi_instance_t vmi, uint16_t *slat_id);
status_t vmi_slat_destroy(vmi_instance_t vmi, uint16_t slat_idx);
status_t vmi_slat_switch(vmi_instance_t vmi, uint16_t slat_idx);
status_t vmi_slat_change_gfn(vmi_instance_t vmi, uint16_t slat_idx, addr_t old_gfn, addr_t new_gfn);
uint32_t vmi_events_version(void);
status_t vmi_register_event(vmi_instance_t vmi, vmi_event_t *event);
status_t vmi_swap_events(vmi_instance_t vmi, vmi_event_t *from, vmi_event_t *to, vmi_event_free_t free_routine);
status_t vmi_clear_event(vmi_instance_t vmi, vmi_event_t *event, vmi_event_free_t free_routine);
vmi_event_t *vmi_get_reg_event(vmi_instance_t vmi, reg_t reg);
vmi_event_t *vmi_get_mem_event(vmi_instance_t vmi, addr_t gfn, uint8_t access);
status_t vmi_set_mem_event(vmi_instance_t vmi, addr_t gfn, uint8_t access, uint16_t slat_id);
status_t vmi_set_mem_event_range(vmi_instance_t vmi, addr_t start, addr_t end, uint8_t access, uint16_t slat_id);
status_t vmi_step_event(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, uint64_t steps, event_callback_t cb);
status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout);
status_t vmi_event_listener_required(vmi_instance_t vmi, bool required);
int vmi_are_events_pending(vmi_instance_t vmi);
vmi_event_t *vmi_get_singlestep_event(vmi_instance_t vmi, uint32_t vcpu);
status_t vmi_stop_single_step_vcpu(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu);
status_t vmi_toggle_single_step_vcpu(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, bool enabled);
status_t vmi_shutdown_single_step(vmi_instance_t vmi);

/* What is believed until it is flushed. */
void vmi_v2pcache_flush(vmi_instance_t vmi, addr_t pt);
void vmi_v2pcache_nested_flush(vmi_instance_t vmi, addr_t pt, addr_t npt);
void vmi_v2pcache_add(vmi_instance_t vmi, addr_t va, addr_t pt, addr_t pa);
void vmi_v2pcache_nested_add(vmi_instance_t vmi, addr_t va, addr_t pt, addr_t npt, addr_t pa);
void vmi_symcache_flush(vmi_instance_t vmi);
void vmi_symcache_add(vmi_instance_t vmi, addr_t base_addr, vmi_pid_t pid, char *sym, addr_t va);
void vmi_rvacache_flush(vmi_instance_t vmi);
void vmi_rvacache_add(vmi_instance_t vmi, addr_t base_addr, vmi_pid_t pid, addr_t rva, char *sym);
void vmi_pidcache_flush(vmi_instance_t vmi);
void vmi_pidcache_add(vmi_instance_t vmi, vmi_pid_t pid, addr_t dtb);
void vmi_pagecache_flush(vmi_instance_t vmi);

/* A kernel's JSON profile, Volatility 3's or Rekall's. */
json_object *vmi_get_kernel_json(vmi_instance_t vmi);
status_t vmi_get_symbol_addr_from_json(vmi_instance_t vmi, json_object *json, const char *symbol, addr_t *addr);
status_t vmi_get_struct_size_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name, size_t *size);
status_t vmi_get_struct_member_offset_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                const char *struct_member, addr_t *offset);
status_t vmi_get_bitfield_offset_and_size_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                    const char *struct_member, addr_t *offset, size_t *start_bit,
                                                    size_t *end_bit);
status_t vmi_get_struct_field_type_name_from_json(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                                  const char *struct_member, const char **member_type_name);
/* LibVMI's header declares the name above, its library defines this one. */
status_t vmi_get_struct_field_type_name(vmi_instance_t vmi, json_object *json, const char *struct_name,
                                        const char *struct_member, const char **member_type_name);

/* Windows executables. */
status_t peparse_validate_pe_image(const uint8_t *image, size_t len);
status_t peparse_get_image(vmi_instance_t vmi, const access_context_t *ctx, size_t len, uint8_t *image);
void peparse_assign_headers(const uint8_t *image, struct dos_header **dos, struct pe_header **pe, uint16_t *type,
                            void **optional, struct optional_header_pe32 **pe32,
                            struct optional_header_pe32plus **pe32plus);
addr_t peparse_get_idd_rva(uint32_t entry, uint16_t *type, void *optional, struct optional_header_pe32 *pe32,
                           struct optional_header_pe32plus *pe32plus);
size_t peparse_get_idd_size(uint32_t entry, uint16_t *type, void *optional, struct optional_header_pe32 *pe32,
                            struct optional_header_pe32plus *pe32plus);
status_t peparse_get_export_table(vmi_instance_t vmi, const access_context_t *ctx, struct export_table *et,
                                  addr_t *export_table_rva, size_t *export_table_size);

#pragma GCC visibility pop
#endif
