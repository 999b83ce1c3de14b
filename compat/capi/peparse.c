/* Headers of Windows executables in a buffer, as Microsoft's "PE Format" lays them out. A header that points out of the
 * buffer is refused. */
#include "libvmi.h"

#include <string.h>

access_context_t context_at(vmi_instance_t vmi, const access_context_t *ctx, addr_t further);

enum { DOS_SIGNATURE = 0x5a4d, PE_SIGNATURE = 0x4550, PE32 = 0x10b, PE32_PLUS = 0x20b, DIRECTORIES = 16, HEADERS = 1024 };

status_t peparse_validate_pe_image(const uint8_t *image, size_t len)
{
    const struct dos_header *dos = (const void *)image;
    if (image == NULL || len < sizeof *dos || dos->signature != DOS_SIGNATURE)
        return VMI_FAILURE;
    uint64_t end = (uint64_t)dos->offset_to_pe + sizeof(struct pe_header) + sizeof(struct optional_header_pe32);
    if (end > len)
        return VMI_FAILURE;
    const struct pe_header *pe = (const void *)(image + dos->offset_to_pe);
    uint16_t magic;
    memcpy(&magic, pe + 1, sizeof magic);
    return pe->signature == PE_SIGNATURE && (magic == PE32 || magic == PE32_PLUS) ? VMI_SUCCESS : VMI_FAILURE;
}

status_t peparse_get_image(vmi_instance_t vmi, const access_context_t *ctx, size_t len, uint8_t *image)
{
    if (vmi_read(vmi, ctx, len, image, NULL) == VMI_FAILURE)
        return VMI_FAILURE;
    return peparse_validate_pe_image(image, len);
}

void peparse_assign_headers(const uint8_t *image, struct dos_header **dos, struct pe_header **pe, uint16_t *type,
                            void **optional, struct optional_header_pe32 **pe32,
                            struct optional_header_pe32plus **pe32plus)
{
    struct dos_header *first = (void *)image;
    struct pe_header *second = (void *)(image + first->offset_to_pe);
    void *third = second + 1;
    uint16_t magic;
    memcpy(&magic, third, sizeof magic);
    if (dos)
        *dos = first;
    if (pe)
        *pe = second;
    if (optional)
        *optional = third;
    if (type)
        *type = magic;
    if (pe32 && magic == PE32)
        *pe32 = third;
    if (pe32plus && magic == PE32_PLUS)
        *pe32plus = third;
}

/* An entry of the data directory, by either kind of header; 0 and 0 if there is none. */
static struct image_data_directory entry_of(uint32_t entry, uint16_t *type, void *optional,
                                            struct optional_header_pe32 *pe32,
                                            struct optional_header_pe32plus *pe32plus)
{
    struct image_data_directory none = {0, 0};
    if (type != NULL) {
        pe32 = optional && *type == PE32 ? optional : NULL;
        pe32plus = optional && *type == PE32_PLUS ? optional : NULL;
    }
    if (entry >= DIRECTORIES)
        return none;
    if (pe32 != NULL && pe32->number_of_rva_and_sizes >= entry)
        return pe32->idd[entry];
    if (pe32plus != NULL && pe32plus->number_of_rva_and_sizes >= entry)
        return pe32plus->idd[entry];
    return none;
}

addr_t peparse_get_idd_rva(uint32_t entry, uint16_t *type, void *optional, struct optional_header_pe32 *pe32,
                           struct optional_header_pe32plus *pe32plus)
{
    return entry_of(entry, type, optional, pe32, pe32plus).virtual_address;
}

size_t peparse_get_idd_size(uint32_t entry, uint16_t *type, void *optional, struct optional_header_pe32 *pe32,
                            struct optional_header_pe32plus *pe32plus)
{
    return entry_of(entry, type, optional, pe32, pe32plus).size;
}

status_t peparse_get_export_table(vmi_instance_t vmi, const access_context_t *ctx, struct export_table *et,
                                  addr_t *export_table_rva, size_t *export_table_size)
{
    uint8_t image[HEADERS + sizeof(struct optional_header_pe32plus)] = {0};
    uint16_t magic;
    void *optional;
    if (vmi == NULL || ctx == NULL || et == NULL || peparse_get_image(vmi, ctx, HEADERS, image) == VMI_FAILURE)
        return VMI_FAILURE;
    peparse_assign_headers(image, NULL, NULL, &magic, &optional, NULL, NULL);
    struct image_data_directory exports = entry_of(0, &magic, optional, NULL, NULL);
    if (export_table_rva)
        *export_table_rva = exports.virtual_address;
    if (export_table_size)
        *export_table_size = exports.size;
    if (!exports.virtual_address)
        return VMI_FAILURE;
    access_context_t at = context_at(vmi, ctx, exports.virtual_address);
    return vmi_read(vmi, &at, sizeof *et, et, NULL);
}
