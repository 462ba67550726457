"""Which addresses of the internet protocol are the public web's, and which lead inside: to this machine, its
network, or what a cloud tells a machine about itself."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Look public, and are not: Azure's agent of a machine; IETF's own block, where Oracle's cloud has the like;
# gateways' own (RFC 8215).
_INSIDE = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "::/96", "64:ff9b:1::/48", "fec0::/10")))
# IPv6 addresses that a gateway turns into the IPv4 address of their last 32 bits.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Whether an address as sockets have it (IPv4, or IPv6 perhaps with a zone) may be anyone's web server."""
    address = _inner(ipaddress.ip_address(text))
    inside = any(address in network for network in _INSIDE if network.version == address.version)
    return address.is_global and not address.is_multicast and not inside


@lru_cache(maxsize=1024)
def leads_inside(host: str) -> bool:
    """Whether a host name or address, in whatever spelling, has addresses and none of them is public."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return not any(is_public(str(address[0])) for *_, address in found)


def _inner(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else None
    return address.ipv4_mapped or address.sixtofour or last or address
