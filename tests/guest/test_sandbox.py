"""What a running agent may still do: nothing but answer, by the kernel's own word and by trying."""

from __future__ import annotations

from ci.vm.agent import InstalledAgent
from ci.vm.lab import LabVM


def statuses(lab: LabVM) -> dict[str, dict[str, str]]:
    """``/proc/PID/task/TID/status`` of the agent's threads, by their names."""
    script = "cat /proc/$(systemctl show -P MainPID vmishim-agent)/task/*/status"
    found: dict[str, dict[str, str]] = {}
    for text in lab.run("sh", "-c", script).stdout.decode().split("Name:\t")[1:]:
        name, _, rest = text.partition("\n")
        found[name] = {key: value.strip() for key, _, value in (line.partition(":") for line in rest.splitlines())}
    return found


def test_every_thread_has_given_up_what_it_had(lab: LabVM, agent: InstalledAgent) -> None:
    threads = statuses(lab)
    assert threads.keys() == {"python3", "ZMQbg/Reaper", "ZMQbg/IO/0"}
    owner = lab.run("stat", "-c", "%u", "/run/vmishim-agent").stdout.decode().strip()
    assert owner != "0"
    for status in threads.values():
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
        assert status["Uid"].split() == status["Gid"].split() == [owner] * 4
        assert status["Groups"] == ""
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
