"""Which network interface of this machine the other machines can be reached through.

By default gloo takes the address that this machine's own name resolves to. On many machines that is a loopback address, which no
other machine reaches.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from flame.errors import UserError

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
SIOCGIFCONF = 0x8912
"""Request of Linux for all interfaces with an IPv4 address: netdevice(7)."""
INTERFACE_BYTES = 40
"""Size of `struct ifreq` on 64-bit Linux: a name of 16 bytes, and `struct sockaddr` with the address at byte 20."""


def find_local_address(host: str, port: int) -> tuple[str, str]:
    """Find by which of its addresses this machine reaches another. Sends nothing.

    Args:
        host: `MASTER_ADDR`.

    Returns:
        the own address, and the address that `host` stands for.

    Raises:
        UserError: the name is unknown, or no interface leads there.
    """
    label = f"MASTER_ADDR = {host} (environment)"
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{label} is no address known to {socket.gethostname()} ({reason}): give that of machine 0") from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError as error:
            raise UserError(
                f"{label} cannot be reached from {socket.gethostname()} ({error.strerror}): give an address of machine 0 in a "
                "network that both are in"
            ) from None
        return str(probe.getsockname()[0]), str(target[0])


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def find_interface(address: str) -> str | None:
    """The interface that has the address, such as "eth0"; None if there is none."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    return {**_list_ipv4(), **_list_ipv6()}.get(ipaddress.ip_address(address.partition("%")[0]))


def choose_interfaces(address: str) -> None:
    """Let gloo and NCCL use the interface with this address, unless the environment says which they use.

    Raises:
        UserError: no interface has the address.
    """
    wanted = [GLOO_INTERFACE] if is_loopback(address) else [GLOO_INTERFACE, NCCL_INTERFACE]
    unset = [name for name in wanted if not os.environ.get(name)]
    if not unset:
        return
    interface = find_interface(address)
    if interface is None:
        raise UserError(
            f"{' and '.join(unset)} (environment) are not set, and no interface of {socket.gethostname()} has the address "
            f"{address}, which it reaches machine 0 by: set them to the interface's name, see `ip address`"
        )
    for name in unset:
        # NCCL takes a name as the beginning of one; "=" makes it the whole.
        os.environ[name] = f"={interface}" if name == NCCL_INTERFACE else interface


def listen_on_loopback() -> tuple[int, int]:
    """A file descriptor that listens on a free port of this machine alone, and the port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listening.getsockname()[1]
    return listening.detach(), port


def _list_ipv4() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    buffer = array.array("B", bytes(INTERFACE_BYTES * 1024))
    address, length = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFCONF, struct.pack("iL", length, address))
    filled = struct.unpack("iL", answer)[0]
    entries = (buffer[start : start + INTERFACE_BYTES].tobytes() for start in range(0, filled, INTERFACE_BYTES))
    return {ipaddress.IPv4Address(entry[20:24]): entry[:16].rstrip(b"\0").split(b":")[0].decode() for entry in entries}


def _list_ipv6() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """From /proc/net/if_inet6: the address in hexadecimal is the first field, the interface the last."""
    path = Path("/proc/net/if_inet6")
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return {ipaddress.IPv6Address(bytes.fromhex(row[0])): row[-1] for row in rows}
