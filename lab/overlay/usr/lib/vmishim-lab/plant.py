"""Plant processes in the container; print their pids as this side sees them.

Run in the root namespaces: ``plant.py COUNT COMM ARGV...``. Prints one line of
pids. They are read from the kernel's list of the planter's children, so they are
exact whatever else starts meanwhile.
"""

import pathlib
import subprocess
import sys
import tempfile

with tempfile.TemporaryDirectory() as folder:
    pid_file = pathlib.Path(folder, "pid")
    command = ["crun", "exec", f"--pid-file={pid_file}", "monitored", "/usr/bin/python3", "-IS"]
    planter = subprocess.Popen(
        [*command, "/usr/lib/vmishim-lab/planter.py", *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert planter.stdin is not None
    assert planter.stdout is not None
    planted = planter.stdout.readline() == b"planted\n"
    if planted:
        pid = pid_file.read_text().strip()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    planter.stdin.close()
    status = planter.wait()
if not planted or status != 0:
    sys.exit(f"plant: the planter failed with status {status}")
if len(children.split()) != int(sys.argv[1]):
    sys.exit("plant: some of the planted processes ended at once")
print(children)
