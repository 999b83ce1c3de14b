"""Programs that would run too long are refused: loaded into this kernel, checked, and never run.

A nested ``bpf_loop`` that ran would lock up the machine that tests it.
"""

from __future__ import annotations

import re

import pytest

from guest_agent.loader import InjectionError, load
from guest_agent.programs import LoadError
from tests.unit.test_inject import EXAMPLE
from vmishim.inject import compile_core

HEAD = """
#include "inject.h"
struct state { __u64 sum; };
BODY(inner, struct state, s) { s->sum ^= index; return 0; }
BODY(outer, struct state, s) { LOOP(INNER, inner, s); return 0; }
static __attribute__((noinline)) long step(struct state *s) { LOOP(INNER, inner, s); return 0; }
BODY(through, struct state, s) { return step(s); }
BODY(copies, struct state, s)
{
    __u32 zero = 0;
    char *to = bpf_map_lookup_elem(&large, &zero);
    return to ? bpf_probe_read_kernel(to, 1 << 20, (void *)(s->sum + index)) > 1 : 1;
}
static long visit(void *map, const void *key, void *value, struct state *s) { s->sum ^= 1; return 0; }
BODY(elements, struct state, s) { bpf_for_each_map_elem(&many, visit, s, 0); return 0; }
static long element_loops(void *map, const void *key, void *value, struct state *s) { LOOP(INNER, inner, s); return 0; }
SEC("syscall") int run(void *unused)
{
    struct state one = { 0 };
    struct state *s = &one;
    __u32 zero = 0;
    struct state *given = INPUT(struct state);
    if (!given)
        return 1;
    BODY_OF_RUN
    return s->sum == 1;
}
"""
MAPS = """
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32);
     __uint(value_size, 1 << 20); } large SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 100000); __type(key, __u32);
     __type(value, __u64); } many SEC(".maps");
"""

REFUSED = {
    "a loop in a loop": ("LOOP(1 << 23, outer, s);", 1 << 23, "bpf_loop of up to 8,388,608 rounds"),
    "a loop in a function that a loop calls": ("LOOP(1 << 23, through, s);", 1 << 23, "bpf_loop of up to 8,388,608"),
    "a count that the input gives": ("LOOP(given->sum, outer, s);", 1000, "bpf_loop of up to 8,388,608 rounds"),
    "elements in a loop": ("LOOP(1 << 20, elements, s);", 1, "bpf_loop of up to 1,048,576 rounds"),
    "a loop for each element": (
        "bpf_for_each_map_elem(&many, element_loops, s, 0);",
        1 << 20,
        "bpf_for_each_map_elem of up to 100,000 rounds",
    ),
    "a loop in a plain loop": (
        'for (int i = 0; i < 50; i++) { asm volatile("" : "+r"(i)); step(s); }',
        1 << 23,
        "is in a plain loop",
    ),
    "long copies": ("LOOP(1 << 20, copies, s);", 1, "bpf_loop of up to 1,048,576 rounds of up to 131"),
    "many loops one after another": ("LOOP(1 << 23, inner, s);" * 30, 1, "bpf_loop of up to 8,388,608 rounds"),
}


def source(run: str, inner: int) -> str:
    """A program around these statements."""
    text = HEAD.replace("INNER", str(inner)).replace("BODY_OF_RUN", run)
    return text.replace("struct state {", MAPS + "struct state {", 1)


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_run_too_long_is_refused(what: str) -> None:
    run, inner, told = REFUSED[what]
    data = compile_core(source(run, inner))
    with pytest.raises((InjectionError, LoadError), match=re.escape(told)) as refused:
        load(data, 2)
    assert isinstance(refused.value, InjectionError)
    assert refused.value.code == "too-long"
    assert "nothing can interrupt it" in str(refused.value)


@pytest.mark.parametrize(
    ("run", "inner"),
    [
        ("LOOP(1 << 23, inner, s);", 1),
        ("LOOP(1000, outer, s);", 1000),
        ("LOOP(given->sum, inner, s);", 1),
        ("bpf_for_each_map_elem(&many, visit, s, 0);", 1),
        ("LOOP(1000, copies, s);", 1),
        ('for (int i = 0; i < 50; i++) { asm volatile("" : "+r"(i)); s->sum += i; }', 1),
    ],
)
def test_what_ends_within_seconds_is_accepted(run: str, inner: int) -> None:
    load(compile_core(source(run, inner)), 2).close()


def test_the_example_is_accepted_up_to_the_rounds_that_the_page_names() -> None:
    load(compile_core(EXAMPLE), 2).close()
    load(compile_core(EXAMPLE.replace("LOOP(256,", "LOOP(1000000,")), 2).close()
