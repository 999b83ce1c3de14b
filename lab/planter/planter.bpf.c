// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Kernel memory that a test can fill: the pages of an array map, which its owner maps too. A test's tool, so it is not
 * built by bpf/Makefile and no agent carries it. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct page {
	__u8 bytes[4096];
};

/* Pages instead of one large value: before Linux 6.9 a value has at most KMALLOC_MAX_SIZE. They lie side by side, and
 * behind the last comes vmalloc's guard page. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 6144);
	__type(key, __u32);
	__type(value, struct page);
} ground SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} where SEC(".maps");

/* Say where the kernel has the ground. Storing a pointer as a number takes CAP_PERFMON (verifier: allow_ptr_leaks). */
SEC("syscall")
int survey(void *unused)
{
	__u32 zero = 0;
	struct page *first = bpf_map_lookup_elem(&ground, &zero);
	__u64 *address = bpf_map_lookup_elem(&where, &zero);

	if (!first || !address)
		return 1;
	*address = (__u64)first;
	return 0;
}
