"""Addresses in kernel tables."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from agent import addresses


@given(st.ip_addresses())
def test_an_address_survives_the_way_into_the_kernel_and_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    raw = addresses.packed(str(address))
    assert len(raw) == 16
    if any(raw):
        back = ipaddress.ip_address(addresses.text(raw))
        mapped = getattr(address, "ipv4_mapped", None)
        assert back == (mapped or address)
        assert addresses.is_ipv4(raw) == (back.version == 4)


def test_ipv6_endpoints_have_brackets() -> None:
    assert addresses.endpoint(addresses.packed("fd00::1"), 80) == "[fd00::1]:80"
    assert addresses.endpoint(addresses.packed("10.0.0.1"), 80) == "10.0.0.1:80"
    assert addresses.endpoint(bytes(16), 80) == ""
