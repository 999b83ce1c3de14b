/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* The values that pass between the programs and the agent. The agent reads the layouts from the object's BTF
 * (guest_agent/programs.py). Limits and enumerations stand in Python too, for the IDS's side, which has no object;
 * tests/unit/test_plan_header.py compares them with this file. */
#ifndef VMISHIM_PLAN_H
#define VMISHIM_PLAN_H

#include <linux/types.h>

#define OPS_MAX 48               /* operations a plan may hold: one bit each in record.faults */
#define REGISTERS 16             /* pointers a plan may follow from one node */
#define TAKE_MAX 4096            /* bytes one operation may copy */
#define RECORD_MAX 16384         /* bytes a plan may collect of one node */
#ifndef SEALED
#define OUT_SIZE (1 << 20)       /* bytes one run may hand out: a chunk */
#else
#define OUT_SIZE (1 << 17)       /* less: they are encrypted with softirqs off */
#endif
#define HEADS_MAX (1 << 16)      /* heads that can be listed one by one */
#define STEPS_MAX (1 << 23)      /* bpf_loop's own limit (kernel/bpf/bpf_iter.c: BPF_MAX_LOOPS) */

/* How a walk gets from a head to its nodes. */
enum step {
	STEP_SELF,               /* the head's address is the node */
	STEP_ONCE,               /* the head holds a pointer to the one node */
	STEP_CHAIN,              /* hlist: ends in NULL */
	STEP_NULLS,              /* hlist_nulls: ends in an odd value that names the chain */
	STEP_RING,               /* list_head: ends where it began */
	STEP_RING_NODE,          /* the same, and the head sits in a node of its own (init_task) */
};

/* What to collect of a node. */
enum op_kind {
	OP_LOAD,                 /* follow a pointer: register[dst] = *(u64 *)(register[src] + offset) & ~size */
	OP_TAKE,                 /* copy size bytes at register[src] + offset */
	OP_TEXT,                 /* the same up to the first NUL */
};

struct op {
	__u8 kind;
	__u8 dst;
	__u8 src;
	__u8 zero;
	__s32 offset;
	__u32 size;              /* OP_LOAD: tag bits that are no part of the pointer */
	__u32 slot;              /* where in the record */
};

struct plan {
	__u64 start;             /* the only head, or the first of a table */
	__u64 heads;             /* how many */
	__u64 stride;            /* bytes from one to the next; 0: they are listed in the map `heads` */
	__u64 nulls;             /* STEP_NULLS: the number that ends chain 0 */
	__u64 max_nodes;
	__s32 link;              /* offset of the link in a node */
	__u32 next;              /* offset in the link of the pointer to follow: 0 next, 8 prev */
	__u32 step;
	__u32 ops;
	__u32 record;            /* bytes of one record */
	__s32 bias;              /* from where a pointer points to the link of the node it means; 0 for list_head */
	struct op op[OPS_MAX];
};

/* What stands in the output for a node, followed by its slots. */
struct record {
	__u64 node;
	__u64 faults;            /* bit i: operation i could not be carried out, its slot is zero */
	__u32 head;              /* number of the head it was found under */
	__u32 kind;              /* enum record_kind */
};

enum record_kind {
	RECORD_NODE,
	RECORD_HEAD,             /* no node: a head that is empty in another way than its number says; `node` is its value */
	RECORD_FAULT,            /* no node: a head that cannot be read */
};

enum walk_state {
	WALK_MORE,               /* the chunk is full; run again */
	WALK_DONE,
	WALK_TRUNCATED,          /* plan.max_nodes reached */
};

struct walk {
	struct plan plan;
	__u64 index;             /* of the head under way */
	__u64 head;              /* its address */
	__u64 link;              /* next link to visit; 0: take a new head */
	__u64 first;             /* the chain's first link */
	__u64 before;            /* link visited last */
	__u64 nodes;             /* so far, all chunks */
	__u64 faulted;           /* chains that ended in unreadable memory ... */
	__u64 fault_at;          /* ... the first of them here */
	__u64 cycles;            /* chains that loop without meeting their head ... */
	__u64 cycle_at;          /* ... the first of them here */
	__u64 torn;              /* links whose prev is not where we came from: the list changed under the walk */
	__u64 hare, power, tortoise; /* Brent's cycle detection */
	__u64 head_link[2];      /* what the last head held */
	__u64 block[8];          /* eight bucket heads read at once */
	__u64 pair[2];           /* the link under way */
	__u64 node;
	__u64 faults;
	__u64 registers[REGISTERS];
	__u32 cursor;            /* bytes in this chunk */
	__u32 state;
};

/* A plain read. */
struct read {
	__u64 address;
	__u64 count;             /* wanted, at most OUT_SIZE */
	__u64 dtb;               /* 0: kernel virtual; else the page-table root that translates */
	__u64 page_offset;       /* the direct map */
	__u64 levels;            /* of page tables: 4 or 5 */
	__u64 done;              /* bytes that could be read */
	__u64 entry[5];          /* the last translation, from the root down */
	__u64 physical;
	__u64 page_size;         /* 0: not mapped */
	__u64 encrypted;         /* bits of an entry that are no address: AMD SEV's C-bit, Intel TDX's shared bit */
};

/* ---- what the kernel seals by itself (sealed.bpf.c; opened by vmishim/wire/sealed.py) --------------------------- */

#define KEYS_MAX 64              /* IDSs that can be permitted when the agent starts */
#define WALKS_MAX 16             /* unfinished walks */
#define BLOCK 16                 /* bytes AES takes at once */
#define KEY_SIZE 32              /* bytes of its key */

enum ask_kind {
	ASK_READ,
	ASK_LOOKUP,
	ASK_WALK,
	ASK_MORE,                /* the next chunk of a walk */
};

/* By the IDS. */
struct question {
	__u64 challenge[2];      /* at random: the answer to an old question has another one */
	__u32 kind;
	__u32 chunk;             /* ASK_MORE: which, counted from 1 */
	__u64 space;             /* 0: kernel virtual, 1: physical, else a page-table root */
	__u64 address;
	__u64 count;
	__u64 began;             /* ASK_MORE: counter of the walk's first chunk */
	__u64 heads;             /* bytes of heads that are listed */
};

/* For `store_keys`: the keys of one IDS, and what reads need to know of this machine. */
struct kernel_keys {
	__u64 number;            /* of the IDS, below KEYS_MAX */
	__u64 page_offset, levels, encrypted; /* as in struct read */
	__u64 cipher[4], iv[4], mac[4];
	__u64 subkey[2];         /* RFC 4493's K1 of `mac` */
};

/* From the agent. */
struct ask {
	struct question question;
	struct plan plan;        /* ASK_WALK */
	__u64 tag[2];            /* the IDS's: AES-CMAC of question, plan, heads, and a block of zeros */
	__u32 key;               /* whose */
	__u32 slot;              /* of the walk */
};

/* Stands before the bytes, and is encrypted as they are. */
struct report {
	__u64 faulted, fault_at, cycles, cycle_at, torn, head[2], state; /* a walk's, see struct walk */
	__u64 physical, page_size, entry[5], levels;                     /* a look-up's, see struct read */
};

/* To the agent. */
struct sealed {
	__u64 counter;           /* of everything this kernel sealed, from 1 */
	__u64 length;            /* of bytes, before they were filled up to whole blocks with zeros */
	__u64 tag[2];            /* AES-CMAC of question, plan, heads, iv, report, bytes, and a block of counter and length */
	__u64 iv[2];
	struct report report;    /* AES-CBC from here */
	__u8 bytes[OUT_SIZE];
};

#endif
