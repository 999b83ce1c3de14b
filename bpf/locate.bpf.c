// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Find the data symbols that kallsyms omits. A kernel built without KALLSYMS_ALL lists functions only; this program
 * reaches its data from the task that runs it, with CO-RE. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include "kernel.h"
#include "core_fixes.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct located {
	__u64 init_task;     /* the ancestor that is its own parent */
	__u64 init_net;      /* init_task's network namespace */
	__u64 tcp_hashinfo;  /* the table init_net uses */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct located);
} located SEC(".maps");

SEC("syscall")
int locate(void *unused)
{
	__u32 zero = 0;
	struct located *found = bpf_map_lookup_elem(&located, &zero);
	struct task_struct *task = (void *)bpf_get_current_task(), *parent;
	struct net *net;
	int i;

	if (!found)
		return 1;
	for (i = 0; i < 64; i++) { /* PID_NS_MAX_LEVEL bounds namespaces, not ancestry; 64 is deep for a service */
		parent = BPF_CORE_READ(task, real_parent);
		if (!parent || parent == task)
			break;
		task = parent;
	}
	if (i == 64)
		return 2;
	found->init_task = (__u64)task;
	net = BPF_CORE_READ(task, nsproxy, net_ns);
	found->init_net = (__u64)net;
	found->tcp_hashinfo = (__u64)tcp_hashinfo_of(net);
	return 0;
}
