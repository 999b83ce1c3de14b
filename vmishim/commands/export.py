"""``vmishim config`` and ``vmishim bundle``: write files for use outside vmishim."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from vmishim import files
from vmishim.commands import CommandError
from vmishim.commands.guests import target

WATCH_FILES = ("vmishim-watch.service", "vmishim-watch-grafana.json")
"""Files of `vmishim.watching` that operators install."""


def config(options: argparse.Namespace) -> int:
    """Print a ``libvmi.conf`` entry.

    :raises CommandError: LibVMI's grammar cannot express the name, or the kernel does not tell an offset it needs
    """
    from vmishim.libvmi.config import export_entry

    with target(options.domain) as reached:
        try:
            sys.stdout.write(export_entry(reached.profile, options.domain))
        except (ValueError, KeyError) as error:
            raise CommandError(str(error.args[0])) from None
    return 0


def bundle(options: argparse.Namespace) -> int:
    """Write the agent's file, and its systemd unit beside it.

    :raises LibvmiError: this installation has no eBPF objects
    """
    from vmishim import bundle as agent

    if options.watch:
        return _watch_files(options.watch)
    if options.output.is_dir():
        raise CommandError(f"{options.output} is a folder; name the file to write")
    made = agent.bundle(options.output)
    unit = made.with_name(agent.UNIT)
    files.write(unit, agent.unit())
    print(f"wrote {made} ({made.stat().st_size / 1024:.0f} KiB) and {unit}")
    print(_steps(made, unit), end="")
    return 0


def _watch_files(folder: Path) -> int:
    for name in WATCH_FILES:
        target = folder / name
        files.write(target, resources.files("vmishim.watching").joinpath(name).read_bytes())
        print(f"wrote {target}")
    return 0


def _steps(made: Path, unit: Path) -> str:
    from vmishim.commands.enrolment import default_key
    from vmishim.errors import LinkError
    from vmishim.wire.keys import load_private

    try:
        ours = load_private(default_key()).public.text
    except LinkError:
        ours = "<the line that `vmishim keygen` prints here>"
    return f"""\

In the guest (Debian 12 or newer, Linux >= 5.17 with BTF), outside what is monitored, as root:

  apt install python3-zmq python3-cryptography libbpf1 libseccomp2
  install -D -m 755 {made.name} /usr/lib/vmishim/agent.pyz
  install -D -m 644 {unit.name} /etc/systemd/system/{unit.name}
  install -d -m 755 /etc/vmishim
  python3 /usr/lib/vmishim/agent.pyz keygen /etc/vmishim/agent.key     # prints the agent's public key
  echo '{ours}' >>/etc/vmishim/permitted
  systemctl enable --now vmishim-agent

Then here:

  vmishim enroll NAME tcp://GUEST:5555 "<the agent's public key>"
"""
