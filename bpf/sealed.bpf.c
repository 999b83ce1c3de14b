// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Reads and walks whose results leave the kernel encrypted, for Linux >= 6.10 (bpf_crypto_*: 3e1c6f35409f).
 *
 * Three programs answer one question, because the kernel lets only network programs encrypt, and those run with
 * softirqs off, which a walk must not do for so long: `admit` accepts the question if it is from an IDS, `gather`
 * carries it out, `seal` encrypts the result. User space cannot map the data that they share, and what user space can
 * write is copied once, before it is checked.
 *
 * AES-CBC under one key, its IV a CBC-MAC under another of challenge, counter and time, then AES-CMAC (RFC 4493) of the
 * question and the ciphertext under a third, which also authenticates an IDS's questions. The kfuncs offer ECB and CBC
 * only. For the security argument see docs/security.md.
 */
#define SEALED
#include "memory.bpf.c"
#include "kernel.h"

extern struct bpf_crypto_ctx *bpf_crypto_ctx_create(const struct bpf_crypto_params *params, __u32 params__sz,
						    int *err) __ksym;
extern void bpf_crypto_ctx_release(struct bpf_crypto_ctx *ctx) __ksym;
extern int bpf_crypto_encrypt(struct bpf_crypto_ctx *ctx, const struct bpf_dynptr *src, const struct bpf_dynptr *dst,
			      const struct bpf_dynptr *siv) __ksym;

/* ---- maps: the agent maps two for its question and one for the answer; the others stay in the kernel ------------- */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ask);
} ask SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct heads);
} asked_heads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sealed);
} sealed SEC(".maps");

/* A program takes the job only in the phase before its own, so a question is admitted, carried out and sealed once. */
enum phase {
	FREE,
	ADMITTED,
	GATHERED,
	TAKEN,
};

struct job {
	__u64 phase;
	__u64 counter;
	struct question question;
	struct plan plan;
	__u64 iv[2];
	struct report report;    /* directly after iv: one MAC call covers both */
	__u64 length;
	__u32 key;
	__u32 slot;
	__u64 tag[2], chain[2], last[2];
	__u64 nonce[4];
	struct bpf_crypto_params params;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct job);
} job SEC(".maps");

/* Receives the MAC's CBC output, as long as its longest input; the output itself is discarded. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct heads);
} scratch SEC(".maps");

struct begun {
	__u64 began;
	__u64 chunk;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, WALKS_MAX);
	__type(key, __u32);
	__type(value, struct begun);
} begun SEC(".maps");

struct key {
	struct bpf_crypto_ctx __kptr *cipher;
	struct bpf_crypto_ctx __kptr *iv;
	struct bpf_crypto_ctx __kptr *mac;
	__u64 subkey[2];         /* RFC 4493's K1; all input is whole blocks, so K2 is never used */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KEYS_MAX);
	__type(key, __u32);
	__type(value, struct key);
} keys SEC(".maps");

/* ---- set-up ---------------------------------------------------------------------------------------------------- */

static __always_inline int install(struct bpf_crypto_params *params, struct bpf_crypto_ctx **to, const __u64 *key)
{
	struct bpf_crypto_ctx *made;
	int error = 0;

	__builtin_memcpy(params->key, key, KEY_SIZE);
	made = bpf_crypto_ctx_create(params, sizeof(*params), &error);
	__builtin_memset(params->key, 0, KEY_SIZE);
	if (!made)
		return error ?: -1;
	made = bpf_kptr_xchg(to, made);
	if (made)
		bpf_crypto_ctx_release(made);
	return 0;
}

/* Runs at start only: the agent keeps no descriptor of this program. */
SEC("syscall")
int store_keys(struct kernel_keys *given)
{
	__u32 zero = 0, number = given->number;
	struct job *d = bpf_map_lookup_elem(&job, &zero);
	struct key *key = bpf_map_lookup_elem(&keys, &number);
	struct bpf_crypto_params *params;
	int error;

	if (!d || !key)
		return 1;
	params = &d->params;
	__builtin_memcpy(params->type, "skcipher", sizeof("skcipher"));
	__builtin_memcpy(params->algo, "cbc(aes)", sizeof("cbc(aes)"));
	params->key_len = KEY_SIZE;
	key->subkey[0] = given->subkey[0];
	key->subkey[1] = given->subkey[1];
	error = install(params, &key->cipher, given->cipher);
	if (!error)
		error = install(params, &key->iv, given->iv);
	if (!error)
		error = install(params, &key->mac, given->mac);
	__builtin_memset(given, 0, sizeof(*given));
	return error;
}

/* ---- the job --------------------------------------------------------------------------------------------------- */

static __always_inline struct job *take_job(__u64 after)
{
	__u32 zero = 0;
	struct job *d = bpf_map_lookup_elem(&job, &zero);

	return d && __sync_val_compare_and_swap(&d->phase, after, TAKEN) == after ? d : 0;
}

static __always_inline int is_walk(struct job *d)
{
	return d->question.kind == ASK_WALK || d->question.kind == ASK_MORE;
}

