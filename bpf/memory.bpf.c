// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Reads and walks of kernel memory: programs that know no kernel structure. What to read is data (plan.h), so this
 * object needs no CO-RE relocation and loads on any kernel >= 5.17 (bpf_loop), with or without BTF.
 *
 * Rules that the verifiers impose (6.1, 6.12 and 6.18 differ):
 *  - keep a loop's state in a map value, and only pointers in the context on the stack; otherwise the verifier tracks
 *    every offset of every iteration;
 *  - put no `for` around bpf_loop: nest bpf_loop in bpf_loop;
 *  - bound an index with an `and` that the compiler cannot move (BOUND), not with a comparison that it may widen.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "plan.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* sealed.bpf.c includes this file. There user space cannot map cleartext, and the kernel keeps several walks. */
#ifndef SEALED
#define CLEAR_FLAGS BPF_F_MMAPABLE
#define WALKS_KEPT 1
#else
#define CLEAR_FLAGS 0
#define WALKS_KEPT WALKS_MAX
#endif

#define BOUND(value, mask) ({ __u64 _v = (value); asm volatile("%0 &= %1" : "+r"(_v) : "i"(mask)); _v; })

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, CLEAR_FLAGS);
	__uint(max_entries, WALKS_KEPT);
	__type(key, __u32);
	__type(value, struct walk);
} walk_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, CLEAR_FLAGS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct read);
} read_state SEC(".maps");

struct out {
	__u8 bytes[OUT_SIZE + TAKE_MAX + RECORD_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, CLEAR_FLAGS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct out);
} out SEC(".maps");

struct heads {
	__u64 address[HEADS_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, CLEAR_FLAGS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct heads);
} heads SEC(".maps");

/* Neither the programs nor, once it is frozen, anybody in user space can write it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_RDONLY_PROG);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct layout);
} layout SEC(".maps");

struct context {
	struct walk *walk;
	struct out *out;
	struct read *read;
	struct heads *heads;
};

/* ---- the walk -------------------------------------------------------------------------------------------------- */

static long carry_out(__u32 i, struct context *c)
{
	struct walk *w = c->walk;
	if (i >= OPS_MAX)
		return 1;
	struct op *op = &w->plan.op[i];
	__u64 base = w->registers[BOUND(op->src, REGISTERS - 1)];
	__u64 slot = BOUND(w->cursor, OUT_SIZE * 2 - 1) + BOUND(op->slot, RECORD_MAX - 1);
	if (slot > OUT_SIZE + RECORD_MAX)
		return 1;
	__u8 *to = c->out->bytes + slot;
	/* A copy from 0 fails like any other unreadable address, and zeroes its destination like any other. */
	void *from = (void *)(base ? base + op->offset : 0);
	long error;

	if (op->kind == OP_LOAD) {
		__u64 value = 0;
		error = bpf_probe_read_kernel(&value, sizeof(value), from);
		*(__u64 *)to = value;
		w->registers[BOUND(op->dst, REGISTERS - 1)] = value & ~(__u64)op->size;
	} else {
		__u64 size = BOUND(op->size, 2 * TAKE_MAX - 1);
		if (size == 0 || size > TAKE_MAX)
			return 1;
		if (op->kind == OP_TEXT) {
			bpf_probe_read_kernel(to, size, 0); /* zero it: a string copy leaves the bytes after its NUL */
			error = bpf_probe_read_kernel_str(to, size, from);
		} else {
			error = bpf_probe_read_kernel(to, size, from);
		}
	}
	if (error < 0)
		w->faults |= 1ULL << (i & 63);
	return 0;
}

static __always_inline void end_chain(struct walk *w)
{
	w->link = 0;
	w->index++;
}

static __always_inline void fault(struct walk *w, __u64 address)
{
	if (!w->faulted++)
		w->fault_at = address;
}

static __always_inline void cycle(struct walk *w, __u64 link)
{
	if (!w->cycles++)
		w->cycle_at = link;
	end_chain(w);
}

static __always_inline void begin_chain(struct walk *w, __u64 link)
{
	w->link = link;
	w->first = link;
	w->before = w->head;
	w->hare = 0;
	w->power = 1;
	w->tortoise = 0;
}

static __always_inline void end_record(struct context *c, __u64 node, __u64 faults, __u32 kind)
{
	struct walk *w = c->walk;
	struct record *record = (void *)(c->out->bytes + BOUND(w->cursor, OUT_SIZE - 1));

	record->node = node;
	record->faults = faults;
	record->head = w->index;
	record->kind = kind;
	w->cursor += w->plan.record;
}

