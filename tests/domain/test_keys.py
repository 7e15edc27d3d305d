"""What a key may do, who may grant what, and how a credential stands."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.keys import (
    ADMIN,
    Grant,
    KeyEnd,
    Scope,
    Standing,
    check_addresses,
    check_covers,
    check_end,
    check_projects,
    check_scopes,
    standing_of,
)

A, B = ProjectId("a"), ProjectId("b")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SCOPES = st.frozensets(st.sampled_from(Scope))
PROJECTS = st.none() | st.frozensets(st.sampled_from([A, B, ProjectId("c")]), min_size=1)
NETWORKS = st.lists(
    st.sampled_from(
        ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "2001:db8::/32", "::/0"]
    ).map(ip_network),
    unique=True,
).map(tuple)
ENDS = st.none() | st.integers(0, 3).map(lambda days: NOON + timedelta(days=days))
GRANTS = st.builds(
    Grant, scopes=SCOPES, project_ids=PROJECTS, allowed_ips=NETWORKS, expires_at=ENDS
)
SAMPLES = [ip_address(a) for a in ("10.0.0.1", "10.1.0.1", "10.1.2.3", "8.8.8.8", "2001:db8::1")]


@pytest.mark.parametrize("scope", Scope)
def test_admin_holds_every_scope(scope: Scope) -> None:
    assert ADMIN.may(scope)
    assert ADMIN.may(scope, A)


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not Scope.ADMIN])
def test_any_other_scope_holds_itself_alone(scope: Scope) -> None:
    grant = Grant(scopes=frozenset({scope}))
    assert [other for other in Scope if grant.may(other)] == [scope]


def test_a_scope_holds_for_the_projects_of_the_key() -> None:
    grant = Grant(scopes=frozenset({Scope.PROJECTS_READ}), project_ids=frozenset({A}))
    assert grant.may(Scope.PROJECTS_READ, A)
    assert not grant.may(Scope.PROJECTS_READ, B)
    assert not grant.may(Scope.PROJECTS_WRITE, A)


def test_a_key_is_good_from_its_addresses() -> None:
    grant = Grant(scopes=frozenset(), allowed_ips=(ip_network("10.0.0.0/8"), ip_network("::1/128")))
    assert [grant.admits(a) for a in ("10.9.9.9", "::1", "11.0.0.1", "::2")] == [
        True,
        True,
        False,
        False,
    ]
    assert Grant(scopes=frozenset()).admits("8.8.8.8")


def is_within(held: Grant, wanted: Grant) -> bool:
    """Whether everything that `wanted` allows is allowed by `held`, asked one by one."""
    scopes = all(held.may(scope) for scope in Scope if wanted.may(scope))
    projects = all(held.sees(p) for p in (A, B, ProjectId("c"), ProjectId("z")) if wanted.sees(p))
    addresses = all(held.admits(str(a)) for a in SAMPLES if wanted.admits(str(a)))
    ends = held.expires_at is None or (
        wanted.expires_at is not None and wanted.expires_at <= held.expires_at
    )
    return scopes and projects and addresses and ends


@given(GRANTS, GRANTS)
def test_what_may_be_granted_is_never_more_than_what_is_held(held: Grant, wanted: Grant) -> None:
    with suppress(RdevError):
        check_covers(held, wanted)
        assert is_within(held, wanted)


@given(GRANTS)
def test_a_key_may_grant_exactly_what_it_holds(grant: Grant) -> None:
    check_covers(grant, grant)
    check_covers(ADMIN.grant, grant)


def test_a_refusal_names_what_is_not_held() -> None:
    held = Grant(
        scopes=frozenset({Scope.KEYS_WRITE}),
        project_ids=frozenset({A}),
        allowed_ips=(ip_network("10.0.0.0/8"),),
        expires_at=NOON,
    )
    for check, named in [
        (lambda: check_scopes(held, {Scope.AUDIT_READ, Scope.KEYS_WRITE}), "audit:read"),
        (lambda: check_projects(held, frozenset({A, B})), "projects b"),
        (lambda: check_projects(held, None), "all projects"),
        (lambda: check_addresses(held, [ip_network("0.0.0.0/0")]), "0.0.0.0/0"),
        (lambda: check_addresses(held, []), "every address"),
        (lambda: check_end(held, None), "its own end"),
        (lambda: check_end(held, NOON + timedelta(seconds=1)), "its own end"),
    ]:
        with pytest.raises(RdevError) as caught:
            check()
        assert caught.value.code is ErrorCode.FORBIDDEN
        assert named in caught.value.message


LEFT = st.none() | st.floats(-10, 10)


@given(st.booleans(), LEFT, LEFT)
def test_a_credential_stands_until_the_first_of_its_ends(
    is_revoked: bool, expires_in_s: float | None, replaced_in_s: float | None
) -> None:
    found = standing_of(
        is_revoked=is_revoked, expires_in_s=expires_in_s, replaced_in_s=replaced_in_s
    )
    ends = [s for s in (expires_in_s, replaced_in_s) if s is not None]
    has_ended = is_revoked or any(s <= 0 for s in ends)
    assert (found.ended is not None) == has_ended
    if not has_ended:
        assert found.good_for_s == min(ends, default=None)


def test_the_end_says_which_one_it_was() -> None:
    assert standing_of(is_revoked=True, expires_in_s=-1, replaced_in_s=None) == Standing(
        ended=KeyEnd.REVOKED
    )
    assert standing_of(is_revoked=False, expires_in_s=0, replaced_in_s=None) == Standing(
        ended=KeyEnd.EXPIRED
    )
    assert standing_of(is_revoked=False, expires_in_s=9, replaced_in_s=0) == Standing(
        ended=KeyEnd.REVOKED
    )
    assert standing_of(is_revoked=False, expires_in_s=9, replaced_in_s=5) == Standing(
        good_for_s=5, ends_as=KeyEnd.REVOKED
    )
    assert standing_of(is_revoked=False, expires_in_s=5, replaced_in_s=9) == Standing(
        good_for_s=5, ends_as=KeyEnd.EXPIRED
    )