/* AES-CBC of whole blocks. `chain` holds the block before them, and then the last of them. */
static __always_inline int encrypt(struct bpf_crypto_ctx *key, void *from, void *to, __u32 size, __u64 *chain)
{
	struct bpf_dynptr src, dst, siv;

	bpf_dynptr_from_mem(from, size, 0, &src);
	bpf_dynptr_from_mem(to, size, 0, &dst);
	bpf_dynptr_from_mem(chain, BLOCK, 0, &siv);
	return bpf_crypto_encrypt(key, &src, &dst, &siv);
}

/* A CMAC covers the question first, and for a walk its plan and heads ... */
static __always_inline int begin_mac(struct job *d, struct bpf_crypto_ctx *mac)
{
	__u32 zero = 0;
	struct heads *listed = bpf_map_lookup_elem(&heads, &zero), *to = bpf_map_lookup_elem(&scratch, &zero);
	__u64 size = BOUND(d->question.heads + BLOCK - 1, (2 * sizeof(*listed) - 1) & ~(BLOCK - 1));

	d->chain[0] = d->chain[1] = 0;
	if (!listed || !to || size > sizeof(*listed))
		return -1;
	if (encrypt(mac, &d->question, to->address, sizeof(d->question), d->chain))
		return -1;
	if (!is_walk(d))
		return 0;
	if (encrypt(mac, &d->plan, to->address, sizeof(d->plan), d->chain))
		return -1;
	return size ? encrypt(mac, listed, to->address, size, d->chain) : 0;
}

/* ... and last a block that separates a question (zeros) from an answer (counter >= 1). Leaves the CMAC in `last`. */
static __always_inline int end_mac(struct job *d, struct key *key, struct bpf_crypto_ctx *mac, __u64 counter,
				   __u64 length)
{
	d->last[0] = counter ^ key->subkey[0];
	d->last[1] = length ^ key->subkey[1];
	return encrypt(mac, d->last, d->last, BLOCK, d->chain);
}

/* ---- admit ----------------------------------------------------------------------------------------------------- */

static __always_inline int admit_question(struct job *d)
{
	__u32 zero = 0, slot, number;
	struct ask *a = bpf_map_lookup_elem(&ask, &zero);
	struct heads *from = bpf_map_lookup_elem(&asked_heads, &zero), *listed = bpf_map_lookup_elem(&heads, &zero);
	struct bpf_crypto_ctx *mac;
	struct begun *b;
	struct walk *w;
	struct key *key;
	__u64 size;

	if (!a || !from || !listed)
		return -1;
	slot = d->slot = BOUND(a->slot, WALKS_MAX - 1);
	number = d->key = a->key;
	b = bpf_map_lookup_elem(&begun, &slot);
	w = bpf_map_lookup_elem(&walk_state, &slot);
	key = bpf_map_lookup_elem(&keys, &number);
	if (!b || !w || !key)
		return -1;
	mac = key->mac;
	if (!mac)
		return -1;
	bpf_probe_read_kernel(&d->question, sizeof(d->question), &a->question);
	bpf_probe_read_kernel(d->tag, sizeof(d->tag), a->tag);
	if (d->question.kind == ASK_WALK)
		bpf_probe_read_kernel(&d->plan, sizeof(d->plan), &a->plan);
	else
		d->plan = w->plan;
	size = BOUND(d->question.heads, 2 * sizeof(*listed) - 1);
	if (size != d->question.heads || size > sizeof(*listed))
		return -1;
	if (size)
		bpf_probe_read_kernel(listed, size, from);
	if (size & 8) /* pad to a whole block */
		listed->address[BOUND(size / 8, HEADS_MAX - 1)] = 0;
	if (d->question.kind == ASK_MORE && (d->question.began != b->began || d->question.chunk != b->chunk + 1))
		return -1;

	if (begin_mac(d, mac) || end_mac(d, key, mac, 0, 0))
		return -1;
	return (d->last[0] ^ d->tag[0]) | (d->last[1] ^ d->tag[1]) ? -1 : 0;
}

/* Accept the question in `ask` if an IDS asked it. One at a time: this drops a question that was not sealed. */
SEC("tc")
int admit(struct __sk_buff *unused)
{
	struct job *d = take_job(FREE);
	int result;

	if (!d)
		d = take_job(ADMITTED);
	if (!d)
		d = take_job(GATHERED);
	if (!d)
		return -1;
	result = admit_question(d);
	d->phase = result ? FREE : ADMITTED;
	return result;
}

/* ---- gather ---------------------------------------------------------------------------------------------------- */

static __always_inline int gather_read(struct job *d, struct context *c)
{
	struct question *q = &d->question;
	struct read *r = c->read;

	r->address = q->address;
	r->count = q->count;
	r->dtb = q->space > 1 ? q->space : 0;
	d->length = 0;
	if (q->kind == ASK_LOOKUP) {
		look_up(c);
		d->report.physical = r->physical;
		d->report.page_size = r->page_size;
		__builtin_memcpy(d->report.entry, r->entry, sizeof(r->entry));
		d->report.levels = r->levels;
		return 0;
	}
	if (q->space == 1) {
		r->address += r->page_offset;
		if (r->address < q->address || r->address + r->count < r->address)
			return 0; /* past the end of the direct map there is no memory */
	}
	read_pages(c);
	d->length = r->done;
	return 0;
}

