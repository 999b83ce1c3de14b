/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* The API for programs that are injected into an agent; see docs/injection.md.
 *
 * The same source compiles to two formats. clang makes a CO-RE object, which finds members by name in the running
 * kernel's BTF. bcc (which defines BY_HEADERS) compiles against the headers of one kernel, for kernels without BTF;
 * there the verifier unrolls loops, since bcc has no callbacks.
 *
 * If you use a vmlinux.h, include it before this file. */
#ifndef VMISHIM_INJECT_H
#define VMISHIM_INJECT_H

#define INPUT_MAX (1 << 16)      /* bytes of input to one run */
#define OUTPUT_MAX (1 << 20)     /* bytes of output of one run, including this header and those of the extents */
#define EXTENT_MAX 4096          /* bytes of one extent */

#ifdef BY_HEADERS
#include <uapi/linux/bpf.h>
#else
#ifndef __VMLINUX_H__
#include <linux/types.h>
#include <linux/bpf.h>
#endif
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#endif

struct inject_input {
	__u64 size;
	__u8 bytes[INPUT_MAX];
};

/* Only the agent and this file write here. The agent sends the header, then `used` bytes. */
struct inject_output {
	__u64 used;
	__u64 faults;            /* failed reads by EMIT and READ_FIELD ... */
	__u64 fault_at;          /* ... the first of them here */
	__u64 truncated;         /* 1: the output was full, 2: a loop reached its bound */
	__u8 bytes[OUTPUT_MAX + EXTENT_MAX + 64];
};

/* Precedes each extent's bytes, which are padded to a multiple of 8. */
struct inject_extent {
	__u64 address;
	__u32 length;            /* 0: it could not be read */
	__u32 wanted;
};

/* ---- the two formats --------------------------------------------------------------------------------------------- */

#ifdef BY_HEADERS

/* bcc creates a program's maps when it compiles. These are created in the guest instead, so the program holds numbers,
 * which become descriptors there (vmishim/inject/bcc.py, guest_agent/bytecode.py). */
#define inject_find(map, key) ((void *)bpf_map_lookup_elem_(bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, inject_##map##_number), key))
enum { inject_input_number = 0x7601, inject_output_number = 0x7602 };

#undef SEC
#define SEC(name)
#define KERNEL_TYPES
#define KERNEL_TYPES_END
#define FIELD_OFFSET(type, field) offsetof(type, field)
#define FIELD_SIZE(pointer, field) sizeof((pointer)->field)
#define FIELD_EXISTS(pointer, field) 1
#define inject_read(to, size, from) bpf_probe_read_kernel(to, size, from)
#define BODY(name, type, state) static __always_inline long name(__u32 index, type *state)
#define LOOP(count, body, state)                                  \
	({                                                        \
		__u32 _i, _end = 0;                               \
		for (_i = 0; !_end && _i < (count); _i++)         \
			_end = body(_i, state);                   \
		if (!_end)                                        \
			inject_truncated(2);                      \
	})

#else

#define inject_find(map, key) bpf_map_lookup_elem(&map, key)

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct inject_input);
} input SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct inject_output);
} output SEC(".maps");

/* Kernel structures between these two are found by name at load; declare only the members that you use. */
#define KERNEL_TYPES _Pragma("clang attribute push(__attribute__((preserve_access_index)), apply_to = record)")
#define KERNEL_TYPES_END _Pragma("clang attribute pop")
#define FIELD_OFFSET(type, field) \
	((unsigned long)__builtin_preserve_access_index(&((type *)0)->field))
#define FIELD_SIZE(pointer, field) bpf_core_field_size((pointer)->field)
#define FIELD_EXISTS(pointer, field) bpf_core_field_exists((pointer)->field)
#define inject_read(to, size, from) bpf_core_read(to, size, from)
/* bpf_loop's result does not distinguish a stop in the last round from a loop that reached its bound. */
#define BODY(name, type, state)                                           \
	struct name##_loop {                                              \
		type *given;                                              \
		long end;                                                 \
	};                                                                \
	static __always_inline long name##_body(__u32 index, type *state); \
	static long name##_round(__u32 index, struct name##_loop *loop)   \
	{                                                                 \
		return loop->end = name##_body(index, loop->given) != 0;  \
	}                                                                 \
	static __always_inline long name##_body(__u32 index, type *state)