/* Write the record of a head that holds no node. */
static __always_inline void collect_head(struct context *c, __u64 value, __u32 kind)
{
	struct walk *w = c->walk;
	__u64 size = BOUND(w->plan.record, 2 * RECORD_MAX - 1);

	if (size > RECORD_MAX)
		return;
	bpf_probe_read_kernel(c->out->bytes + BOUND(w->cursor, OUT_SIZE - 1), size, 0); /* zeroes it */
	end_record(c, value, ~0ULL, kind);
}

/* Write the record of the current node. */
static __always_inline void collect(struct context *c)
{
	struct walk *w = c->walk;

	w->faults = 0;
	w->registers[0] = w->node;
	bpf_loop(w->plan.ops, carry_out, c, 0);
	end_record(c, w->node, w->faults, RECORD_NODE);
	w->nodes++;
}

static __always_inline int is_empty(struct walk *w, __u64 value, __u64 index)
{
	return w->plan.step == STEP_NULLS ? value == (((w->plan.nulls + index) << 1) | 1) : value == 0;
}

/* Find the next head that has nodes. */
static __always_inline void take_head(struct context *c)
{
	struct walk *w = c->walk;
	__u64 index = w->index, value = 0;
	__u32 step = w->plan.step;

	if (w->plan.stride) {
		w->head = w->plan.start + index * w->plan.stride;
	} else {
		if (index >= HEADS_MAX) {
			w->index++;
			return;
		}
		w->head = c->heads->address[BOUND(index, HEADS_MAX - 1)];
	}
	if (step == STEP_SELF || step == STEP_RING_NODE) {
		begin_chain(w, w->head);
		if (!w->head)
			w->index++;
		return;
	}
	/* Most buckets of a hash table are empty: look at eight at a time. */
	if (step != STEP_RING && w->plan.stride == 8 && index + 8 <= w->plan.heads &&
	    !bpf_probe_read_kernel(w->block, sizeof(w->block), (void *)w->head)) {
		int i;
#pragma unroll
		for (i = 0; i < 8; i++) {
			if (!is_empty(w, w->block[i], index + i)) {
				value = w->block[i];
				break;
			}
		}
		w->index = index + i;
		w->head += i * 8;
		if (i == 8)
			return;
	} else {
		int size = step == STEP_RING ? 16 : 8;
		if (bpf_probe_read_kernel(w->head_link, size, (void *)w->head)) {
			fault(w, w->head);
			collect_head(c, w->head, RECORD_FAULT);
			w->index++;
			return;
		}
		value = step == STEP_RING && w->plan.next ? w->head_link[1] : w->head_link[0];
		if (step == STEP_RING ? value == w->head : is_empty(w, value, index)) {
			w->index++;
			return;
		}
	}
	begin_chain(w, value + w->plan.bias);
	/* Empty, but with another end marker than the head's number implies; or never initialised. */
	if (!value || !w->link || (step == STEP_NULLS && (value & 1))) {
		if (step == STEP_RING || (value && !w->link))
			fault(w, w->link);
		collect_head(c, value, RECORD_HEAD);
		end_chain(w);
	}
}

static __always_inline void visit(struct context *c)
{
	struct walk *w = c->walk;
	__u32 step = w->plan.step;
	__u64 link = w->link, next;

	w->node = link - w->plan.link;
	if (step == STEP_SELF || step == STEP_ONCE) {
		collect(c);
		end_chain(w);
		return;
	}
	int size = step == STEP_RING || step == STEP_RING_NODE ? 16 : 8;
	if (bpf_probe_read_kernel(w->pair, size, (void *)link)) {
		fault(w, link);
		end_chain(w);
		return;
	}
	next = size == 16 && w->plan.next ? w->pair[1] : w->pair[0];
	if (size == 16) {
		__u64 came_from = w->plan.next ? w->pair[0] : w->pair[1];
		if (link == w->head) {
			w->head_link[0] = w->pair[0];
			w->head_link[1] = w->pair[1];
		} else if (came_from != w->before) {
			w->torn++;
		}
	}
	collect(c);
	w->before = link;

	if (link == w->tortoise) {
		cycle(w, link);
		return;
	}
	if (++w->hare == w->power) {
		w->tortoise = link;
		w->power <<= 1;
		w->hare = 0;
	}
	if (size == 16) {
		if (next == w->head) {
			end_chain(w);
			return;
		}
	} else if (step == STEP_NULLS && (next & 1)) {
		if (next != (((w->plan.nulls + w->index) << 1) | 1))
			w->torn++; /* the node moved to another chain while we were on it */
		end_chain(w);
		return;
	}
	if (!next) {
		if (size == 16)
			fault(w, 0);
		end_chain(w);
		return;
	}
	next += w->plan.bias;
	if (next == w->first) {
		if (link == w->head || w->first == w->head) /* a ring whose head is one of its nodes */
			end_chain(w);
		else
			cycle(w, next);
		return;
	}
	if (!next) {
		fault(w, 0);
		end_chain(w);
		return;
	}
	w->link = next;
}

