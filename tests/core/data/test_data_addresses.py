"""Which addresses are public: IANA's examples, Python's own opinion, and every way to write one of IPv4 in IPv6."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blip_core.data.addresses import forbidden_kind

PUBLIC = [
    "8.8.8.8",
    "93.184.215.14",
    "172.15.255.255",
    "172.32.0.0",
    "100.63.255.255",
    "169.253.0.1",
    "223.255.255.255",
]
PUBLIC += ["2606:4700:4700::1111", "2a00:1450:4001:80e::200e", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"]

KINDS = {
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "10.1.2.3": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "100.64.0.1": "a provider's private",
    "169.254.7.7": "link-local",
    "169.254.169.254": "cloud metadata",
    "100.100.100.200": "cloud metadata",
    "168.63.129.16": "cloud metadata",
    "224.0.0.251": "multicast",
    "255.255.255.255": "reserved",
    "0.0.0.0": "this network",
    "::": "unspecified",
    "::1": "loopback",
    "::1%lo": "loopback",
    "fe80::1%eth0": "link-local",
    "fd00::1": "private",
    "fd00:ec2::254": "cloud metadata",
    "ff02::1": "multicast",
    "::ffff:127.0.0.1": "loopback",
    "64:ff9b::169.254.169.254": "cloud metadata",
    "64:ff9b:1::8.8.8.8": "reserved",
    "2002:a00:1::1": "private",
    "2001:0:808:808::1": "reserved",
    "::8.8.8.8": "reserved",
    "2001:db8::1": "documentation",
    "100::1": "reserved",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_be_asked(address: str) -> None:
    assert forbidden_kind(address) is None


@pytest.mark.parametrize(("address", "kind"), KINDS.items())
def test_an_address_that_is_not_public_says_of_what_kind_it_is(address: str, kind: str) -> None:
    assert forbidden_kind(address) == kind


@given(st.ip_addresses())
@example(ipaddress.ip_address("192.0.0.9"))
def test_what_python_calls_private_or_multicast_is_never_asked(address: ipaddress.IPv4Address) -> None:
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_link_local:
        assert forbidden_kind(str(address)) or str(address).startswith(("64:ff9b::", "2002:", "::ffff:"))


@given(st.ip_addresses(v=4))
@example(ipaddress.ip_address("169.254.169.254"))
@example(ipaddress.ip_address("8.8.8.8"))
def test_an_address_of_ipv4_is_judged_alike_in_every_form_of_ipv6(address: ipaddress.IPv4Address) -> None:
    high, low = divmod(int(address), 65536)
    forms = (f"::ffff:{address}", f"64:ff9b::{address}", f"2002:{high:x}:{low:x}:1::2")
    assert {forbidden_kind(form) for form in forms} == {forbidden_kind(str(address))}
