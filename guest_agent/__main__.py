"""``vmishim-agent``: the agent's command line. In the guest it is one file, ``python3 agent.pyz``."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from guest_agent import attestation, sandbox
from guest_agent.agent import Agent
from guest_agent.freezer import Freezer
from guest_agent.injections import Injections
from guest_agent.kernel import Kernel, LoadError
from guest_agent.loader import Loader
from guest_agent.sealed import Sealer, why_unsupported
from vmishim import files
from vmishim.errors import LibvmiError, LinkError
from vmishim.foreign import paragraph
from vmishim.version import __version__
from vmishim.wire.keys import PermittedKeys, PublicKey, generate, load_private, save_private
from vmishim.wire.sessions import Sessions

log = logging.getLogger("vmishim-agent")

KEY = Path("/etc/vmishim/agent.key")
DESCRIPTORS, RESERVED = 4096, 64
"""Descriptors of the process at most, and how many of them are not for connections: programs, maps, files, libzmq's."""

EXAMPLES = """\
examples:
  agent.pyz keygen /etc/vmishim/agent.key        make this agent's key, print its public half
  agent.pyz serve --listen tcp://0.0.0.0:5555    answer the IDSs whose keys are in /etc/vmishim/permitted
  agent.pyz attest report.bin                    save AMD SEV-SNP's report on this agent's key, for `vmishim attest`
  agent.pyz check                                test whether this kernel can be read; if not, print why

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
    commands.add_parser("check", help="load the programs and read this kernel once")
    return whole


class Printable(logging.Formatter):
    """Log lines and tracebacks, whose text may come from peers or from programs they sent, for a terminal to show."""

    def format(self, record: logging.LogRecord) -> str:
        return paragraph(super().format(record))


def main(arguments: list[str] | None = None) -> int:
    """Run the agent. Returns the exit status: 0, or 1 after one line on standard error that says what is wrong."""
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(message)s"))  # the journal adds the time and the unit
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if getattr(options, "verbose", False) else logging.INFO)
    try:
        if options.command == "keygen":
            return _keygen(options.path)
        if options.command == "check":
            return _check()
        if options.command == "attest":
            return _attest(options)
        return _serve(options)
    except LibvmiError as error:
        print(f"vmishim-agent: {error}", file=sys.stderr)
        if isinstance(error, LoadError) and error.log.strip():
            print(f"the kernel's message:\n{paragraph(error.log.strip())}", file=sys.stderr)
        return 1


def _keygen(path: Path) -> int:
    if path.exists():
        key = load_private(path)
    else:
        key = generate()
        save_private(path, key)
    print(key.public.text)
    return 0


def _attest(options: argparse.Namespace) -> int:
    kernel_key = load_private(options.kernel_key).public if options.kernel_key else None
    evidence = attestation.evidence(load_private(options.key).public, kernel_key=kernel_key)
    if not evidence.bulk:
        print(f"vmishim-agent: no attestation: {evidence.text}", file=sys.stderr)
        return 1
    try:
        files.write(options.path, evidence.bulk)
    except OSError as error:
        raise LibvmiError(f"cannot write {options.path}: {error.strerror}") from None
    return 0


def _check() -> int:
    kernel = Kernel()
    try:
        banner = kernel.symbol("linux_banner")
        text = (
            kernel.read(banner, 256).split(b"\0")[0].decode(errors="replace").strip() if banner else os.uname().release
        )
        print(f"this kernel can be read: {text}")
        print(f"BTF: {'yes' if kernel.btf else 'no: offsets of structure members are unknown'}")
        print(
            f"direct map: {f'{kernel.page_offset:#x}' if kernel.page_offset else 'unknown: no physical or user memory'}"
        )
        print(f"encryption by the kernel: {why_unsupported() or 'yes, with serve --kernel-key'}")
    finally:
        kernel.close()
    return 0


def _serve(options: argparse.Namespace) -> int:
    from guest_agent.serve import Listener, serve  # imports zmq, which keygen and check do not need

    if options.kernel_key and options.allow_injection:
        raise LibvmiError(
            "an injected program shows this process what it reads: choose --allow-injection or --kernel-key, not both"
        )
    # Set-up: everything that opens a file, makes a socket or needs a privilege. No request is answered before its end.
    # The helper processes are forked first, so that they inherit none of our keys and descriptors.
    loader = Loader(os.cpu_count() or 1) if options.allow_injection else None
    freezer = Freezer(options.freeze)
    systemd = _systemd()
    key = load_private(options.key)
    permitted = PermittedKeys(options.permitted)
    kernel = Kernel()
    sealer = None
    if options.kernel_key:
        sealer = Sealer(kernel, options.kernel_key, permitted)
        kernel.close()
    injections = Injections(loader)
    evidence = attestation.evidence(key.public, kernel_key=sealer.public if sealer else None)
    agent = Agent(kernel, injections, evidence, sealer, freezer, owner=lambda session: sessions.key_of(session))

    def permits(asking: PublicKey) -> bool:
        found = permitted.find(asking)
        if permitted.replaced:
            log.error(
                "%s was replaced by a file that this process may not open: stopping, so that a restart reads it",
                permitted.path,
            )
            raise SystemExit(os.EX_TEMPFAIL)
        return found is not None

    sessions = Sessions(key, permits, on_end=agent.end)

    listener = Listener(options.listen)
    descriptors = _raise_descriptors()

    # Threads start from here on (libzmq's in `serve`), and each inherits this thread's capabilities.
    sandbox.drop_capabilities()
    stop = threading.Event()
    if options.until_eof:
        threading.Thread(target=_stop_at_eof, args=(stop,), daemon=True).start()

    def confine() -> None:
        sandbox.confine(sandbox.serving())
        # From here on no file can be opened.
        permitted.refresh()

    def ready(endpoint: str) -> None:
        log.info("vmishim-agent %s reads Linux %s", __version__, os.uname().release)
        log.info("listening on %s, key %s", endpoint, key.public.fingerprint)
        log.info("%s: %s", "attested by" if evidence.bulk else "no attestation", evidence.text)
        log.info("memory is encrypted by %s", "the kernel" if sealer else "this process")
        systemd("READY=1")
        if options.until_eof:
            print("ready", flush=True)

    try:
        serve(
            listener,
            sessions,
            agent.answer,
            stop=stop,
            watched=freezer.descriptors,
            confine=confine,
            ready=ready,
            between=agent.walk_ahead,
            descriptors=descriptors,
        )
        if freezer.lost:
            raise LinkError("the process that thaws has ended: stopping, so that a restart thaws the container")
        log.info("stopped")
    finally:
        systemd("STOPPING=1")
        freezer.close()
        injections.close()
        kernel.close()
        if sealer:
            sealer.close()
    return 0


def _raise_descriptors() -> int:
    """Allow this process as many descriptors as its limits let it; returns how many may be spent on connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(most, DESCRIPTORS) if most != resource.RLIM_INFINITY else DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return limit - RESERVED


def _stop_at_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _systemd() -> Callable[[str], object]:
    """Return a function that reports the service's state to systemd, if it listens (sd_notify(3)). Connects now."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return lambda state: None
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.connect("\0" + path[1:] if path.startswith("@") else path)
    return lambda state: notices.send(state.encode())


if __name__ == "__main__":
    sys.exit(main())
