"""What an outcome says about itself."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from rdev.domain.sending import Outcome, SendFault

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def outcome(**parts):
    given = {
        "status": None,
        "fault": None,
        "detail": "",
        "latency_s": 0.1,
        "request_headers": {},
        "body": b"",
        "truncated": False,
        "http_version": None,
        "retry_after": None,
    }
    return Outcome(**(given | parts))


@pytest.mark.parametrize(
    ("status", "accepted", "gone"),
    [(None, False, False), (199, False, False), (200, True, False), (299, True, False)]
    + [(status, False, status == 410) for status in (300, 302, 400, 410, 429, 500, 599)],
)
def test_the_status_alone_says_whether_it_was_accepted(status, accepted, gone) -> None:
    cut = outcome(status=status, fault=SendFault.CUT)

    assert (cut.is_accepted, cut.is_gone) == (accepted, gone)


@pytest.mark.parametrize(
    ("text", "wait_s"),
    [
        (None, None),
        ("", None),
        ("0", 0),
        ("120", 120),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("9" * 10, None),
        ("Sun, 22 Nov 2026 12:01:30 GMT", 90),
        ("Sun, 22 Nov 2026 12:01:30 -0000", 90),
        ("Sun, 22 Nov 2026 13:01:30 +0100", 90),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0),
        ("Sun, 99 Nov 2026 11:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text, wait_s) -> None:
    assert outcome(retry_after=text).retry_after_s(NOW) == wait_s
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5)))
    assert outcome(retry_after=text).retry_after_s(elsewhere) == wait_s
