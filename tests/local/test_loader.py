"""The process that loads programs, given a built object."""

from __future__ import annotations

import os

import pytest

from guest_agent.loader import InjectionError, Loader
from vmishim.ebpf_objects import object_bytes


def test_a_program_name_that_is_no_text_does_not_end_it() -> None:
    renamed = object_bytes("memory").replace(b"\0walk\0", b"\0w\xfflk\0")
    load = Loader(1)
    try:
        with pytest.raises(InjectionError, match="a program 'w\ufffdlk'"):
            load(renamed)
        with pytest.raises(InjectionError, match="neither an eBPF object"):
            load(b"junk")
    finally:
        load.close()
        os.waitpid(load.pid, 0)
