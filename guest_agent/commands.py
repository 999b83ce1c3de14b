"""What the agent's commands do: make a key, check this machine, save a report, and serve."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from guest_agent import attestation, sandbox
from guest_agent.agent import Agent
from guest_agent.freezer import Freezer
from guest_agent.injections import Injections
from guest_agent.kernel import Kernel
from guest_agent.loader import Loader
from guest_agent.sealed import Sealer, why_unsupported
from vmishim import files
from vmishim.errors import LibvmiError, LinkError
from vmishim.version import __version__
from vmishim.wire.keys import PermittedKeys, PublicKey, generate, load_private, save_private
from vmishim.wire.sessions import Sessions

log = logging.getLogger("vmishim-agent")

DESCRIPTORS, RESERVED = 4096, 64
"""Descriptors of the process at most, and how many of them are not for connections: programs, maps, files, libzmq's."""


def keygen(path: Path) -> int:
    """Make a private key unless there is one, and print its public half. :raises LibvmiError: see `load_private`"""
    if path.exists():
        key = load_private(path)
    else:
        key = generate()
        save_private(path, key)
    print(key.public.text)
    return 0


def attest(options: argparse.Namespace) -> int:
    """Save a report on this agent's keys; 1 if there is none. :raises LibvmiError: it can't be written"""
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


def check() -> int:
    """Say whether this kernel can be read, and what of it. :raises LibvmiError: it can't"""
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


def serve(options: argparse.Namespace) -> int:
    """Answer requests until stopped. :raises LibvmiError: the set-up failed"""
    from guest_agent.serve import Listener  # imports zmq, which the other commands do not need
    from guest_agent.serve import serve as answer_requests

    if options.kernel_key and options.allow_injection:
        raise LibvmiError(
            "an injected program shows this process what it reads: choose --allow-injection or --kernel-key, not both"
        )
    if not options.until_eof:
        _await(options.key, options.permitted)
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
        answer_requests(
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


def _await(*paths: Path) -> None:
    """Return once these files are there and not empty, as after the first boot of a guest that makes its own key.

    systemd counts the service as started meanwhile: others need not wait for it, and its status says what is missing.
    """
    waited = ""
    systemd = _systemd()
    while lacking := " and ".join(str(path) for path in paths if not _is_filled(path)):
        if lacking != waited:
            log.warning("waiting for %s (docs/deploy.md)", lacking)
            systemd(f"READY=1\nSTATUS=waiting for {lacking}")
            waited = lacking
        time.sleep(0.5)
    if waited:
        systemd("STATUS=")


def _is_filled(path: Path) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # the set-up says why it can't be read
    return status.st_size > 0 or not stat.S_ISREG(status.st_mode)


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
