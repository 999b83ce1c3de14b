"""``vmishim watch`` over the restart of a guest's agent."""

from __future__ import annotations

from pathlib import Path

from lab.agent import InstalledAgent
from lab.vm import LabVM
from tests.local.test_watch import watching
from vmishim.wire.keys import save_private


def test_it_outlives_the_restart_of_a_guests_agent(lab: LabVM, agent: InstalledAgent, tmp_path: Path) -> None:
    save_private(tmp_path / "key", agent.private)
    entry = f'agent = "{agent.endpoint}"\nagent_key = "{agent.public.text}"\nkey = "{tmp_path}/key"\ntimeout = 30.0\n'
    (tmp_path / "domains.toml").write_text(f"[lab]\n{entry}")
    with watching("lab", environment={"VMISHIM_CONFIG": str(tmp_path / "domains.toml")}) as seen:
        seen.until("watching lab, Linux ")
        lab.run("systemctl", "restart", "vmishim-agent")
        seen.until(" ! agent ")
        planted = lab.spawn("sleep", "infinity", comm="planted")
        try:
            (pid,) = planted
            seen.until(f" + process {pid} ")  # it may be seen before it has its name
            # A module that comes and goes.
            name = (
                lab.run("sh", "-c", "modprobe -r loop 2>/dev/null; modprobe loop && echo loop").stdout.decode().strip()
            )
            seen.until(f" + module {name}")
            lab.run("modprobe", "-r", name)
            seen.until(f" - module {name}")
        finally:
            lab.kill(planted)
        seen.until(f" - process {pid} planted")
