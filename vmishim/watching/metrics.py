"""Figures of a watch, in the OpenMetrics format, on loopback only. Needs ``vmishim[metrics]``."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

from vmishim.errors import LibvmiError
from vmishim.watching.outlets import Outlet
from vmishim.watching.rounds import Guest
from vmishim.watching.rules import RULES

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper bounds of ``vmishim_look_seconds``, in seconds."""


class Figures:
    """What Prometheus is told, gathered when it asks.

    :param guests: gives the guests that are watched now
    :param outlets: where records go
    """

    def __init__(self, guests: Callable[[], Sequence[Guest]], outlets: Sequence[Outlet]) -> None:
        self._guests, self._outlets = guests, outlets
        self._took = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def looked(self, seconds: float) -> None:
        """Count how long a look took."""
        self._sum += seconds
        self._took[next((at for at, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1

    def collect(self) -> Iterator[Any]:
        """Called by ``prometheus_client`` for each scrape."""
        core: Any = import_module("prometheus_client.core")
        now, guests = time.monotonic(), self._guests()

        def family(kind: Any, name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> Any:
            made = kind(name, text, labels=labels)
            for *values, value in rows:
                made.add_metric([str(each) for each in values], value)
            return made

        gauge, counter = core.GaugeMetricFamily, core.CounterMetricFamily
        up = [(guest.name, float(guest.last > 0 and guest.seen.answered)) for guest in guests]
        yield family(gauge, "vmishim_guest_up", "Whether the guest answered the last look.", ["guest"], up)
        yield family(
            gauge,
            "vmishim_last_look_age_seconds",
            "Seconds since the last look that could be read.",
            ["guest"],
            ((guest.name, now - guest.last) for guest in guests if guest.last),
        )
        yield family(
            gauge,
            "vmishim_last_look_seconds",
            "Duration of the last look.",
            ["guest"],
            ((guest.name, guest.seen.cost.seconds) for guest in guests if guest.last),
        )
        yield family(
            gauge,
            "vmishim_entries",
            "Entries of the last look.",
            ["guest", "list"],
            (
                (guest.name, name, number)
                for guest in guests
                if guest.last
                for name, number in zip(("processes", "modules", "sockets"), guest.counts, strict=True)
            ),
        )
        yield family(
            counter,
            "vmishim_looks",
            "Looks by how they ended: read, unreadable, unanswered.",
            ["guest", "result"],
            ((guest.name, result, number) for guest in guests for result, number in list(guest.looks.items())),
        )
        yield family(
            counter,
            "vmishim_looks_skipped",
            "Looks left out because the one before took longer than the interval.",
            ["guest"],
            ((guest.name, guest.schedule.skipped) for guest in guests),
        )
        yield family(
            counter,
            "vmishim_findings",
            "Findings by rule.",
            ["guest", "rule"],
            ((guest.name, RULES[text].id, number) for guest in guests for text, number in list(guest.findings.items())),
        )
        yield family(
            counter,
            "vmishim_requests",
            "Requests that the guest's agent answered.",
            ["guest"],
            ((guest.name, guest.cost.requests) for guest in guests),
        )
        yield family(
            counter,
            "vmishim_bytes",
            "Bytes of frames exchanged with the guest's agent.",
            ["guest", "direction"],
            (
                row
                for guest in guests
                for row in ((guest.name, "sent", guest.cost.sent), (guest.name, "received", guest.cost.received))
            ),
        )
        histogram = core.HistogramMetricFamily("vmishim_look_seconds", "Duration of looks, of all guests.")
        buckets, total = [], 0
        for bound, number in zip((*map(str, BUCKETS), "+Inf"), self._took, strict=True):
            total += number
            buckets.append((bound, total))
        histogram.add_metric([], buckets=buckets, sum_value=self._sum)
        yield histogram
        yield family(
            gauge,
            "vmishim_records_pending",
            "Records that could not be written yet.",
            ["output"],
            ((each.name, each.pending) for each in self._outlets),
        )
        yield family(
            counter,
            "vmishim_records_lost",
            "Records given up because they could not be written.",
            ["output"],
            ((each.name, each.lost) for each in self._outlets),
        )


def address(text: str) -> tuple[str, int]:
    """``127.0.0.1:9464`` or ``[::1]:9464`` in parts.

    :raises LibvmiError: it is not a literal loopback address with a port
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if ipaddress.ip_address(host).is_loopback and 0 < int(port) < 65536:
            return host, int(port)
    except ValueError:
        pass
    raise LibvmiError(
        f"--metrics {text!r} is not an address of this machine's loopback: use 127.0.0.1:9464; for a scraper on "
        "another machine, put a proxy with authentication before it"
    )


def serve(at: tuple[str, int], figures: Figures) -> Callable[[], None]:
    """Answer scrapes from a thread. Returns the function that ends that.

    :raises LibvmiError: ``vmishim[metrics]`` is not installed
    :raises OSError: the address is in use
    """
    try:
        client: Any = import_module("prometheus_client")
    except ModuleNotFoundError:
        raise LibvmiError("--metrics needs the Prometheus client: pip install 'vmishim[metrics]'") from None
    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(figures)
    try:
        server, thread = client.start_http_server(at[1], addr=at[0], registry=registry)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"--metrics {at[0]}:{at[1]}") from None

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