#define LOOP(count, body, state)                                          \
	({                                                                \
		struct body##_loop _loop = { .given = state };            \
		bpf_loop(count, body##_round, &_loop, 0);                 \
		if (!_loop.end)                                           \
			inject_truncated(2);                              \
	})

#ifndef PROGRAM_LICENSE
#define PROGRAM_LICENSE "GPL"
#endif
char LICENSE[] SEC("license") = PROGRAM_LICENSE;

#endif

/* ---- for programs ---------------------------------------------------------------------------------------------- */

/* Bound an index for the verifier: an `and` that the compiler cannot move. */
#define BOUND(value, mask) ({ __u64 _v = (value); asm volatile("%0 &= %1" : "+r"(_v) : "i"(mask)); _v; })

/* The structure whose member `field` is at `pointer`. */
#define CONTAINER(pointer, type, field) ((type *)((char *)(pointer) - FIELD_OFFSET(type, field)))

/* The address of a member; reads nothing. */
#define FIELD_ADDRESS(pointer, type, field) ((void *)((char *)(pointer) + FIELD_OFFSET(type, field)))

/* The value of a member; if it cannot be read, 0, and `faults` goes up by one. */
#define READ_FIELD(pointer, field)                                                       \
	({                                                                         \
		/* Copied first, or CO-RE would look for what holds the pointer too. */ \
		typeof(pointer) _from = (pointer);                                 \
		typeof(_from->field) _value = 0;                                   \
		if (inject_read(&_value, sizeof(_value), &_from->field))           \
			inject_fault((__u64)_from);                                \
		_value;                                                            \
	})

/* Output `size` bytes (a constant, at most EXTENT_MAX) of kernel memory at `address`. */
#define EMIT(address, size) inject_emit((__u64)(address), size, 0)

/* The same, up to and including the first NUL. */
#define EMIT_TEXT(address, size) inject_emit((__u64)(address), size, 1)

/* Output a member of *pointer. */
#define EMIT_FIELD(pointer, field)                                                 \
	({                                                                         \
		typeof(pointer) _from = (pointer);                                 \
		EMIT(&_from->field, FIELD_SIZE(_from, field));                     \
	})

/* The run's input as a `type *`; NULL if it is shorter than the type. */
#define INPUT(type) ((type *)inject_given(sizeof(type)))

static __always_inline void *inject_given(__u64 size)
{
	__u32 zero = 0;
	struct inject_input *in = inject_find(input, &zero);

	return in && in->size >= size && size <= INPUT_MAX ? in->bytes : 0;
}

static __always_inline void inject_truncated(__u64 why)
{
	__u32 zero = 0;
	struct inject_output *out = inject_find(output, &zero);

	if (out && !out->truncated)
		out->truncated = why;
}

static __always_inline void inject_fault(__u64 address)
{
	__u32 zero = 0;
	struct inject_output *out = inject_find(output, &zero);

	if (out && !out->faults++)
		out->fault_at = address;
}

static __always_inline int inject_emit(__u64 address, __u64 size, int text)
{
	__u32 zero = 0;
	struct inject_output *out = inject_find(output, &zero);
	struct inject_extent *extent;
	__u64 at;
	long got;

	if (!out || !size || size > EXTENT_MAX)
		return 1;
	at = out->used;
	if (sizeof(*out) - sizeof(out->bytes) + at + sizeof(*extent) + size + 7 > OUTPUT_MAX) {
		out->truncated = 1;
		return 1;
	}
	at = BOUND(at, OUTPUT_MAX - 1);
	extent = (void *)(out->bytes + at);
	extent->address = address;
	extent->wanted = size;
	if (text)
		got = bpf_probe_read_kernel_str(extent + 1, size, (void *)address);
	else
		got = bpf_probe_read_kernel(extent + 1, size, (void *)address) ? -1 : (long)size;
	if (got < 0) {
		got = 0;
		if (!out->faults++)
			out->fault_at = address;
	}
	extent->length = got;
	out->used = at + sizeof(*extent) + ((got + 7) & ~7ULL);
	return got == 0;
}

#endif
