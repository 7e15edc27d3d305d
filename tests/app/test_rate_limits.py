"""Limits of a server as operators set them, and the metrics they watch."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from rdev.config import Settings, SettingsError, load_settings
from tests.adapters.http.structured_fields import parse_list
from tests.app.server import Server, metric, open_server


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """A server that has had enough of an address after ten failures."""
    with open_server(
        quick_place,
        RDEV_RATE_LIMIT="7/3600s",
        RDEV_RATE_LIMIT_FAILURES="10/3600s",
        RDEV_RATE_LIMIT_STARTS="1/3600s",
        RDEV_STREAMS_KEY_MAX="1",
    ) as server:
        yield server


def ask(server: Server, method: str, path: str, key: str | None = None) -> httpx2.Response:
    headers = {"X-API-Key": server.key if key is None else key}
    return httpx2.request(method, server.url + path, headers=headers, json={"id": "demo"})


def test_the_bootstrap_key_is_exempt_and_told_a_full_quota(server: Server) -> None:
    replies = [ask(server, "GET", "/projects") for _ in range(9)]

    assert {reply.status_code for reply in replies} == {200}
    told = parse_list(replies[-1].headers["ratelimit"])
    assert told == [("key", {"r": 7, "t": 0})]
    assert parse_list(replies[-1].headers["ratelimit-policy"]) == [("key", {"q": 7, "w": 3_600})]
    assert replies[-1].headers["x-ratelimit-remaining"] == "7"
    assert metric(server, "rdev_limiter_asked") == 0


def test_breakers_are_shown_and_closed(server: Server) -> None:
    assert ask(server, "GET", "/projects").status_code == 200

    assert metric(server, "rdev_database_breaker_state") == 0
    assert metric(server, "rdev_database_breaker_calls") > 0
    assert metric(server, "rdev_database_breaker_failures") == 0
    assert metric(server, "rdev_exec_breaker_refused") == 0


def test_an_address_that_guesses_is_not_listened_to_any_more(server: Server) -> None:
    guesses = [ask(server, "GET", "/projects", key="guess") for _ in range(11)]
    right = ask(server, "GET", "/projects")

    assert [reply.status_code for reply in guesses] == [401] * 10 + [429]
    assert right.status_code == 429
    assert right.json()["violated-policies"] == ["failures"]
    assert int(right.headers["retry-after"]) > 3_000
    assert httpx2.get(server.url + "/health").status_code == 200
    assert metric(server, "rdev_limit_reached_total", limit="failures") == 2


@pytest.mark.parametrize(
    "name",
    ["RATE_LIMIT", "RATE_LIMIT_STARTS", "RATE_LIMIT_ADDRESS", "RATE_LIMIT_FAILURES"],
)
def test_a_limit_that_is_none_is_a_fault_of_the_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"RDEV_{name}", "600 a minute")
    with pytest.raises(SettingsError, match=f"RDEV_{name}: must be REQUESTS/SECONDSs"):
        load_settings({})

    monkeypatch.setenv(f"RDEV_{name}", "off")
    assert isinstance(load_settings({}), Settings)
