# This file is about results of Volatility. It is also licensed under the Volatility Software License 1.0,
# https://www.volatilityfoundation.org/license/vsl-v1.0
"""How results of Volatility's plugins are judged (bench/volatility.py)."""

from __future__ import annotations

from typing import Any

from bench.volatility import Result, compared, finds, page, short

HOOK = 0xFFFF_FFFF_C02F_2000


def result(*rows: dict[str, Any]) -> Result:
    return Result(0, list(rows), "", 1.0, 1)


def test_a_row_must_have_all_that_was_planted() -> None:
    rows = [{"Index": 136, "Address": 5}, {"Index": 7, "Address": HOOK & (1 << 48) - 1}]
    assert not finds(rows, (HOOK, 136))
    assert finds([*rows, {"Index": 136, "Address": HOOK & (1 << 48) - 1}], (HOOK, 136))


def test_a_yes_is_not_a_number() -> None:
    assert not finds([{"PID": 7, "Spoofed": True}], (1,))
    assert finds([{"PID": 7, "Spoofed": True}], (7, ("Spoofed", True)))
    assert not finds([{"PID": 7, "Spoofed": False}], (7, ("Spoofed", True)))


def test_rows_below_others_count() -> None:
    assert finds([{"PID": 1, "__children": [{"PID": 7}]}], (7,))


def test_rows_of_both_copies_must_be_there_and_no_others() -> None:
    old, kept, new = ({"PID": number} for number in (1, 2, 3))
    assert compared(result(old, kept), result(kept, old), result(kept, new)) == ""
    assert compared(result(old, kept), result(old), result(kept, new)) == "1 rows missing, 0 more"
    assert compared(result(kept), result(kept, new), result(kept)) == "0 rows missing, 1 more"
    failed = Result(1, None, "TypeError", 1.0, 1)
    assert compared(failed, failed, failed) == ""
    assert compared(result(kept), failed, result(kept)) == "only one of the two fails"


def test_the_table_says_what_is_unproven_and_what_fails() -> None:
    assert (short("linux.pslist.PsList"), short("linux.ip.Addr")) == ("linux.pslist", "linux.ip.Addr")
    base: dict[str, Any] = {
        "kernel": "6.1",
        "rows": 1,
        "requests": 1234,
        "seconds": 1.0,
        "error": "",
        "differs": "",
        "found": None,
    }
    results = [
        {**base, "plugin": "linux.pslist.PsList"},
        {**base, "plugin": "linux.bash.Bash", "found": True},
        {**base, "plugin": "linux.malware.malfind.Malfind", "found": False},
        {**base, "plugin": "linux.elfs.Elfs", "rows": None, "error": "TypeError: no"},
        {**base, "plugin": "linux.iomem.IOMem", "differs": None},
    ]
    pslist, bash, malfind, elfs, iomem = page({"kernels": ["6.1"], "results": results}).splitlines()[2:]
    assert pslist == "| `linux.pslist.PsList` | works, 1, 1,234, 1.0 |  |  |"
    assert "found" in bash
    assert "**unproven**" not in bash
    assert "**unproven**" in malfind
    assert "fails, , 1,234, 1.0" in elfs
    assert "6.1: TypeError: no" in elfs
    assert "works, not compared" in iomem