static __always_inline int gather_walk(struct job *d, struct context *c)
{
	struct walk *w = c->walk;
	__u32 slot = d->slot;
	struct begun *b = bpf_map_lookup_elem(&begun, &slot);

	if (!b)
		return -1;
	if (d->question.kind == ASK_WALK) {
		bpf_probe_read_kernel(w, sizeof(*w), 0); /* zeroes it */
		w->plan = d->plan;
		b->began = 0;
	}
	b->chunk = d->question.chunk;
	walk_on(c);
	d->report.faulted = w->faulted;
	d->report.fault_at = w->fault_at;
	d->report.cycles = w->cycles;
	d->report.cycle_at = w->cycle_at;
	d->report.torn = w->torn;
	d->report.head[0] = w->head_link[0];
	d->report.head[1] = w->head_link[1];
	d->report.state = w->state;
	d->length = w->cursor;
	return w->state;
}

/* Carry out what was admitted. Returns a walk's state, or -1. */
SEC("syscall")
int gather(void *unused)
{
	struct job *d = take_job(ADMITTED);
	struct context c;
	int result = -1;

	if (!d)
		return -1;
	bpf_probe_read_kernel(&d->report, sizeof(d->report), 0); /* zeroes it */
	if (find(&c, d->slot))
		result = is_walk(d) ? gather_walk(d, &c) : gather_read(d, &c);
	d->phase = result < 0 ? FREE : GATHERED;
	return result;
}

/* ---- seal ------------------------------------------------------------------------------------------------------ */

static __always_inline int seal_job(struct job *d, struct sealed *s)
{
	__u32 zero = 0, number = d->key;
	struct key *key = bpf_map_lookup_elem(&keys, &number);
	struct out *o = bpf_map_lookup_elem(&out, &zero);
	struct heads *to = bpf_map_lookup_elem(&scratch, &zero);
	__u64 length = BOUND(d->length, 2 * OUT_SIZE - 1), padded;
	struct bpf_crypto_ctx *cipher, *iv, *mac;

	if (!key || !o || !to || length > OUT_SIZE)
		return -1;
	cipher = key->cipher;
	iv = key->iv;
	mac = key->mac;
	if (!cipher || !iv || !mac)
		return -1;

	d->counter++;
	/* A host that rolls memory back also rolls back the counter, but not what an IDS asks next, nor the time. */
	d->nonce[0] = d->question.challenge[0];
	d->nonce[1] = d->question.challenge[1];
	d->nonce[2] = d->counter;
	d->nonce[3] = bpf_ktime_get_ns();
	d->chain[0] = d->chain[1] = 0;
	if (encrypt(iv, d->nonce, d->nonce, sizeof(d->nonce), d->chain))
		return -1;
	d->iv[0] = d->chain[0] = d->nonce[2];
	d->iv[1] = d->chain[1] = d->nonce[3];
	if (encrypt(cipher, &d->report, &d->report, sizeof(d->report), d->chain))
		return -1;
	bpf_probe_read_kernel(o->bytes + length, BLOCK, 0); /* zeroes it */
	padded = BOUND(length + BLOCK - 1, (2 * OUT_SIZE - 1) & ~(BLOCK - 1));
	if (padded > OUT_SIZE)
		return -1;
	if (padded && encrypt(cipher, o->bytes, o->bytes, padded, d->chain))
		return -1;

	if (begin_mac(d, mac))
		return -1;
	if (encrypt(mac, d->iv, to->address, sizeof(d->iv) + sizeof(d->report), d->chain))
		return -1;
	if (padded && encrypt(mac, o->bytes, to->address, padded, d->chain))
		return -1;
	if (end_mac(d, key, mac, d->counter, length))
		return -1;

	if (d->question.kind == ASK_WALK) {
		__u32 slot = d->slot;
		struct begun *b = bpf_map_lookup_elem(&begun, &slot);

		if (b)
			b->began = d->counter;
	}
	s->counter = d->counter;
	s->length = length;
	s->tag[0] = d->last[0];
	s->tag[1] = d->last[1];
	s->iv[0] = d->iv[0];
	s->iv[1] = d->iv[1];
	s->report = d->report;
	bpf_probe_read_kernel(s->bytes, padded, o->bytes);
	return 0;
}

/* Encrypt what was gathered into `sealed`. Returns 0, or -1. */
SEC("tc")
int seal(struct __sk_buff *unused)
{
	__u32 zero = 0;
	struct sealed *s = bpf_map_lookup_elem(&sealed, &zero);
	struct job *d = take_job(GATHERED);
	int result;

	if (!d)
		return -1;
	result = s ? seal_job(d, s) : -1;
	d->phase = FREE;
	return result;
}
