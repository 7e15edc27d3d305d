"""What follows from an attempt, and the settings of the schedule."""

from datetime import UTC, datetime
from uuid import UUID

import pytest

from rdev.domain.deliveries import (
    RETRY_AFTER_MAX_S,
    SCHEDULE_S,
    DeadReason,
    DeliveryLease,
    DeliveryStatus,
    Owed,
    Verdict,
    judge,
    parse_schedule,
)
from rdev.domain.sending import Outcome, SendFault
from rdev.domain.webhooks import webhook_id

NOW = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)


def verdict(
    status: int | None, *, failures: int = 0, retry_after: str | None = None, random: float = 0.5
) -> Verdict:
    owed = Owed(
        lease=DeliveryLease(delivery=UUID(int=1), id=1),
        webhook=webhook_id(UUID(int=2)),
        event="evt_1",
        attempt=failures + 1,
        failures=failures,
        is_ordered=False,
        is_trusted=True,
        is_allowed=True,
        url="https://a.example/",
        payload=b"{}",
        secrets=(b"",),
    )
    outcome = Outcome(
        status=status,
        fault=None if status else SendFault.CUT,
        detail="",
        latency_s=0,
        request_headers={},
        body=b"",
        truncated=False,
        http_version=None,
        retry_after=retry_after,
    )
    return judge(owed, outcome, schedule_s=SCHEDULE_S, now=NOW, random=lambda: random)


@pytest.mark.parametrize("status", [200, 202, 204, 299])
def test_2xx_is_delivered(status: int) -> None:
    assert verdict(status) == Verdict(status=DeliveryStatus.DELIVERED)


def test_410_is_dead_at_once() -> None:
    assert verdict(410) == Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)


@pytest.mark.parametrize("status", [None, 301, 400, 404, 429, 500])
def test_anything_else_comes_again(status: int | None) -> None:
    assert verdict(status) == Verdict(status=DeliveryStatus.PENDING, again_in_s=SCHEDULE_S[0])


@pytest.mark.parametrize("failures", range(len(SCHEDULE_S)))
def test_each_failure_has_its_pause_give_or_take_a_fifth(failures: int) -> None:
    step_s = SCHEDULE_S[failures]
    for random, factor in ((0.0, 0.8), (0.5, 1.0), (0.999_999, 1.2)):
        again_in_s = verdict(500, failures=failures, random=random).again_in_s
        assert again_in_s == pytest.approx(step_s * factor, rel=1e-4)


def test_after_the_last_pause_it_is_dead() -> None:
    assert verdict(500, failures=len(SCHEDULE_S)).reason is DeadReason.EXHAUSTED


@pytest.mark.parametrize(
    ("retry_after", "again_in_s"),
    [
        ("100", 100),
        ("1", SCHEDULE_S[0]),
        ("999999999", RETRY_AFTER_MAX_S),
        ("Thu, 15 Jan 2026 10:31:00 GMT", 60),
        ("soon", SCHEDULE_S[0]),
        # Numbers that no clock has.
        ("21 Oct 2015 07:28:00 +99999999999999999", SCHEDULE_S[0]),
        ("21 Oct 2015 07:28:00 +03333333333100", SCHEDULE_S[0]),
        ("2111111 Oct 2015 07:299999999998:0100", SCHEDULE_S[0]),
        ("Wed, 21 Oct 11111111120111111111115 07:28:00 GMT", SCHEDULE_S[0]),
    ],
)
def test_retry_after_makes_it_later_and_never_earlier(retry_after: str, again_in_s: float) -> None:
    assert verdict(503, retry_after=retry_after).again_in_s == again_in_s


def test_a_schedule_is_seconds_with_commas() -> None:
    assert parse_schedule("5, 30,0.5") == (5, 30, 0.5)


@pytest.mark.parametrize("text", ["", "5,", "x", "0", "-1", "nan", "1e9", ",".join(["1"] * 31)])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_schedule(text)
