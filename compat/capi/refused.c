/* What an agent in the guest cannot do: it needs a hypervisor, Windows, or a disk. Each fails as LibVMI's file driver. */
#include "libvmi.h"

#define REFUSED(NAME, ...)                                                                                             \
    status_t NAME(__VA_ARGS__)                                                                                         \
    {                                                                                                                  \
        return VMI_FAILURE;                                                                                            \
    }
#define NOTHING(TYPE, NAME, ...)                                                                                       \
    TYPE NAME(__VA_ARGS__)                                                                                             \
    {                                                                                                                  \
        return 0;                                                                                                      \
    }
#pragma GCC diagnostic ignored "-Wunused-parameter"

REFUSED(vmi_request_page_fault, vmi_instance_t vmi, unsigned long vcpu, uint64_t address, uint32_t error_code)
REFUSED(vmi_get_tsc_info, vmi_instance_t vmi, uint32_t *mode, uint64_t *nsec, uint32_t *khz, uint32_t *incarnation)
REFUSED(vmi_get_xsave_info, vmi_instance_t vmi, unsigned long vcpu, xsave_area_t *xsave)
REFUSED(vmi_get_vcpumtrr, vmi_instance_t vmi, mtrr_regs_t *mtrr, unsigned long vcpu)
REFUSED(vmi_get_vcpuregs, vmi_instance_t vmi, registers_t *regs, unsigned long vcpu)
REFUSED(vmi_set_vcpureg, vmi_instance_t vmi, uint64_t value, reg_t reg, unsigned long vcpu)
REFUSED(vmi_set_vcpuregs, vmi_instance_t vmi, registers_t *regs, unsigned long vcpu)
REFUSED(vmi_alloc_gfn, vmi_instance_t vmi, uint64_t gfn)
REFUSED(vmi_free_gfn, vmi_instance_t vmi, uint64_t gfn)
REFUSED(vmi_get_domain_status, vmi_instance_t vmi, domain_status_t *status)
NOTHING(addr_t, vmi_get_next_available_gfn, vmi_instance_t vmi)

REFUSED(vmi_mmap_guest, vmi_instance_t vmi, const access_context_t *ctx, size_t num_pages, int prot, void **ptrs)
REFUSED(vmi_mmap_guest_pfns, vmi_instance_t vmi, unsigned long *pfns, size_t num_pages, int prot, void **ptrs)
REFUSED(vmi_mmap_guest_pa, vmi_instance_t vmi, addr_t paddr, size_t num_pages, int prot, void **ptrs)

REFUSED(vmi_read_disk, vmi_instance_t vmi, const char *device_id, uint64_t offset, uint64_t count, void *buffer)
REFUSED(vmi_disk_is_bootable, vmi_instance_t vmi, const char *device_id, bool *bootable)
NOTHING(char **, vmi_get_disks, vmi_instance_t vmi, unsigned int *num)

NOTHING(unicode_string_t *, vmi_read_unicode_str, vmi_instance_t vmi, const access_context_t *ctx)
NOTHING(unicode_string_t *, vmi_read_unicode_str_pm, vmi_instance_t vmi, const access_context_t *ctx, page_mode_t mode)
NOTHING(unicode_string_t *, vmi_read_unicode_str_va, vmi_instance_t vmi, addr_t vaddr, vmi_pid_t pid)

REFUSED(vmi_slat_get_domain_state, vmi_instance_t vmi, bool *state)
REFUSED(vmi_slat_state, vmi_instance_t vmi, bool *state)
REFUSED(vmi_slat_set_domain_state, vmi_instance_t vmi, bool state)
REFUSED(vmi_slat_control, vmi_instance_t vmi, bool state)
REFUSED(vmi_slat_create, vmi_instance_t vmi, uint16_t *slat_id)
REFUSED(vmi_slat_destroy, vmi_instance_t vmi, uint16_t slat_idx)
REFUSED(vmi_slat_switch, vmi_instance_t vmi, uint16_t slat_idx)
REFUSED(vmi_slat_change_gfn, vmi_instance_t vmi, uint16_t slat_idx, addr_t old_gfn, addr_t new_gfn)

REFUSED(vmi_register_event, vmi_instance_t vmi, vmi_event_t *event)
REFUSED(vmi_swap_events, vmi_instance_t vmi, vmi_event_t *from, vmi_event_t *to, vmi_event_free_t free_routine)
REFUSED(vmi_clear_event, vmi_instance_t vmi, vmi_event_t *event, vmi_event_free_t free_routine)
REFUSED(vmi_set_mem_event, vmi_instance_t vmi, addr_t gfn, uint8_t access, uint16_t slat_id)
REFUSED(vmi_set_mem_event_range, vmi_instance_t vmi, addr_t start, addr_t end, uint8_t access, uint16_t slat_id)
REFUSED(vmi_step_event, vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, uint64_t steps, event_callback_t cb)
REFUSED(vmi_event_listener_required, vmi_instance_t vmi, bool required)
REFUSED(vmi_stop_single_step_vcpu, vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu)
REFUSED(vmi_toggle_single_step_vcpu, vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, bool enabled)
REFUSED(vmi_shutdown_single_step, vmi_instance_t vmi)
NOTHING(vmi_event_t *, vmi_get_reg_event, vmi_instance_t vmi, reg_t reg)
NOTHING(vmi_event_t *, vmi_get_mem_event, vmi_instance_t vmi, addr_t gfn, uint8_t access)
NOTHING(vmi_event_t *, vmi_get_singlestep_event, vmi_instance_t vmi, uint32_t vcpu)
