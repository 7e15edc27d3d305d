"""The bodies of the key routes, each field at its edges."""

from ipaddress import ip_network

import pytest

from rdev.domain.errors import RdevError
from rdev.domain.key_requests import (
    EXPIRES_IN_MAX_S,
    GRACE_DEFAULT_S,
    GRACE_MAX_S,
    KeyRequest,
    parse_key,
    parse_rotation,
)
from rdev.domain.keys import Scope
from rdev.domain.limiter import RateLimit

BODY = {"name": "ci", "scopes": ["projects:read"]}


def parsed(**fields: object) -> KeyRequest:
    return parse_key({**BODY, **fields})


def pointers(**fields: object) -> list[str]:
    with pytest.raises(RdevError) as caught:
        parsed(**fields)
    return [fault.pointer for fault in caught.value.faults]


def test_the_least_body_is_a_name_and_a_scope() -> None:
    assert parsed() == KeyRequest(
        name="ci",
        scopes=frozenset({Scope.PROJECTS_READ}),
        project_ids=None,
        allowed_ips=None,
        expires_in_s=90 * 86_400,
        is_end_given=False,
        rate_limit=None,
    )


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("30d", 30 * 86_400),
        ("60d", 60 * 86_400),
        ("90d", 90 * 86_400),
        ("1y", 365 * 86_400),
        ("never", None),
        (1, 1),
        (EXPIRES_IN_MAX_S, EXPIRES_IN_MAX_S),
    ],
)
def test_the_end_is_a_name_or_seconds(given: object, seconds: int | None) -> None:
    found = parsed(expires_in=given)
    assert (found.expires_in_s, found.is_end_given) == (seconds, True)


@pytest.mark.parametrize("given", ["31d", "", "30", 0, -1, EXPIRES_IN_MAX_S + 1, 1.5, True, [], {}])
def test_another_end_is_refused(given: object) -> None:
    assert pointers(expires_in=given) == ["/expires_in"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["10.0.0.0/8"], ["10.0.0.0/8"]),
        (["10.0.0.1"], ["10.0.0.1/32"]),
        (["::1", "2001:db8::/32"], ["::1/128", "2001:db8::/32"]),
        (["::ffff:10.0.0.0/104"], ["10.0.0.0/8"]),
        (["10.0.0.0/9", "10.128.0.0/9"], ["10.0.0.0/8"]),
        ([], []),
    ],
)
def test_addresses_are_networks_in_one_form(given: list[str], kept: list[str]) -> None:
    assert parsed(allowed_ips=given).allowed_ips == tuple(ip_network(text) for text in kept)


@pytest.mark.parametrize("given", ["10.0.0.1/8", "x", "", "10.0.0.0/33", "1.2.3", "::1%lo"])
def test_what_is_no_network_is_refused_where_it_stands(given: str) -> None:
    assert pointers(allowed_ips=["10.0.0.0/8", given]) == ["/allowed_ips/1"]


def test_every_fault_is_told_with_its_pointer() -> None:
    found = pointers(
        name="",
        scopes=["projects:read", "nope"],
        project_ids=["ok", "NOT"],
        rate_limit={"requests": 0, "other": 1},
        expires_in="x",
        more=1,
    )
    assert sorted(found) == [
        "/expires_in",
        "/more",
        "/name",
        "/project_ids/1",
        "/rate_limit/other",
        "/rate_limit/requests",
        "/rate_limit/window_s",
        "/scopes/1",
    ]


@pytest.mark.parametrize("field", ["scopes", "project_ids"])
def test_an_empty_list_is_no_right_at_all(field: str) -> None:
    assert pointers(**{field: []}) == [f"/{field}"]


def test_a_rate_is_requests_within_a_window() -> None:
    rate = parsed(rate_limit={"requests": 10, "window_s": 60}).rate_limit
    assert rate == RateLimit(requests=10, window_s=60)


def test_the_grace_of_a_rotation() -> None:
    assert parse_rotation({}) == GRACE_DEFAULT_S
    assert parse_rotation({"grace_s": 0}) == 0
    assert parse_rotation({"grace_s": GRACE_MAX_S}) == GRACE_MAX_S
    for body in ({"grace_s": GRACE_MAX_S + 1}, {"grace_s": "1"}, {"other": 1}):
        with pytest.raises(RdevError):
            parse_rotation(body)
