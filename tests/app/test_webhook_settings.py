"""The settings of webhooks, and the rules they become."""

from ipaddress import ip_address

import pytest

from rdev.config import SettingsError, load_settings


@pytest.fixture
def rules_of(monkeypatch):
    def read(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"RDEV_WEBHOOK_{name}", value)
        return load_settings({}).webhook_rules

    return read


def test_by_default_nothing_private_is_open_and_two_ports_are(rules_of) -> None:
    rules = rules_of()

    assert rules.ports == {443, 8443}
    assert (rules.allow_nets, rules.deny_nets) == ((), ())


def test_ports_and_networks_are_lists_with_commas(rules_of) -> None:
    rules = rules_of(
        PORTS="443, 9443", ALLOW_NETS="10.1.0.0/16, fd00::/8", DENY_NETS="93.184.0.0/16"
    )

    assert rules.ports == {443, 9443}
    assert rules.refusal(ip_address("10.1.2.3")) is None
    assert rules.refusal(ip_address("fd00::1")) is None
    assert rules.refusal(ip_address("10.2.0.1")) == "private"
    assert "DENY_NETS" in (rules.refusal(ip_address("93.184.216.34")) or "")


def test_every_fault_is_told(rules_of) -> None:
    with pytest.raises(SettingsError) as caught:
        rules_of(PORTS="443,x", ALLOW_NETS="10.0.0.1/8", DENY_NETS="hosts", TOTAL_S="0")

    told = str(caught.value)
    assert "RDEV_WEBHOOK_PORTS: must be ports" in told
    assert "RDEV_WEBHOOK_ALLOW_NETS: 10.0.0.1/8 has host bits set" in told
    assert "RDEV_WEBHOOK_DENY_NETS: 'hosts' does not appear to be" in told
    assert "RDEV_WEBHOOK_TOTAL_S" in told


@pytest.mark.parametrize("ports", ["0", "65536", "443,", "-1", "٤٤٣"])
def test_what_is_no_port_is_refused(rules_of, ports) -> None:
    with pytest.raises(SettingsError):
        rules_of(PORTS=ports)
