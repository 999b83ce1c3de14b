"""``vmishim``: the command line. Here is what may be said; what is done about it is in `vmishim.commands`.

Only the called command is imported, and only when it is called: ``vmishim --version`` takes as long as Python does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from typing import NoReturn

from vmishim.version import __version__

EXAMPLES = """\
examples:
  sudo vmishim ps --local                   the processes of this machine, read by eBPF
  vmishim keygen                            make your key; its public half goes into the guest
  vmishim enroll web-1 tcp://10.0.0.5:5555 "vmishim-public-v1 ..."
  vmishim ps web-1 --tree                   the processes of a guest
  vmishim lsmod web-1 --json | jq .         its modules, for programs
  vmishim ss web-1                          its TCP sockets, and whose they are
  vmishim ps --domains 'web-*'              the processes of many guests at once
  vmishim run process_list.py web-1         run an unchanged LibVMI script on it
  vmishim compare process_list.py web-1     the same on all its backends: are the answers the same, what do they cost
  vmishim doctor web-1                      what works, what does not, what to do

A DOMAIN is a guest that was enrolled (vmishim domains lists them). Exit status: 0 all well, 1 something was wrong with
the guest or the machine, 2 something was wrong with the command line.
"""

PS = """\
vmishim ps web-1 --tree
vmishim ps web-1 --json | jq '.[].comm'
vmishim ps --domains 'web-*' --deadline 10
sudo vmishim ps --local
"""
LSMOD = """\
vmishim lsmod web-1
vmishim lsmod --domains 'web-*' --json
sudo vmishim lsmod --local
"""
SS = """\
vmishim ss web-1
vmishim ss --domains '*' --engine dask://10.0.0.9:8786
sudo vmishim ss --local --stats
"""

FLEET = """\
With --domains: a table with a column for the guest, or with --json one object a line as guests answer. A guest that
can't be read is a line of its own, with "error", and does not hold the others up; the exit status is 1 then.
"""

Command = Callable[[argparse.Namespace], int]

# For shtab: which shell function completes a positional.
_DOMAINS = {"bash": "_vmishim_domains", "zsh": "_vmishim_domains", "fish": "(vmishim domains --names 2>/dev/null)"}
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": ""}


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = _Parser(
        prog="vmishim",
        description="Look into a confidential VM's kernel, through an eBPF agent in it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"vmishim {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, function: str, text: str, examples: str, notes: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{indent(examples.rstrip(), '  ')}" + (f"\n\n{notes}" if notes else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(function=function)
        return added

    ps = command("ps", "inspection:ps", "list the processes of a guest, or of many", PS, FLEET)
    _guests(ps)
    ps.add_argument("--tree", action="store_true", help="children below their parents")
    _listing(ps)

    lsmod = command("lsmod", "inspection:lsmod", "list the kernel modules of a guest, or of many", LSMOD, FLEET)
    _guests(lsmod)
    _listing(lsmod)

    ss = command("ss", "inspection:ss", "list the TCP sockets of a guest, or of many", SS, FLEET)
    _guests(ss)
    _listing(ss)

    watch = command(
        "watch",
        "watch:watch",
        "watch processes, modules and sockets come and go, and what is worth a second look",
        "vmishim watch web-1\n"
        "sudo vmishim watch --local --interval 0.5\n"
        "vmishim watch web-1 >>web-1.log               a line for each event, for as long as it runs",
        "q or Ctrl-C ends it. Not on a terminal it writes a line for each event.",
    )
    _guest(watch)
    watch.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (%(default)g)")

    run = command(
        "run",
        "script:run",
        "run an unchanged LibVMI script: its `import libvmi` is vmishim",
        "vmishim run process_list.py web-1              the script's own arguments stand behind it\n"
        "vmishim run --stats process_list.py web-1      say what it took, too\n"
        "vmishim run --strategy scalar --stats process_list.py web-1\n"
        "sudo vmishim run --local process_list.py any-name",
        "The script's arguments, output, traceback and exit status are its own. Our options stand before it.\n"
        "With --local every domain that the script names is this machine.",
    )
    run.add_argument("--local", action="store_true", help="read this machine, whatever domain the script names")
    _strategy(run)
    run.add_argument("script", metavar="SCRIPT", help="the script's file").complete = _FILES  # type: ignore[attr-defined]
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="its arguments")

    compare = command(
        "compare",
        "compare:compare",
        "run an unchanged LibVMI script on every backend of a guest; compare answers and costs",
        "vmishim compare process_list.py web-1\n"
        "vmishim compare --only agent-page,agent-batch --runs 20 -o page-or-batch process_list.py web-1\n"
        "sudo vmishim compare --local process_list.py any-name",
        "Backends: agent-scalar, agent-page, agent-batch; ramfile, if the guest's entry names one; native, the\n"
        "genuine LibVMI bindings on that file. One guest is meant, whatever the script calls it. Our options stand\n"
        "before the script. Exit status: 0 the answers agree, 1 they differ, 2 there was an error.\n"
        "docs/compare.md says more.",
    )
    compare.add_argument("--local", action="store_true", help="compare on this machine; needs root")
    compare.add_argument("--domain", metavar="DOMAIN", help="the guest, if the script's arguments do not name it")
    compare.add_argument(
        "--genuine",
        metavar="PYTHON",
        help="an interpreter that can import LibVMI's genuine bindings (default: VMISHIM_GENUINE_PYTHON)",
    )
    compare.add_argument("--qmp", metavar="SOCKET", help="QEMU's monitor: the guest is stopped while its file is read")
    compare.add_argument("--only", metavar="BACKEND,BACKEND", help="these backends and no others")
    compare.add_argument("--runs", type=int, default=5, metavar="N", help="how often each is timed (%(default)s)")
    compare.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds for one run of the script (%(default)g)"
    )
    compare.add_argument(
        "-o", "--output", default="compare", metavar="NAME", help="writes NAME.json and NAME.html (%(default)s)"
    )
    compare.add_argument("script", metavar="SCRIPT", help="the script's file").complete = _FILES  # type: ignore[attr-defined]
    compare.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="its arguments")

    keygen = command(
        "keygen",
        "enrolment:keygen",
        "make a private key, print the public one",
        "vmishim keygen                                 make yours, once\n"
        "vmishim keygen ~/.config/vmishim/audit-key     another, for guests that are to know you by it",
    )
    keygen.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="PATH",
        help="file to make, mode 0600; an existing one is kept (default: ~/.config/vmishim/key)",
    )

    enroll = command(
        "enroll",
        "enrolment:enroll",
        "give a guest a name, and try to reach it",
        "vmishim enroll web-1 tcp://10.0.0.5:5555 vmishim-public-v1 k3Zn...=\n"
        "vmishim enroll web-1 tcp://10.0.0.5:5555 agent.pub --replace",
    )
    enroll.add_argument("name", metavar="NAME", help="the domain's name, as scripts will give it")
    enroll.add_argument("endpoint", metavar="ENDPOINT", help="where its agent listens, tcp://HOST:PORT")
    enroll.add_argument(
        "agent_key",
        metavar="AGENT_PUBLIC_KEY",
        nargs="+",
        help="the line that `agent.pyz keygen` printed, or a file of it",
    )
    enroll.add_argument("--key", type=Path, metavar="PATH", help="your private key (default: ~/.config/vmishim/key)")
    enroll.add_argument(
        "--kernel-key",
        metavar="KEY",
        nargs="+",
        help="the guest's kernel must encrypt by itself, by the word of this key: the line that `agent.pyz keygen "
        "/etc/vmishim/kernel.key` printed there, or a file of it",
    )
    enroll.add_argument("--replace", action="store_true", help="replace an entry of that name")
    enroll.add_argument("--no-check", action="store_true", help="write it down without trying to connect")

    domains = command(
        "domains",
        "enrolment:domains",
        "list the guests that are enrolled",
        "vmishim domains\nvmishim domains --json",
    )
    shape = domains.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="for programs")
    shape.add_argument("--names", action="store_true", help="names only, one a line")

    config = command(
        "config",
        "export:config",
        "write a libvmi.conf entry for LibVMI itself, by the guest's own word",
        "vmishim config --export web-1 >>~/etc/libvmi.conf",
    )
    which = config.add_argument("--export", dest="domain", required=True, metavar="DOMAIN", help="which guest")
    which.complete = _DOMAINS  # type: ignore[attr-defined]

    bundle = command(
        "bundle",
        "export:bundle",
        "write the agent's one file and its systemd unit, to copy into a guest",
        "vmishim bundle\nvmishim bundle -o image/usr/lib/vmishim/agent.pyz",
    )
    bundle.add_argument(
        "-o", "--output", type=Path, default=Path("agent.pyz"), metavar="FILE", help="(default: %(default)s)"
    )

    offsets = command(
        "offsets",
        "offsets:offsets",
        "write where members are in a kernel without BTF, by its headers",
        "vmishim offsets --headers /usr/src/linux-headers-6.1.0-56-cloud-amd64 >web-1.json",
        'Then add to web-1 in domains.toml: offsets = "web-1.json". Needs bcc (apt install python3-bpfcc).',
    )
    offsets.add_argument(
        "--headers", type=Path, required=True, metavar="FOLDER", help="linux-headers-RELEASE of the guest"
    )
    offsets.add_argument("members", nargs="*", metavar="MEMBER", help="more than listings need, as 'dentry d_name'")

    doctor = command(
        "doctor",
        "doctor:doctor",
        "say what works, what does not, and what to do",
        "vmishim doctor                                 our own side, and the guests that are enrolled\n"
        "vmishim doctor web-1                           all the way into a guest\n"
        "sudo vmishim doctor --local                    can an agent run on this machine?",
        "docs/troubleshooting.md has more on each of its answers.",
    )
    _guest(doctor, needed=False)
    doctor.add_argument("--json", action="store_true", help="for programs")

    attest = command(
        "attest",
        "attest:attest",
        "check what AMD SEV-SNP says of a guest and its agent's key",
        "vmishim attest web-1                           as its entry in domains.toml requires\n"
        "vmishim attest web-1 --save report.bin         keep the report, and the certificates that came with it\n"
        "vmishim attest --report report.bin --chain milan.pem --chain vcek.der",
        "No network is used: docs/deploy.md says where AMD keeps certificates that did not come with the report.",
    )
    attest.add_argument("domain", nargs="?", metavar="DOMAIN", help="the guest's name").complete = _DOMAINS  # type: ignore[attr-defined]
    attest.add_argument("--report", type=Path, metavar="FILE", help="check this report instead of the agent's")
    attest.add_argument(
        "--chain", type=Path, action="append", default=[], metavar="FILE", help="more certificates, PEM or DER"
    )
    attest.add_argument("--save", type=Path, metavar="FILE", help="write report and certificates there, unchecked")
    attest.add_argument("--json", action="store_true", help="for programs")

    completion = command(
        "completion",
        "completion:completion",
        "write a shell's completion script",
        "vmishim completion bash >~/.local/share/bash-completion/completions/vmishim\n"
        "vmishim completion zsh >~/.zfunc/_vmishim      with ~/.zfunc on your fpath\n"
        "vmishim completion fish >~/.config/fish/completions/vmishim.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    return whole


def _guests(command: argparse.ArgumentParser) -> None:
    which = _guest(command)
    which.add_argument("--domains", metavar="PATTERN", help="every guest whose name is like this, such as 'web-*'")
    # vmishim.inspection.fleet.DEADLINE, which a test compares.
    command.add_argument(
        "--deadline", type=float, default=30.0, metavar="S", help="seconds that --domains may take (%(default)g)"
    )
    command.add_argument(
        "--engine", default="", metavar="dask://HOST:PORT", help="ask --domains from the workers of a Dask cluster"
    )


def _guest(command: argparse.ArgumentParser, needed: bool = True) -> argparse._MutuallyExclusiveGroup:
    which = command.add_mutually_exclusive_group(required=needed)
    which.add_argument("domain", nargs="?", metavar="DOMAIN", help="the guest's name").complete = _DOMAINS  # type: ignore[attr-defined]
    which.add_argument("--local", action="store_true", help="this very machine; needs root")
    return which


def _listing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="for programs: objects in a list, addresses as hex strings"
    )
    _strategy(command)


def _strategy(command: argparse.ArgumentParser) -> None:
    # vmishim.guests.agent.STRATEGIES, which a test compares: importing it takes longer than all of this.
    command.add_argument(
        "--strategy",
        choices=("batch", "page", "scalar"),
        default="batch",
        help="how to read: whole lists ahead, page by page, or each read by itself (%(default)s)",
    )
    command.add_argument("--stats", action="store_true", help="say on standard error what it took")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 (or what the command says) after one clear line on standard error,
    130 after Ctrl-C, 141 when nobody reads our output any more.

    :raises SystemExit: the command line is wrong (2), or a script that was run says so
    """
    whole = parser()
    options = whole.parse_args(arguments)
    options.parser = whole
    module, _, name = options.function.partition(":")
    try:
        command: Command = getattr(importlib.import_module(f"vmishim.commands.{module}"), name)
        status = command(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from vmishim.commands import CommandError

        text = _explain(error)
        if text is None:
            raise
        print(f"vmishim: {text}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 1


def _explain(error: Exception) -> str | None:
    """What an error says to a person, on one line; None for those that are bugs."""
    from vmishim.commands import CommandError
    from vmishim.errors import LibvmiError
    from vmishim.output import printable

    if isinstance(error, CommandError):
        text = str(error)
    elif isinstance(error, LibvmiError):
        text = str(error)
        if text == "VMI_FAILURE":
            text = "the guest's memory does not read like a Linux kernel there (VMI_FAILURE); try vmishim doctor"
        text = re.sub(r"^[A-Z_]{2,}: ", "", text)  # LibVMI's name of the failure is for programs
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return None
    # What an agent says may be in there.
    return "; ".join(printable(line.strip()) for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    sys.exit(main())
