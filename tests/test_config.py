"""Settings that are more than a number: networks, from the environment and from a file."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from rdev.config import SettingsError, load_settings


@pytest.mark.parametrize(
    ("given", "networks"),
    [
        ("10.0.0.0/8", ["10.0.0.0/8"]),
        ("10.0.0.0/8, ::1 ,192.0.2.7", ["10.0.0.0/8", "::1/128", "192.0.2.7/32"]),
        ("::ffff:10.0.0.0/104", ["10.0.0.0/8"]),
        ("", []),
        (" , ", []),
    ],
)
def test_trusted_proxies_are_networks_with_commas_between(
    monkeypatch: pytest.MonkeyPatch, given: str, networks: list[str]
) -> None:
    monkeypatch.setenv("RDEV_TRUSTED_PROXIES", given)
    assert load_settings({}).trusted_proxies == tuple(ip_network(text) for text in networks)


@pytest.mark.parametrize("text", ['"10.0.0.0/8,::1"', '["10.0.0.0/8", "::1"]'])
def test_in_a_file_they_may_be_a_list(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rdev.toml"
    file.write_text(f"trusted_proxies = {text}\n")
    networks = (ip_network("10.0.0.0/8"), ip_network("::1/128"))
    assert load_settings({}, file).trusted_proxies == networks


def test_every_proxy_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDEV_TRUSTED_PROXIES", "10.0.0.0/8,10.0.0.1/8,nonsense")
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    told = str(caught.value)
    assert told.startswith("RDEV_TRUSTED_PROXIES: ")
    assert "'10.0.0.1/8' has bits set after its prefix; 10.0.0.0/8 is the network" in told
    assert "'nonsense' must be an IP address" in told


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        ("", {}),
        ("psycopg=debug", {"psycopg": "debug"}),
        ("rdev.http.requests=error, hypercorn = warn,", {
            "rdev.http.requests": "error", "hypercorn": "warn",
        }),
    ],
)  # fmt: skip
def test_loggers_have_levels_of_their_own(
    monkeypatch: pytest.MonkeyPatch, given: str, levels: dict[str, str]
) -> None:
    monkeypatch.setenv("RDEV_LOG_LEVELS", given)
    assert load_settings({}).logger_levels == levels


@pytest.mark.parametrize("given", ["psycopg", "psycopg=loud", "=debug", "a=info,,b", "a=warning"])
def test_a_level_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RDEV_LOG_LEVELS", given)
    with pytest.raises(SettingsError, match=r"^RDEV_LOG_LEVELS: must be LOGGER=LEVEL"):
        load_settings({})


@pytest.mark.parametrize("given", ["Projects", "a_b", "-a", "a" * 64])
def test_a_namespace_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RDEV_NAMESPACE", given)
    with pytest.raises(SettingsError, match="RDEV_NAMESPACE: must be a namespace"):
        load_settings({})
