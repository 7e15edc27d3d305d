"""The origin a client speaks to, and the cookie it gets there."""

from ipaddress import ip_network
from typing import Any

import pytest

from rdev.adapters.http.cookies import forgotten, session_cookie, session_in
from rdev.adapters.http.origin import Origin, check_same_origin, origin_of
from rdev.domain.errors import ErrorCode, RdevError

PROXIES = (ip_network("10.0.0.0/8"),)
HERE = Origin(scheme="http", host="127.0.0.1:8080")
THERE = Origin(scheme="https", host="rdev.example")


def scope(scheme: str = "http", peer: str | None = "192.0.2.1", **headers: str) -> Any:
    return {
        "type": "http",
        "scheme": scheme,
        "client": None if peer is None else (peer, 4711),
        "headers": [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()],
    }


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (scope(host="127.0.0.1:8080"), "http://127.0.0.1:8080"),
        (scope(host="RDEV.Example"), "http://rdev.example"),
        (scope(host="rdev.example:80"), "http://rdev.example"),
        (scope("https", host="rdev.example:443"), "https://rdev.example"),
        (scope("https", host="rdev.example:80"), "https://rdev.example:80"),
        (scope(host="[::1]:8080"), "http://[::1]:8080"),
        (scope(peer=None, host="localhost"), "http://localhost"),
        # From whoever is no trusted proxy nothing is taken.
        (scope(host="a", x_forwarded_proto="https", x_forwarded_host="b"), "http://a"),
        (scope(host="a", forwarded="proto=https;host=b"), "http://a"),
        (scope(peer="10.1.1.1", host="a", x_forwarded_proto="https"), "https://a"),
        (scope(peer="10.1.1.1", host="a:443", x_forwarded_proto="HTTPS"), "https://a"),
        (
            scope(peer="10.1.1.1", host="a", x_forwarded_proto="https, http", x_forwarded_host="B"),
            "https://b",
        ),
        (scope(peer="10.1.1.1", host="a", forwarded="for=1.2.3.4;proto=https"), "https://a"),
        (
            scope(
                peer="10.1.1.1",
                host="a",
                forwarded='for=1.2.3.4; Host="b:8443"; proto=https, for=10.0.0.1;proto=http',
            ),
            "https://b:8443",
        ),
        (scope(peer="10.1.1.1", host="a", forwarded="for=1.2.3.4"), "http://a"),
    ],
)
def test_the_origin_is_what_the_client_speaks_to(asked: Any, text: str) -> None:
    assert origin_of(asked, PROXIES).text == text


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1:8080", True), ("127.9.9.9", True), ("localhost", True), ("[::1]:80", True),
        ("rdev.localhost:8080", True), ("localhost.example", False), ("192.0.2.1", False),
        ("127.0.0.1.example", False), ("", False),
    ],
)  # fmt: skip
def test_loopback_is_told_by_its_name(host: str, is_loopback: bool) -> None:
    assert Origin(scheme="http", host=host).is_loopback is is_loopback


@pytest.mark.parametrize(
    ("headers", "is_same"),
    [
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "same-origin", "origin": "https://elsewhere"}, True),
        ({"origin": "http://127.0.0.1:8080"}, True),
        ({}, False),
        ({"sec_fetch_site": "same-site"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "none"}, False),
        # A browser that says both means the first.
        ({"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:8080"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:8081"}, False),
        ({"origin": "https://127.0.0.1:8080"}, False),
        ({"origin": "http://127.0.0.1:8080.evil.example"}, False),
        ({"origin": "http://localhost:8080"}, False),
        ({"referer": "http://127.0.0.1:8080/"}, False),
    ],
)
def test_only_a_page_of_the_own_origin_changes_anything(
    headers: dict[str, str], is_same: bool
) -> None:
    asked = scope(host="127.0.0.1:8080", **headers)
    if is_same:
        check_same_origin(asked, HERE)
        return
    with pytest.raises(RdevError) as caught:
        check_same_origin(asked, HERE)
    assert caught.value.code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize(
    ("origin", "client_ip", "cookie"),
    [
        (HERE, "127.0.0.1", b"rdev_session=t; Max-Age=9; Path=/; HttpOnly; SameSite=Strict"),
        (
            THERE,
            "192.0.2.1",
            b"__Host-rdev_session=t; Max-Age=9; Path=/; HttpOnly; SameSite=Strict; Secure",
        ),
    ],
)
def test_a_cookie_is_narrow(origin: Origin, client_ip: str, cookie: bytes) -> None:
    assert session_cookie("t", origin, client_ip, good_for_s=9) == (b"set-cookie", cookie)
    assert b"=; Max-Age=0; Path=/" in forgotten(origin, client_ip)[1]


@pytest.mark.parametrize(
    ("origin", "client_ip"),
    [
        (THERE, "127.0.0.1"),
        (Origin(scheme="https", host="localhost"), "127.0.0.1"),
        # Plain http from elsewhere: a browser keeps no Secure cookie of it, and that is meant.
        (Origin(scheme="http", host="rdev.example"), "127.0.0.1"),
        (HERE, "192.0.2.1"),
        (HERE, "no address"),
    ],
)
def test_it_is_secure_unless_all_of_it_is_loopback_http(origin: Origin, client_ip: str) -> None:
    assert session_cookie("t", origin, client_ip, good_for_s=9)[1].endswith(b"; Secure")


@pytest.mark.parametrize(
    ("cookies", "found"),
    [
        (["rdev_session=t"], "t"),
        (["a=b; rdev_session=t;c=d"], "t"),
        (["a=b", "rdev_session=t"], "t"),
        (["rdev_session=a=b"], "a=b"),
        (["rdev_session="], None),
        (["Xrdev_session=t", "__Host-rdev_session=u", "rdev_session"], None),
        ([], None),
    ],
)
def test_a_session_is_read_under_the_name_it_has_here(
    cookies: list[str], found: str | None
) -> None:
    headers = [(b"cookie", cookie.encode()) for cookie in cookies]
    assert session_in(headers, HERE, "127.0.0.1") == found


def test_a_secure_origin_reads_no_cookie_that_a_neighbour_could_set() -> None:
    headers = [(b"cookie", b"rdev_session=tossed; __Host-rdev_session=own")]
    assert session_in(headers, THERE, "192.0.2.1") == "own"
    assert session_in([(b"cookie", b"rdev_session=x")], THERE, "192.0.2.1") is None
