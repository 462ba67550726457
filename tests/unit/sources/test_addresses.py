"""Public or inside: by the address, whatever it is dressed as."""

import pytest

from pipelines.sources.addresses import is_public, leads_inside

INSIDE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.5", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200",
    "169.254.169.254", "192.0.0.192", "168.63.129.16", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::10.0.0.5",
    "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::169.254.169.254", "64:ff9b::10.0.0.5", "2002:a00:5::",
    "64:ff9b:1::8.8.8.8", "64:ff9b:1:ffff::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::"]


@pytest.mark.parametrize("address", INSIDE)
def test_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "::1"])
def test_hosts_that_are_known_to_lead_inside(host: str) -> None:
    assert leads_inside(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "134744072", "nowhere.invalid", "", "a" * 70, "\ud800"])
def test_hosts_that_are_not_known_to_lead_inside(host: str) -> None:
    assert not leads_inside(host)
