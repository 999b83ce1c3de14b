// SPDX-License-Identifier: GPL-2.0
/*
 * Stands in for the driver sev_guest in a guest that is none of AMD's, so that the agent meets the kernel's own configfs-tsm:
 * it hands out the report and the certificates of two files, and only to who asks for what is in that report.
 */
#include <linux/kernel_read_file.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/tsm.h>
#include <linux/vmalloc.h>

#define REPORT "/run/tsm/report"
#define CERTIFICATES "/run/tsm/certificates"
#define VMPL 0x30
#define REPORT_DATA 0x50

static int report_new(struct tsm_report *report, void *data)
{
	void *made = NULL, *certificates = NULL;
	ssize_t size, length;

	size = kernel_read_file_from_path(REPORT, 0, &made, TSM_OUTBLOB_MAX, NULL, READING_UNKNOWN);
	if (size < 0)
		return size;
	if (size < REPORT_DATA + TSM_INBLOB_MAX || report->desc.inblob_len != TSM_INBLOB_MAX ||
	    report->desc.privlevel != *(u32 *)(made + VMPL) ||
	    memcmp(made + REPORT_DATA, report->desc.inblob, TSM_INBLOB_MAX)) {
		vfree(made);
		return -EINVAL;
	}
	report->outblob = made;
	report->outblob_len = size;
	length = kernel_read_file_from_path(CERTIFICATES, 0, &certificates, TSM_OUTBLOB_MAX, NULL, READING_UNKNOWN);
	if (length > 0) {
		report->auxblob = certificates;
		report->auxblob_len = length;
	}
	return 0;
}

static const struct tsm_ops ops = {
	.name = "sev_guest",
	.privlevel_floor = 2,
	.report_new = report_new,
};

static int __init provide(void)
{
	return tsm_register(&ops, NULL);
}

static void __exit leave(void)
{
	tsm_unregister(&ops);
}

module_init(provide);
module_exit(leave);
MODULE_DESCRIPTION("Attestation reports of a test's making");
MODULE_LICENSE("GPL");
