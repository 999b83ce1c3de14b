"""``vmishim-agent``: the agent's command line. In the guest it is one file, ``python3 agent.pyz``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from guest_agent.requirements import ALL, CRYPTOGRAPHY, missing
from vmishim.errors import LibvmiError
from vmishim.foreign import paragraph
from vmishim.version import __version__

KEY = Path("/etc/vmishim/agent.key")
NEEDS = {"keygen": [CRYPTOGRAPHY], "attest": [CRYPTOGRAPHY], "check": ALL, "serve": ALL}
"""The packages that each command uses."""

EXAMPLES = """\
examples:
  agent.pyz keygen /etc/vmishim/agent.key        make this agent's key, print its public half
  agent.pyz serve --listen tcp://0.0.0.0:5555    answer the IDSs whose keys are in /etc/vmishim/permitted
  agent.pyz attest report.bin                    save AMD SEV-SNP's report on this agent's key, for `vmishim attest`
  agent.pyz check                                name missing packages; test whether this kernel can be read

Run it as root, or with CAP_BPF, CAP_PERFMON and CAP_SYSLOG (and CAP_NET_ADMIN for
--kernel-key), outside the monitored container. It drops all of these before it answers requests.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="vmishim-agent",
        description="Read this machine's kernel memory with eBPF, for a remote IDS that holds a permitted key.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"vmishim-agent {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="answer requests until stopped")
    serve.add_argument(
        "--listen",
        default="tcp://0.0.0.0:5555",
        metavar="ENDPOINT",
        help="tcp://ADDRESS:PORT or ipc://PATH (%(default)s)",
    )
    serve.add_argument("--key", type=Path, default=KEY, metavar="FILE", help="this agent's private key (%(default)s)")
    serve.add_argument(
        "--permitted",
        type=Path,
        default=Path("/etc/vmishim/permitted"),
        metavar="FILE",
        help="public keys of the IDSs that may connect, one per line (%(default)s)",
    )
    serve.add_argument(
        "--until-eof",
        action="store_true",
        help="print 'ready' to standard output when listening, and stop when standard input ends",
    )
    serve.add_argument(
        "--allow-injection",
        action="store_true",
        help="accept eBPF programs from IDSs and run them; a separate process keeps the privileges to load them",
    )
    serve.add_argument(
        "--kernel-key",
        type=Path,
        metavar="FILE",
        help="make the kernel encrypt what is read (Linux 6.10 or newer), so that this process sees ciphertext only; "
        "FILE is the private key that vouches for it, made by keygen",
    )
    serve.add_argument(
        "--freeze",
        type=Path,
        metavar="CGROUP",
        help="let IDSs freeze the monitored container while they look; CGROUP is the folder of its cgroup (version 2)",
    )
    serve.add_argument("--verbose", "-v", action="store_true", help="log every request")
    keygen = commands.add_parser("keygen", help="create a private key and print its public key")
    keygen.add_argument("path", type=Path, metavar="PATH", help="file to create, mode 0600; an existing file is kept")
    attest = commands.add_parser("attest", help="save a report of AMD SEV-SNP that vouches for this agent's keys")
    attest.add_argument(
        "path", type=Path, metavar="FILE", help="file to create: the report and the certificates that come with it"
    )
    attest.add_argument("--key", type=Path, default=KEY, metavar="FILE", help="this agent's private key (%(default)s)")
    attest.add_argument(
        "--kernel-key", type=Path, metavar="FILE", help="the key that vouches for the kernel's, if the kernel encrypts"
    )
    commands.add_parser("check", help="name missing packages, load the programs, and read this kernel once")
    return whole


class Printable(logging.Formatter):
    """Log lines and tracebacks, whose text may come from peers or from programs they sent, for a terminal to show."""

    def format(self, record: logging.LogRecord) -> str:
        return paragraph(super().format(record))


def main(arguments: list[str] | None = None) -> int:
    """Run the agent. Returns the exit status: 0, or 1 after standard error says what is wrong."""
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(message)s"))  # the journal adds the time and the unit
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if getattr(options, "verbose", False) else logging.INFO)
    lacking = missing(NEEDS[options.command])
    if lacking:
        print(*(f"vmishim-agent: {line}" for line in lacking), sep="\n", file=sys.stderr)
        return 1
    from guest_agent import commands  # imports what was just found to be there

    try:
        if options.command == "keygen":
            return commands.keygen(options.path)
        if options.command == "check":
            return commands.check()
        if options.command == "attest":
            return commands.attest(options)
        return commands.serve(options)
    except LibvmiError as error:
        print(f"vmishim-agent: {error}", file=sys.stderr)
        verifier = str(getattr(error, "log", "")).strip()
        if verifier:
            print(f"the kernel's message:\n{paragraph(verifier)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
