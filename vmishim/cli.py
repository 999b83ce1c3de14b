"""``vmishim``: the command line. Options are declared here; `vmishim.commands` carries the commands out.

A command's module is imported only when that command runs, so ``vmishim --version`` starts as fast as Python does.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from types import TracebackType
from typing import NoReturn

from vmishim.version import __version__

EXAMPLES = """\
examples:
  sudo vmishim ps --local                   list the processes of this machine, read by eBPF
  vmishim keygen                            make your key; put its public half into the guest
  vmishim enroll web-1 tcp://10.0.0.5:5555 "vmishim-public-v1 ..."
  vmishim ps web-1 --tree                   list the processes of a guest
  vmishim lsmod web-1 --json | jq .         list its modules as JSON
  vmishim ss web-1                          list its TCP sockets and their owners
  vmishim ps --domains 'web-*'              list the processes of many guests at once
  vmishim scan web-1                        look for intrusions in it
  vmishim run process_list.py web-1         run an unchanged LibVMI script on it
  vmishim dump web-1 -o core.elf            acquire its memory, for crash, drgn and others
  vmishim vol web-1 linux.pslist.PsList     run a Volatility 3 plugin on it
  vmishim drgn web-1                        debug its kernel at drgn's prompt
  vmishim compare process_list.py web-1     run it on all backends; compare answers and costs
  vmishim doctor web-1                      check what works, and how to fix what does not

A DOMAIN is an enrolled guest (list them with vmishim domains). Exit status: 0 success, 1 a problem with the guest or
the machine, 2 a problem with the command line; of ps, lsmod and ss, 3 if only part of a list could be read; of scan,
4 to 6 by severity.
"""

PS = """\
vmishim ps web-1 --tree
vmishim ps web-1 --threads
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
vmishim ss --domains '*' --engine dask://10.0.0.9:8786 --engine-tls ca.pem cert.pem key.pem
sudo vmishim ss --local --stats
"""
SCAN = """\
vmishim scan web-1
vmishim scan --domains '*' --json
vmishim scan web-1 --write-baseline known.json     accept what is found now
vmishim scan web-1 --baseline known.json           report only what is new
vmishim scan --list                                list the checks
"""

FLEET = """\
What cannot be read is marked: a question mark in the table, null and "unreadable" in JSON, and a line on standard
error; the exit status is then 3.

