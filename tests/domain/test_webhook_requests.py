"""The bodies of the webhook routes, and what a key may ask for."""

from datetime import UTC, datetime

import pytest

from rdev.domain.deliveries import DeliveryStatus
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.keys import Grant, Scope
from rdev.domain.webhook_requests import (
    parse_redeliver,
    parse_rotation,
    parse_webhook,
    parse_webhook_change,
)
from rdev.domain.webhooks import EventType, is_visible, projects_for

BODY = {"url": "https://a.example/", "events": ["command.failed"]}
A, B = ProjectId("a"), ProjectId("b")
READ = frozenset({Scope.PROJECTS_READ, Scope.WEBHOOKS_WRITE})


def pointers(body: dict[str, object]) -> list[str]:
    with pytest.raises(RdevError) as caught:
        parse_webhook(body)
    return [fault.pointer for fault in caught.value.faults]


def test_the_least_body_is_a_url_and_an_event() -> None:
    found = parse_webhook(BODY)
    assert (found.events, found.project_ids, found.names_projects) == (
        (EventType.COMMAND_FAILED,),
        None,
        False,
    )
    assert sorted(pointers({})) == ["/events", "/url"]


def test_a_star_is_every_type() -> None:
    found = parse_webhook(BODY | {"events": ["*", "ping"]})
    assert found.events == tuple(EventType)


@pytest.mark.parametrize(
    ("field", "value", "pointer"),
    [
        ("url", 1, "/url"),
        ("url", "x" * 3_000, "/url"),
        ("events", [], "/events"),
        ("events", ["command.done"], "/events/0"),
        ("project_ids", [], "/project_ids"),
        ("project_ids", ["A b"], "/project_ids/0"),
        ("enabled", 0, "/enabled"),
        ("ordered", "yes", "/ordered"),
        ("description", "x" * 501, "/description"),
        ("secret", "whsec_", "/secret"),
    ],
)
def test_each_field_has_its_edges(field: str, value: object, pointer: str) -> None:
    assert pointers(BODY | {field: value}) == [pointer]


def test_a_change_names_what_it_changes() -> None:
    found = parse_webhook_change({"project_ids": None, "description": None})
    assert (found.names_projects, found.project_ids, found.description) == (True, None, "")
    assert (found.url, found.events, found.is_enabled) == (None, None, None)


def test_a_range_begins_at_a_time_with_a_zone() -> None:
    found = parse_redeliver({"since": "2026-01-15T11:30:00+01:00"})
    assert found.since == datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
    assert found.status is DeliveryStatus.DEAD
    assert parse_redeliver({"since": "2026-01-15T10:30:00Z", "status": "all"}).status is None
    for since in (None, "yesterday", "2026-01-15T10:30:00", "0001-01-01T00:00:00+14:00"):
        with pytest.raises(RdevError):
            parse_redeliver({"since": since})


def test_a_rotation_has_a_day_of_grace_unless_told() -> None:
    assert parse_rotation({}) == 86_400
    assert parse_rotation({"grace_s": 0}) == 0
    with pytest.raises(RdevError):
        parse_rotation({"grace_s": -1})


def test_a_key_is_told_of_what_it_sees() -> None:
    every = Grant(scopes=READ)
    some = Grant(scopes=READ, project_ids=frozenset({A}))
    events = [EventType.COMMAND_FAILED]
    assert projects_for(every, None, events) is None
    assert projects_for(some, None, events) == {A}
    assert projects_for(some, frozenset({A}), events) == {A}
    with pytest.raises(RdevError) as caught:
        projects_for(some, frozenset({A, B}), events)
    assert caught.value.code is ErrorCode.FORBIDDEN


def test_who_may_read_no_command_is_told_of_none() -> None:
    blind = Grant(scopes=frozenset({Scope.WEBHOOKS_WRITE}))
    assert projects_for(blind, None, [EventType.ENDPOINT_DISABLED, EventType.PING]) is None
    for event in (EventType.COMMAND_QUEUED, EventType.PROJECT_STATUS):
        with pytest.raises(RdevError):
            projects_for(blind, None, [event])
    assert projects_for(Grant(scopes=frozenset({Scope.ADMIN})), None, list(EventType)) is None


def test_an_endpoint_is_visible_to_who_sees_all_of_its_projects() -> None:
    some = Grant(scopes=READ, project_ids=frozenset({A}))
    assert is_visible(some, frozenset({A}))
    assert not is_visible(some, frozenset({A, B}))
    assert not is_visible(some, None)
    assert is_visible(Grant(scopes=READ), None)
