"""Who listens to the network past its protocols: raw and packet sockets, and devices in promiscuous mode."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.inspection.checks.view import View, named
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.lists import ring

AF_INET, AF_INET6, AF_PACKET = 2, 10, 17
SOCK_RAW = 3
ICMPV6 = 58
"""Of daemons that take router advertisements: systemd-networkd, NetworkManager."""
DEVICES_MAX = 1 << 16
DEVICE_NAME_MAX = 16
IFF_BRIDGE_PORT, IFF_OVS_DATAPATH = 1 << 9, 1 << 10
"""Of ``net_device.priv_flags``: a device that is part of a switch is promiscuous without a listener
(include/linux/netdevice.h)."""


def raw_sockets(view: View) -> Iterator[Finding]:
    """Sockets that read or make packets themselves, with the processes that have them open."""
    ops = view.symbol("socket_file_ops")
    common = "sock __sk_common.skc_family"
    reported = set()
    for task, file in view.files:
        with view.marking(f"a file of {named(task)}"):
            if view.field(file, "file f_op") != ops:
                continue
            sock = view.field(view.field(file, "file private_data"), "socket sk")
            if not sock:
                continue
            family, kind = view.value(sock, common), view.value(sock, "sock sk_type")
            protocol = view.value(sock, "sock sk_protocol")
            is_raw = family in (AF_INET, AF_INET6) and kind == SOCK_RAW and (family, protocol) != (AF_INET6, ICMPV6)
            if family != AF_PACKET and not is_raw:
                continue
            which = "a packet socket" if family == AF_PACKET else f"a raw socket for IP protocol {protocol}"
            if (task.pid, which) in reported:
                continue
            reported.add((task.pid, which))
            yield Finding(
                "packet-socket" if family == AF_PACKET else "raw-socket",
                Severity.LOW,
                task.comm,
                f"{named(task)} has {which} open",
                "the family and type of the sockets of all processes",
                {"task_struct": task.address, "sock": sock},
                "whether it is a program that needs one: a DHCP client, a capture, ping",
                "T1040",
                task.pid,
            )


def promiscuous(view: View) -> Iterator[Finding]:
    """Network devices that take every packet they see."""
    link = view.at("net_device dev_list")
    for net in view.networks:
        what = f"the devices of the network at {net:#x}"
        for device in ring(view.vmi, net + view.at("net dev_base_head"), link, DEVICES_MAX, view.damage, what):
            with view.marking(f"the network device at {device:#x}"):
                count = view.value(device, "net_device promiscuity")
                if not count or view.number(device + view.at("net_device priv_flags")) & (
                    IFF_BRIDGE_PORT | IFF_OVS_DATAPATH
                ):
                    continue
                name = view.text(device + view.at("net_device name"), DEVICE_NAME_MAX)
                yield Finding(
                    "promiscuous-device",
                    Severity.MEDIUM,
                    name,
                    f"the network device {name} is in promiscuous mode",
                    "its promiscuity with 0",
                    {"net_device": device},
                    "who has a packet socket open",
                    "T1040",
                )
