/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* The members of kernel structures that our programs name, and no more. CO-RE finds them by name in the running kernel,
 * so neither their order nor what is left out matters, and no vmlinux.h of one kernel is needed to build. */
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

/* Only pointers to it are held. */
struct bpf_crypto_ctx {
	const void *type;
};

#pragma clang attribute pop

/* An argument, laid out as in kernel/bpf/crypto.c: the verifier looks at its size only. */
struct bpf_crypto_params {
	char type[14];
	__u8 reserved[2];
	char algo[128];
	__u8 key[256];
	__u32 key_len;
	__u32 authsize;
};

#endif
