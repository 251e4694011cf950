"""Which addresses belong to the public internet, and which a downloader of strangers' URLs has no business at.

Judged are addresses, never names or spellings: what a name, or a number in decimal, octal or hexadecimal, resolves to.
The tables are IANA's registries of special-purpose addresses, and what clouds add of their own.
"""

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

METADATA = {
    IPv4Address("169.254.169.254"),  # AWS, Azure, Google Cloud, OpenStack and others
    IPv4Address("169.254.170.2"),  # AWS, of a container
    IPv4Address("100.100.100.200"),  # Alibaba Cloud
    IPv4Address("192.0.0.192"),  # Oracle Cloud
    IPv4Address("168.63.129.16"),  # Azure's agent; the only one that looks like a public address
    IPv6Address("fd00:ec2::254"),  # AWS
    IPv6Address("fd20:ce::254"),  # Google Cloud
}

SPECIAL_V4 = {
    IPv4Network(network): kind
    for network, kind in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "a provider's private"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
}

# Outside of this no address of IPv6 is assigned to the public internet; these networks inside of it are not either.
UNICAST = IPv6Network("2000::/3")
SPECIAL_V6 = {
    IPv6Network(network): kind
    for network, kind in (
        ("2001::/23", "reserved"),  # Teredo's as well, which lead to any IPv4 address
        ("2001:db8::/32", "documentation"),
        ("3fff::/20", "documentation"),
    )
}
OUTSIDE_V6 = {
    IPv6Network(network): kind
    for network, kind in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("ff00::/8", "multicast"),
    )
}

# Addresses of IPv6 that stand for one of IPv4, and how far to its right that one begins.
EMBEDDING = {
    IPv6Network("::ffff:0:0/96"): 0,  # mapped
    IPv6Network("64:ff9b::/96"): 0,  # NAT64
    IPv6Network("2002::/16"): 80,  # 6to4
}


def forbidden_kind(address: str) -> str | None:
    """What keeps an address from being asked, such as 'loopback'; None where it is a public one.

    Args:
        address: an IPv4 or IPv6 address as getaddrinfo gives it, perhaps with a scope ('fe80::1%eth0').
    """
    found = ipaddress.ip_address(address)
    return _kind_v4(found) if isinstance(found, IPv4Address) else _kind_v6(IPv6Address(int(found)))


def _kind_v4(address: IPv4Address) -> str | None:
    if address in METADATA:
        return "cloud metadata"
    return next((kind for network, kind in SPECIAL_V4.items() if address in network), None)


def _kind_v6(address: IPv6Address) -> str | None:
    if address in METADATA:
        return "cloud metadata"
    for network, shift in EMBEDDING.items():
        if address in network:
            return _kind_v4(IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    if address in UNICAST:
        return next((kind for network, kind in SPECIAL_V6.items() if address in network), None)
    return next((kind for network, kind in OUTSIDE_V6.items() if address in network), "reserved")