With --domains the table has a column for the guest; with --json each object is one line, printed as guests answer. A
guest that can't be read gets one line with "error" and does not delay the others; the exit status is then 1. What
could not be read of a guest's list gets lines with "damage".
"""

_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}

Command = Callable[[argparse.Namespace], int]

# For shtab: the shell function that completes a positional argument.
_DOMAINS = {"bash": "_vmishim_domains", "zsh": "_vmishim_domains", "fish": "(vmishim domains --names 2>/dev/null)"}
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": ""}


class _Parser(argparse.ArgumentParser):
    """argparse, with one-line errors."""

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
    shape = ps.add_mutually_exclusive_group()
    shape.add_argument("--tree", action="store_true", help="show children below their parents")
    ps.add_argument("--threads", action="store_true", help="show all threads of each process")
    _listing(ps, shape)

    lsmod = command("lsmod", "inspection:lsmod", "list the kernel modules of a guest, or of many", LSMOD, FLEET)
    _guests(lsmod)
    _listing(lsmod)

    ss = command("ss", "inspection:ss", "list the TCP sockets of a guest, or of many", SS, FLEET)
    _guests(ss)
    _listing(ss)

    watch = command(
        "watch",
        "watch:watch",
        "watch processes, modules and sockets start and end, and flag what is suspicious; of one guest, or of many",
        "vmishim watch web-1\n"
        "sudo vmishim watch --local --interval 0.5\n"
        "vmishim watch web-1 >>web-1.log               log events until you stop it\n"
        "vmishim watch --domains '*'                   a table of all guests\n"
        "vmishim watch --domains 'web-*' --output /var/log/vmishim/watch.json --metrics 127.0.0.1:9464",
        "Quit with q or Ctrl-C. If the output is not a terminal, it writes one line for each event; with --domains or\n"
        "--json, one JSON object. SIGHUP reads the list of guests again and reopens --output. See docs/watching.md.",
    )
    _guest(watch).add_argument(
        "--domains", metavar="PATTERN", help="every guest whose name matches, such as 'web-*'; sessions stay open"
    )
    watch.add_argument(
        "--interval", type=_seconds, metavar="S", help="seconds between looks (2; with --domains or --json 1)"
    )
    watch.add_argument(
        "--lists",
        type=_lists,
        # vmishim.inspection.changes.LISTS; a test keeps the two equal.
        default=("processes", "modules", "sockets"),
        metavar="LIST,LIST",
        help="what a look reads (processes,modules,sockets); sockets cost most",
    )
    _engine(watch)
    watch.add_argument("--json", action="store_true", help="write one JSON object for each event, with ECS's names")
    watch.add_argument("--output", metavar="FILE", help="append JSON to FILE (with --domains or --json)")
    watch.add_argument("--journal", action="store_true", help="write to journald (with --domains or --json)")
    watch.add_argument("--syslog", action="store_true", help="write to syslog (with --domains or --json)")
    watch.add_argument(
        "--metrics", metavar="ADDRESS:PORT", help="answer Prometheus on loopback (with --domains or --json)"
    )

    scan = command(
        "scan",
        "scan:scan",
        "look for intrusions in a guest, or in many: hidden processes, hooks, raised credentials",
        SCAN,
        "Exit status: 0 no findings, 1 a guest could not be read, 3 only part of it, or a check could not run; with\n"
        "findings 4 (low), 5 (medium) or 6 (high), by the highest. See docs/scan.md.",
    )
    _guest(scan, needed=False).add_argument(
        "--domains", metavar="PATTERN", help="every guest whose name matches, such as 'web-*'"
    )
    scan.add_argument(
        "--deadline", type=_seconds, default=30.0, metavar="S", help="time limit for --domains, seconds (%(default)g)"
    )
    scan.add_argument("--json", action="store_true", help="print one JSON object per guest, each on one line")
    scan.add_argument("--baseline", type=Path, metavar="FILE", help="accept the findings that this file names")
    scan.add_argument(
        "--write-baseline", type=Path, metavar="FILE", help="accept all that is found now, and write it to this file"
    )
    scan.add_argument("--only", action="append", default=[], metavar="CHECK,CHECK", help="run only these checks")
    scan.add_argument("--skip", action="append", default=[], metavar="CHECK,CHECK", help="run all checks but these")
    scan.add_argument(
        "--list",
        action="store_true",
        help="list the checks and what each needs; with a guest, whether its kernel has it",
    )
    scan.add_argument("--stats", action="store_true", help="print time, requests and bytes on standard error")

    run = command(
        "run",
        "script:run",
        "run an unchanged LibVMI script or compiled program; its libvmi is vmishim",
        "vmishim run process_list.py web-1              put the script's own arguments after it\n"
        "vmishim run --stats process_list.py web-1      also print time and requests\n"
        "vmishim run --strategy scalar --stats process_list.py web-1\n"
        "sudo vmishim run --local process_list.py any-name\n"
        "vmishim run -- ./process-list -n web-1         a compiled program that uses libvmi.so.0",
        "The script keeps its arguments, output, traceback and exit status. Put vmishim's options before the script.\n"
        "With --local every domain that the script names means this machine. For compiled programs see docs/capi.md.",
    )
    # vmishim.capi.ABIS, whose import takes longer than building this parser; a test keeps them equal.
    run.add_argument("--abi", choices=("0.14", "0.15"), help="version of LibVMI that a program was compiled for (0.15)")
    run.add_argument(
        "--poll-events", action="store_true", help="let a program ask for events and wait for them; none will come"
    )
    run.add_argument("--local", action="store_true", help="read this machine, whichever domain the script names")
    _strategy(run)
    _script(run)

    vol = command(
        "vol",
        "volatility:vol",
        "run a Volatility 3 plugin on a guest",
        "vmishim vol web-1 linux.pslist.PsList\n"
        "vmishim vol web-1 -r json linux.malware.hidden_modules\n"
        "vmishim vol --stats web-1 linux.lsof --pid 1\n"
        "sudo vmishim vol --local any-name linux.lsmod",
        "Needs vmishim[vol]; symbols come from the guest. What follows DOMAIN is Volatility's own: list it with\n"
        "`vmishim vol web-1 --help`. docs/volatility.md says which plugins work, and about `vol -f vmishim://web-1`.",
    )
    vol.add_argument("--local", action="store_true", help="read this machine, whichever domain is named; needs root")
    vol.add_argument("--stats", action="store_true", help="print time, requests and bytes on standard error")
    which = vol.add_argument("domain", metavar="DOMAIN", help="the guest's name")
    which.complete = _DOMAINS  # type: ignore[attr-defined]
    vol.add_argument("words", nargs=argparse.REMAINDER, metavar="PLUGIN", help="Volatility's options and a plugin")
    drgn = command(
        "drgn",
        "drgn:drgn",
        "open a guest in drgn: its prompt, a script, or a crash-style command",
        "vmishim drgn web-1                             drgn's prompt; the guest is prog\n"
        "vmishim drgn web-1 script.py                   put the script's own arguments after it\n"
        "vmishim drgn web-1 -e 'print(len(list(for_each_task())))'\n"
        "vmishim drgn web-1 --crash                     a prompt for crash-style commands\n"
        "vmishim drgn web-1 --crash ps -m               one of these commands\n"
        "sudo vmishim drgn --local -- script.py",
        "Needs vmishim[drgn], and no debugging symbols: types and symbols come from the guest. Put vmishim's options\n"
        "before the script or crash command. docs/drgn.md says what works, and how old memory may be.",
    )
    which = drgn.add_argument("domain", metavar="DOMAIN", help="the guest's name")
    which.complete = _DOMAINS  # type: ignore[attr-defined]
    which.required = False  # with --local; not nargs="?", which would leave this word to the next argument
    drgn.add_argument("--local", action="store_true", help="this machine; needs root")
    mode = drgn.add_mutually_exclusive_group()
    mode.add_argument("-e", dest="code", metavar="CODE", help="run this Python code, with drgn's helpers imported")
    mode.add_argument("--crash", action="store_true", help="run a crash-style command, or ask for such commands")
    drgn.add_argument(
        "--keep",
        type=_seconds,
        default=1.0,  # vmishim.memory.lifetimes.STALE; a test keeps the two equal
        metavar="S",
        help="use memory that was read for so many seconds (%(default)g)",
    )
    drgn.add_argument("--stats", action="store_true", help="print time, requests and bytes on standard error")
    words = drgn.add_argument(
        "words",
        nargs=argparse.PARSER,
        default=[],
        metavar="SCRIPT",
        help="a drgn script or a crash command, with its arguments",
    )
    words.complete = _FILES  # type: ignore[attr-defined]
    words.required = False

    compare = command(
        "compare",
        "compare:compare",
        "run an unchanged LibVMI script on every backend of a guest; compare answers and costs",
        "vmishim compare process_list.py web-1\n"
        "vmishim compare --only agent-page,agent-batch --runs 20 -o page-or-batch process_list.py web-1\n"
        "sudo vmishim compare --local process_list.py any-name",
        "Backends: agent-scalar, agent-page, agent-batch; ramfile, if the guest's entry names one; native, the\n"
        "genuine LibVMI bindings on that file. All run on one guest, whatever name the script uses. Put vmishim's\n"
        "options before the script. Exit status: 0 the answers agree, 1 they differ, 2 error, or the\n"
        "script asked the guest nothing. See docs/compare.md.",
    )
    compare.add_argument("--local", action="store_true", help="compare on this machine; needs root")
    compare.add_argument("--domain", metavar="DOMAIN", help="the guest, if it is not among the script's arguments")
    compare.add_argument(
        "--genuine",
        metavar="PYTHON",
        help="an interpreter that can import LibVMI's genuine bindings (default: VMISHIM_GENUINE_PYTHON)",
    )
    compare.add_argument(
        "--qmp", metavar="SOCKET", help="QEMU's monitor socket, to stop the guest while its RAM file is read"
    )
    compare.add_argument("--only", metavar="BACKEND,BACKEND", help="use only these backends")
    compare.add_argument(
        "--runs", type=_count, default=5, metavar="N", help="times each backend is timed (%(default)s)"
    )
    compare.add_argument(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="time limit for one run of the script, seconds (%(default)g)",
    )
    compare.add_argument(
        "-o",
        "--output",
        default="compare",
        metavar="NAME",
        help="write the report to NAME.json and NAME.html (%(default)s)",
    )
    _script(compare)

    dump = command(
        "dump",
        "dump:dump",
        "acquire the memory of a guest into a file, hashed and signed",
        "vmishim dump web-1 -o core.elf                 all of its memory, for crash, drgn, gdb, Volatility\n"
        "vmishim dump web-1 -o core.elf --kernel-only   without the memory of processes and files, and free memory\n"
        "vmishim dump web-1 -o core.elf --resume        go on after a break\n"
        "vmishim dump web-1 -o image.lime --format lime --rate 50\n"
        "vmishim dump --verify core.elf                 was it changed since?",
        "Beside the file are core.elf.manifest.json, with the hashes of its chunks, and its signature. docs/dump.md\n"
        "says what the file has, what it lacks, and which programs open it.",
    )
    instead = _guest(dump)
    instead.add_argument("--verify", type=Path, metavar="FILE", help="check a dump against its manifest and signature")
    instead.add_argument(
        "--finish", type=Path, metavar="FILE", help="make a dump of what an unfinished one has, without the guest"
    )
    instead.add_argument(
        "--signer-line", action="store_true", help="print the line with which others check your manifests (--signer)"
    )
    dump.add_argument("-o", "--output", type=Path, metavar="FILE", help="the file to write; it must not exist")
    # vmishim.acquire.shapes.SHAPES; a test keeps the two equal.
    dump.add_argument("--format", choices=("elf", "lime"), help="ELF core or LiME image (elf)")
    dump.add_argument(
        "--kernel-only", action="store_true", help="leave out free memory, and that of processes and files"
    )
    dump.add_argument("--resume", action="store_true", help="go on with an unfinished dump")
    dump.add_argument("--rate", type=_mebibytes, default=0.0, metavar="MIB", help="read at most so many MiB a second")
    dump.add_argument(
        "--connections",
        type=_count,
        default=4,
        metavar="N",
        help="connections that ask the agent in turn (%(default)s); 1 is gentlest to other users of the agent",
    )
    dump.add_argument(
        "--freeze", action="store_true", help="freeze the monitored container until all is read, if the agent may"
    )
    dump.add_argument("--key", type=Path, metavar="PATH", help="the private key that signs (default: the entry's)")
    dump.add_argument("--signer", metavar="LINE", help="with --verify: whose signature it must be (default: yours)")
    dump.add_argument("-q", "--quiet", action="store_true", help="print errors only")

    keygen = command(
        "keygen",
        "enrolment:keygen",
        "make a private key and print its public key",
        "vmishim keygen                                 make your key, once\n"
        "vmishim keygen ~/.config/vmishim/audit-key     make another key, for other guests",
    )
    keygen.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="PATH",
        help="file to create, mode 0600; an existing key is kept (default: ~/.config/vmishim/key)",
    )

    enroll = command(
        "enroll",
        "enrolment:enroll",
        "connect to a guest, and add it under a name",
        "vmishim enroll web-1 tcp://10.0.0.5:5555 vmishim-public-v1 k3Zn...=\n"
        "vmishim enroll web-1 tcp://10.0.0.5:5555 agent.pub --replace",
    )
    enroll.add_argument("name", metavar="NAME", help="the domain's name, as scripts use it")
    enroll.add_argument("endpoint", metavar="ENDPOINT", help="its agent's address, tcp://HOST:PORT")
    enroll.add_argument(
        "agent_key",
        metavar="AGENT_PUBLIC_KEY",
        nargs="+",
        help="the line that `agent.pyz keygen` printed, or a file with that line",
    )
    enroll.add_argument("--key", type=Path, metavar="PATH", help="your private key (default: ~/.config/vmishim/key)")
    enroll.add_argument(
        "--kernel-key",
        metavar="KEY",
        nargs="+",
        help="require encryption in the guest's kernel, confirmed by this key: the line that `agent.pyz keygen "
        "/etc/vmishim/kernel.key` printed in the guest, or a file with that line",
    )
    enroll.add_argument("--replace", action="store_true", help="replace an existing entry of this name")
    enroll.add_argument("--no-check", action="store_true", help="save the entry without connecting")

    forget = command(
        "forget",
        "enrolment:forget",
        "remove guests from the enrolled ones",
        "vmishim forget web-1\nvmishim forget web-1 web-2",
        "It changes only your list of guests. Remove your key from the guest's /etc/vmishim/permitted yourself.",
    )
    names = forget.add_argument("names", nargs="+", metavar="DOMAIN", help="the guest's name")
    names.complete = _DOMAINS  # type: ignore[attr-defined]

    domains = command(
        "domains",
        "enrolment:domains",
        "list the enrolled guests",
        "vmishim domains\nvmishim domains --json",
    )
    shape = domains.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--names", action="store_true", help="print names only, one per line")

    config = command(
        "config",
        "export:config",
        "write a libvmi.conf entry for genuine LibVMI, from what the guest reports",
        "vmishim config --export web-1 >>~/etc/libvmi.conf",
    )
    which = config.add_argument("--export", dest="domain", required=True, metavar="DOMAIN", help="which guest")
    which.complete = _DOMAINS  # type: ignore[attr-defined]

    bundle = command(
        "bundle",
        "export:bundle",
        "write the agent (one file) and its systemd unit, to copy into a guest",
        "vmishim bundle\nvmishim bundle -o image/usr/lib/vmishim/agent.pyz\n"
        "vmishim bundle --watch .                       for this side: see docs/watching.md",
    )
    bundle.add_argument(
        "--watch",
        type=Path,
        metavar="FOLDER",
        help="instead, write the systemd unit of `vmishim watch` and a Grafana dashboard into FOLDER",
    )
    bundle.add_argument(
        "-o", "--output", type=Path, default=Path("agent.pyz"), metavar="FILE", help="(default: %(default)s)"
    )

    offsets = command(
        "offsets",
        "offsets:offsets",
        "generate structure offsets from kernel headers, for a kernel without BTF",
        "vmishim offsets --headers /usr/src/linux-headers-6.1.0-56-cloud-amd64 >web-1.json",
        'Then add to web-1 in domains.toml: offsets = "web-1.json". Needs bcc (apt install python3-bpfcc).',
    )
    offsets.add_argument(
        "--headers", type=Path, required=True, metavar="FOLDER", help="the guest's linux-headers-RELEASE folder"
    )
    offsets.add_argument(
        "members",
        nargs="*",
        metavar="MEMBER",
        help="members to add to those that listings need, such as 'dentry d_name'",
    )

    doctor = command(
        "doctor",
        "doctor:doctor",
        "check the setup, and say how to fix what does not work",
        "vmishim doctor                                 check this side and all enrolled guests\n"
        "vmishim doctor web-1                           check everything from here into a guest\n"
        "sudo vmishim doctor --local                    can an agent run on this machine?",
        "docs/troubleshooting.md explains each answer.",
    )
    _guest(doctor, needed=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")

    attest = command(
        "attest",
        "attest:attest",
        "check the AMD SEV-SNP attestation report of a guest and its agent's key",
        "vmishim attest web-1                           check against its entry in domains.toml\n"
        "vmishim attest web-1 --save report.bin         save the report and its certificates\n"
        "vmishim attest --report report.bin --chain milan.pem --chain vcek.der",
        "This uses no network. docs/deploy.md says where to get certificates that did not come with the report.",
    )
    attest.add_argument("domain", nargs="?", metavar="DOMAIN", help="the guest's name").complete = _DOMAINS  # type: ignore[attr-defined]
    attest.add_argument(
        "--report", type=Path, metavar="FILE", help="check the report in this file, do not ask the agent"
    )
    attest.add_argument(
        "--chain", type=Path, action="append", default=[], metavar="FILE", help="more certificates, PEM or DER"
    )
    attest.add_argument("--save", type=Path, metavar="FILE", help="save the report and certificates, unchecked")
    attest.add_argument("--json", action="store_true", help="print JSON")

    completion = command(
        "completion",
        "completion:completion",
        "write a completion script for your shell",
        "vmishim completion bash >~/.local/share/bash-completion/completions/vmishim\n"
        "vmishim completion zsh >~/.zfunc/_vmishim      with ~/.zfunc on your fpath\n"
        "vmishim completion fish >~/.config/fish/completions/vmishim.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    return whole


def _guests(command: argparse.ArgumentParser) -> None:
    which = _guest(command)
    which.add_argument("--domains", metavar="PATTERN", help="every guest whose name matches, such as 'web-*'")
    # vmishim.inspection.fleet.DEADLINE; a test keeps the two equal.
    command.add_argument(
        "--deadline", type=_seconds, default=30.0, metavar="S", help="time limit for --domains, seconds (%(default)g)"
    )
    _engine(command)


def _engine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--engine",
        default="",
        metavar="dask://HOST:PORT",
        help="read --domains from the workers of a Dask cluster, by TLS; dask+tcp:// for 127.0.0.1 only",
    )
    command.add_argument(
        "--engine-tls",
        nargs=3,
        default=(),
        metavar=("CA", "CERT", "KEY"),
        help="PEM files for --engine (default: those that Dask's configuration files name)",
    )


def _guest(command: argparse.ArgumentParser, needed: bool = True) -> argparse._MutuallyExclusiveGroup:
    which = command.add_mutually_exclusive_group(required=needed)
    which.add_argument("domain", nargs="?", metavar="DOMAIN", help="the guest's name").complete = _DOMAINS  # type: ignore[attr-defined]
    which.add_argument("--local", action="store_true", help="this machine; needs root")
    return which


def _script(command: argparse.ArgumentParser) -> None:
    command.add_argument("script", metavar="SCRIPT", help="the script's file").complete = _FILES  # type: ignore[attr-defined]
    # argparse would name ARG among what is required.
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="its arguments").required = False


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def _mebibytes(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of MiB above 0")
    return rate


def _lists(text: str) -> tuple[str, ...]:
    known, wanted = ("processes", "modules", "sockets"), text.split(",")
    if wrong := [name for name in wanted if name not in known]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return count


_seconds.__name__, _mebibytes.__name__, _count.__name__ = (
    "number of seconds",
    "number of MiB",
    "number",
)  # as argparse calls them in its messages


def _listing(command: argparse.ArgumentParser, shape: argparse._MutuallyExclusiveGroup | None = None) -> None:
    (shape or command).add_argument(
        "--json", action="store_true", help="print a JSON list of objects, with addresses as hex strings"
    )
    _strategy(command)


def _strategy(command: argparse.ArgumentParser) -> None:
    # vmishim.guests.agent.STRATEGIES, whose import takes longer than building this parser; a test keeps them equal.
    command.add_argument(
        "--strategy",
        choices=("batch", "page", "scalar"),
        default="batch",
        help="how to read: whole lists ahead, page by page, or one request per read (%(default)s)",
    )
    command.add_argument("--stats", action="store_true", help="print time, requests and bytes on standard error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0; 1 (or the command's own) after one clear line on standard error; 130
    after Ctrl-C; 141 when standard output was closed.

    :raises SystemExit: the command line is wrong (2), or a script that ``run`` executes exits
    """
    _fill_standard_streams()
    try:
        whole = parser()
        try:
            options = whole.parse_args(arguments)
        except SystemExit:
            _flush()  # the help
            raise
        options.parser = whole
        if sys.stdout is None and options.command != "run":  # a script decides by itself
            print("vmishim: standard output is closed, so there is nowhere to print", file=sys.stderr)
            return 1
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _hook
        module, _, name = options.function.partition(":")
        command: Command = getattr(importlib.import_module(f"vmishim.commands.{module}"), name)
        status = command(options)
        _flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _mute()
        return 141
    except Exception as error:
        from vmishim.commands import CommandError

        text = _explain(error)
        if text is None:
            raise
        try:
            _flush()
        except OSError:
            _mute()
        print(f"vmishim: {text}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 1


def _fill_standard_streams() -> None:
    """Open ``/dev/null`` for each standard stream that is closed, so that no other file gets its number: what is meant
    for the terminal would be written into it. ``sys.stdout`` stays None if it was closed."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(lowest, True)
    os.close(lowest)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)  # print() takes None for standard output


def _flush() -> None:
    """Write what was printed, and not at exit, where an error is too late. :raises OSError: it can't be written"""
    if sys.stdout is not None:
        sys.stdout.flush()


def _mute() -> None:
    """Python flushes standard output again at exit, and would report that it is closed or full."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from vmishim.output import show_error

    show_error(kind, error, trace)


def _explain(error: Exception) -> str | None:
    """An error's message for people, on one line; None if the error is a bug."""
    from vmishim.commands import CommandError
    from vmishim.errors import FAILURE, LibvmiError
    from vmishim.foreign import printable

    if isinstance(error, CommandError):
        text = str(error)
    elif isinstance(error, LibvmiError):
        text = str(error)
        if text == FAILURE:
            why = getattr(error, "__notes__", ["no Linux kernel structure at that place in the guest's memory"])
            text = f"{'; '.join(why)} ({FAILURE}); run vmishim doctor"
        text = re.sub(r"^[A-Z_]{2,}: ", "", text)  # LibVMI's name for the failure is for programs
    elif isinstance(error, OSError):
        # Every file of ours is opened by its name.
        where = error.filename or ("standard output" if error.errno in _WRITE_ERRORS else "")
        text = f"{where}: {error.strerror}" if where else str(error)
    else:
        return None
    # The text may hold what an agent sent.
    return "; ".join(printable(line.strip()) for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    sys.exit(main())
