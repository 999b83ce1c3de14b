/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* Every difference between kernels that our programs handle, each with the commit that introduced it. */
#ifndef VMISHIM_CORE_FIXES_H
#define VMISHIM_CORE_FIXES_H

#include <bpf/bpf_core_read.h>
#include "kernel.h"

/* netns_ipv4.tcp_death_row was a pointer from 5.18 (fbb8295248e1) until 6.1 (e9bd0cca09d1) made it a member again; its
 * hashinfo is a pointer in both. */
struct netns_ipv4___pointer {
	struct inet_timewait_death_row *tcp_death_row;
} __attribute__((preserve_access_index));

static __always_inline struct inet_hashinfo *tcp_hashinfo_of(struct net *net)
{
	struct netns_ipv4___pointer *ipv4 = (void *)&net->ipv4;

	if (bpf_core_type_matches(struct netns_ipv4___pointer))
		return BPF_CORE_READ(ipv4, tcp_death_row, hashinfo);
	return BPF_CORE_READ(net, ipv4.tcp_death_row.hashinfo);
}

#endif
