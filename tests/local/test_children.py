"""A script under ``vmishim run --local``: its child processes read the same guest, however Python starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VMISHIM = str(Path(sys.executable).with_name("vmishim"))
SCRIPT = """
import multiprocessing, subprocess, sys
from libvmi import Libvmi

def look(name):
    with Libvmi(name) as vmi:
        return vmi.read_str_va(vmi.translate_ksym2v("init_task") + vmi.get_offset("linux_name"), 0)

if __name__ == "__main__":
    if sys.argv[1] == "subprocess":
        subprocess.run([sys.executable, __file__, "alone"], check=True)
    elif sys.argv[1] == "alone":
        print(look("any"))
    else:
        with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
            print(*sorted(pool.map(look, ["any", "other"])))
"""


@pytest.mark.parametrize(
    ("method", "said"),
    [*((method, "swapper/0 swapper/0\n") for method in ("fork", "spawn", "forkserver")), ("subprocess", "swapper/0\n")],
)
def test_a_child_reads_this_machine(method: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [VMISHIM, "run", "--local", str(script), method]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
