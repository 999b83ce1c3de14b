/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* The values that the programs and the agent exchange. The agent reads these layouts from the object's BTF
 * (guest_agent/programs.py). The IDS's side has no object, so Python repeats limits and enumerations;
 * tests/unit/test_plan_header.py compares them with this file. */
#ifndef VMISHIM_PLAN_H
#define VMISHIM_PLAN_H

#include <linux/types.h>

#define OPS_MAX 48               /* operations in a plan: one bit each in record.faults */
#define REGISTERS 16             /* pointers a plan may follow from one node */
#define TAKE_MAX 4096            /* bytes one operation may copy */
#define RECORD_MAX 16384         /* bytes that a plan may collect per node */
#ifndef SEALED
#define OUT_SIZE (1 << 20)       /* bytes that one run may return: a chunk */
#else
#define OUT_SIZE (1 << 17)       /* less: the chunk is encrypted with softirqs off */
#endif
#define HEADS_MAX (1 << 16)      /* heads that a walk may list */
#define STEPS_MAX (1 << 23)      /* bpf_loop's own limit (kernel/bpf/bpf_iter.c: BPF_MAX_LOOPS) */

/* How a walk gets from a head to its nodes. */
enum step {
	STEP_SELF,               /* the head's address is the node */
	STEP_ONCE,               /* the head holds a pointer to the one node */
	STEP_CHAIN,              /* hlist: ends in NULL */
	STEP_NULLS,              /* hlist_nulls: ends in an odd value that names the chain */
	STEP_RING,               /* list_head: ends at its head */
	STEP_RING_NODE,          /* the same, but the head is in a node, which counts (init_task) */
};

/* What to collect from a node. */
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
	__u32 size;              /* OP_LOAD: tag bits to clear in the pointer */
	__u32 slot;              /* offset in the record */
};

struct plan {
	__u64 start;             /* the only head, or the first of a table */
	__u64 heads;             /* how many */
	__u64 stride;            /* bytes from one head to the next; 0: the map `heads` lists them */
	__u64 nulls;             /* STEP_NULLS: the number that ends chain 0 */
	__u64 max_nodes;
	__s32 link;              /* offset of the link in a node */
	__u32 next;              /* offset in the link of the pointer to follow: 0 next, 8 prev */
	__u32 step;
	__u32 ops;
	__u32 record;            /* bytes of one record */
	__s32 bias;              /* distance from where a pointer points to the node's link; 0 for list_head */
	struct op op[OPS_MAX];
};

/* Precedes a node's slots in the output. */
struct record {
	__u64 node;
	__u64 faults;            /* bit i: operation i failed, its slot is zero */
	__u32 head;              /* index of the head that led to it */
	__u32 kind;              /* enum record_kind */
};

enum record_kind {
	RECORD_NODE,
	RECORD_HEAD,             /* no node: a head with the wrong end marker; `node` is its value */
	RECORD_FAULT,            /* no node: an unreadable head */
};

enum walk_state {
	WALK_MORE,               /* the chunk is full; run again */
	WALK_DONE,
	WALK_TRUNCATED,          /* plan.max_nodes reached */
};

struct walk {
	struct plan plan;
	__u64 index;             /* of the current head */
	__u64 head;              /* its address */
	__u64 link;              /* next link to visit; 0: take a new head */
	__u64 first;             /* the chain's first link */
	__u64 before;            /* the link visited before */
	__u64 nodes;             /* so far, in all chunks */
	__u64 faulted;           /* chains that ended in unreadable memory ... */
	__u64 fault_at;          /* ... the first of them here */
	__u64 cycles;            /* chains that loop without meeting their head ... */
	__u64 cycle_at;          /* ... the first of them here */
	__u64 torn;              /* links whose prev is not the link before: the list changed during the walk */
	__u64 hare, power, tortoise; /* Brent's cycle detection */
	__u64 head_link[2];      /* content of the last head */
	__u64 block[8];          /* eight bucket heads read at once */
	__u64 pair[2];           /* the current link */
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
	__u64 dtb;               /* 0: kernel virtual; else the page-table root to translate with */
	__u64 page_offset, levels, encrypted; /* copies of struct layout */
	__u64 done;              /* bytes read */
	__u64 entry[5];          /* the last translation, from the root down */
	__u64 physical;
	__u64 page_size;         /* 0: not mapped */
};

/* How this machine translates addresses: written and frozen before the first request. */
struct layout {
	__u64 page_offset;       /* the direct map */
	__u64 levels;            /* of page tables: 4 or 5 */
	__u64 encrypted;         /* bits of an entry that are not address bits: AMD SEV's C-bit, Intel TDX's shared bit */
};

/* ---- encryption by the kernel (sealed.bpf.c; vmishim/wire/sealed.py decrypts) ------------------------------------ */

#define KEYS_MAX 64              /* IDSs that can be permitted when the agent starts */
#define WALKS_MAX 16             /* unfinished walks */
#define BLOCK 16                 /* bytes of an AES block */
#define KEY_SIZE 32              /* bytes of an AES key */

enum ask_kind {
	ASK_READ,
	ASK_LOOKUP,
	ASK_WALK,
	ASK_MORE,                /* the next chunk of a walk */
};

/* From the IDS. */
struct question {
	__u64 challenge[2];      /* random, so that an old answer does not match */
	__u32 kind;
	__u32 chunk;             /* ASK_MORE: which chunk, from 1 */
	__u64 space;             /* 0: kernel virtual, 1: physical, else a page-table root */
	__u64 address;
	__u64 count;
	__u64 began;             /* ASK_MORE: counter of the walk's first chunk */
	__u64 heads;             /* bytes of listed heads */
};

/* For `store_keys`: the keys of one IDS. */
struct kernel_keys {
	__u64 number;            /* of the IDS, below KEYS_MAX */
	__u64 cipher[4], iv[4], mac[4];
	__u64 subkey[2];         /* RFC 4493's K1 of `mac` */
};

/* From the agent. */
struct ask {
	struct question question;
	struct plan plan;        /* ASK_WALK */
	__u64 tag[2];            /* the IDS's: AES-CMAC of question, plan, heads, and a block of zeros */
	__u32 key;               /* number of the IDS */
	__u32 slot;              /* where the walk is kept */
};

/* Precedes the bytes, and is encrypted with them. */
struct report {
	__u64 faulted, fault_at, cycles, cycle_at, torn, head[2], state; /* a walk's, see struct walk */
	__u64 physical, page_size, entry[5], levels;                     /* a look-up's, see struct read */
};

/* To the agent. */
struct sealed {
	__u64 counter;           /* of all answers that this kernel sealed, from 1 */
	__u64 length;            /* of bytes, without the zeros that pad them to whole blocks */
	__u64 tag[2];            /* AES-CMAC of question, plan, heads, iv, report, bytes, and a block of counter and length */
	__u64 iv[2];
	struct report report;    /* AES-CBC from here */
	__u8 bytes[OUT_SIZE];
};

#endif
