/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* Only those members of kernel structures that our programs use. CO-RE finds them by name in the running kernel, so
 * their order and the omitted members do not matter, and the build needs no kernel's vmlinux.h. */
#ifndef VMISHIM_KERNEL_H
#define VMISHIM_KERNEL_H

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct inet_hashinfo;

struct inet_timewait_death_row {
	struct inet_hashinfo *hashinfo;
};

struct netns_ipv4 {
	struct inet_timewait_death_row tcp_death_row;
};

struct net {
	struct netns_ipv4 ipv4;
};

struct nsproxy {
	struct net *net_ns;
};

struct task_struct {
	struct task_struct *real_parent;
	struct nsproxy *nsproxy;
};

/* We only hold pointers to it. */
struct bpf_crypto_ctx {
	const void *type;
};

#pragma clang attribute pop

/* An argument, with the layout of kernel/bpf/crypto.c: the verifier checks its size only. */
struct bpf_crypto_params {
	char type[14];
	__u8 reserved[2];
	char algo[128];
	__u8 key[256];
	__u32 key_len;
	__u32 authsize;
};

#endif