static long take_step(__u32 i, struct context *c)
{
	struct walk *w = c->walk;

	if (w->cursor + w->plan.record > OUT_SIZE)
		return 1;
	if (w->link && w->nodes >= w->plan.max_nodes) {
		w->state = WALK_TRUNCATED;
		return 1;
	}
	if (!w->link) {
		if (w->index >= w->plan.heads) {
			w->state = WALK_DONE;
			return 1;
		}
		take_head(c);
		return 0;
	}
	visit(c);
	return 0;
}

/* Continue the walk until the chunk is full or the walk is over. */
static __always_inline void walk_on(struct context *c)
{
	c->walk->cursor = 0;
	c->walk->state = WALK_MORE;
	bpf_loop(STEPS_MAX, take_step, c, 0);
}

/* ---- the read -------------------------------------------------------------------------------------------------- */

#define PRESENT 1ULL
#define LARGE (1ULL << 7)
#define ADDRESS 0x000ffffffffff000ULL

/* One level of the page tables: Intel SDM vol. 3, 4.5. */
static long descend(__u32 i, struct context *c)
{
	struct read *r = c->read;
	__u64 level = r->levels - 1 - i; /* 4: PML5 ... 0: PT */
	if (level > 4 || i > 4)
		return 1;
	__u64 shift = 12 + 9 * level, entry = 0;
	__u64 table = r->page_offset + r->physical;
	__u64 virtual = r->address + r->done;

	if (bpf_probe_read_kernel(&entry, sizeof(entry), (void *)(table + ((virtual >> shift) & 511) * 8)))
		return 1;
	r->entry[i] = entry;
	if (!(entry & PRESENT))
		return 1;
	if (level == 0 || (level <= 2 && (entry & LARGE))) {
		__u64 size = 1ULL << shift;
		r->page_size = size;
		r->physical = (entry & ADDRESS & ~r->encrypted & ~(size - 1)) | (virtual & (size - 1));
		return 1;
	}
	r->physical = entry & ADDRESS & ~r->encrypted;
	return 0;
}

static __always_inline int translate(struct context *c)
{
	struct read *r = c->read;
	r->physical = r->dtb & ADDRESS & ~r->encrypted;
	r->page_size = 0;
	bpf_loop(5, descend, c, 0);
	return r->page_size ? 0 : -1;
}

static long read_page(__u32 i, struct context *c)
{
	struct read *r = c->read;
	__u64 done = r->done, left = r->count - done;
	__u64 address = r->address + done;
	__u64 size = 4096 - (address & 4095);

	if (done >= r->count || done >= OUT_SIZE)
		return 1;
	if (r->dtb) {
		if (translate(c))
			return 1;
		address = r->page_offset + r->physical;
	}
	if (size > left)
		size = left;
	if (size == 0 || size > 4096)
		return 1;
	if (bpf_probe_read_kernel(c->out->bytes + BOUND(done, OUT_SIZE - 1), BOUND(size, 2 * TAKE_MAX - 1), (void *)address))
		return 1;
	r->done = done + size;
	return 0;
}

/* Copy read_state.count bytes to out, page by page, up to the first unreadable page. */
static __always_inline void read_pages(struct context *c)
{
	c->read->done = 0;
	bpf_loop(OUT_SIZE / 4096 + 1, read_page, c, 0);
}

/* Translate read_state.address through its page tables. */
static __always_inline void look_up(struct context *c)
{
	c->read->done = 0;
	__builtin_memset(c->read->entry, 0, sizeof(c->read->entry));
	translate(c);
}

/* ---- programs -------------------------------------------------------------------------------------------------- */

static __always_inline int find(struct context *c, __u32 slot)
{
	__u32 zero = 0;
	struct layout *l = bpf_map_lookup_elem(&layout, &zero);

	c->walk = bpf_map_lookup_elem(&walk_state, &slot);
	c->read = bpf_map_lookup_elem(&read_state, &zero);
	c->out = bpf_map_lookup_elem(&out, &zero);
	c->heads = bpf_map_lookup_elem(&heads, &zero);
	if (!l || !c->walk || !c->read || !c->out || !c->heads)
		return 0;
	c->read->page_offset = l->page_offset;
	c->read->levels = l->levels;
	c->read->encrypted = l->encrypted;
	return 1;
}

#ifndef SEALED
SEC("syscall")
int walk(void *unused)
{
	struct context c;

	if (!find(&c, 0))
		return 1;
	walk_on(&c);
	return 0;
}

SEC("syscall")
int read(void *unused)
{
	struct context c;

	if (!find(&c, 0))
		return 1;
	read_pages(&c);
	return 0;
}

SEC("syscall")
int lookup(void *unused)
{
	struct context c;

	if (!find(&c, 0))
		return 1;
	look_up(&c);
	return 0;
}
#endif
