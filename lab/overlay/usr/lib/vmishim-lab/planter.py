"""Start processes inside the container and leave them to its init.

Run in the container: ``planter.py COUNT COMM ARGV...``. COMM is the name the
kernel shows (empty: that of the program). The planter says ``planted`` when
every program has been executed, and ends when its standard input does; until
then the planted are its children, which is how ``plant.py`` counts them.
"""

import os
import shutil
import sys
import tempfile

count, comm, *argv = sys.argv[1:]
program = shutil.which(argv[0])
if program is None:
    sys.exit(f"{argv[0]}: not found in the container")
if comm:
    # The kernel names a process after the path it executed, link or not.
    link = os.path.join(tempfile.mkdtemp(prefix="plant-"), comm)
    os.symlink(os.path.realpath(program), link)
    program = link
os.setsid()
null = [
    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    (os.POSIX_SPAWN_DUP2, 1, 2),
]
for _ in range(int(count)):
    # Returns when the program has been executed: its name shows by then.
    os.posix_spawn(program, argv, os.environ, file_actions=null)
print("planted", flush=True)
sys.stdin.read()
