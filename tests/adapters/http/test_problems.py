"""The table of statuses and the document."""

import json
from datetime import UTC, datetime

import pytest

from rdev.adapters.http.problems import STATUS, of_http, problem
from rdev.domain.errors import ErrorCode, RdevError

NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)


def test_every_code_has_exactly_one_status():
    assert set(STATUS) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_the_headers_are_those_the_status_demands(code):
    found = problem(RdevError(code, "no"), request_id="r", instance="/", now=NOON)
    names = {name for name, _ in found.headers}

    assert ("WWW-Authenticate" in names) == (found.status == 401)
    assert ("Retry-After" in names) == (found.status in (429, 503))


@pytest.mark.parametrize(("wait_s", "told"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (7.01, "8")])
def test_a_wait_is_told_in_whole_seconds_never_too_few(wait_s, told):
    error = RdevError(ErrorCode.CONFLICT, "busy", retry_after_s=wait_s)

    assert ("Retry-After", told) in problem(error, request_id="r", instance="/", now=NOON).headers


def test_details_never_replace_a_standard_member():
    error = RdevError(ErrorCode.GONE, "gone", details={"error": "x", "meta": "y", "oldest_seq": 3})

    body = json.loads(problem(error, request_id="r", instance="/", now=NOON).body)

    assert body["oldest_seq"] == 3
    assert body["error"]["code"] == "GONE"
    assert body["meta"]["request_id"] == "r"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, ErrorCode.BAD_REQUEST),
        (404, ErrorCode.NOT_FOUND),
        (405, ErrorCode.BAD_REQUEST),
        (408, ErrorCode.BAD_REQUEST),
        (413, ErrorCode.PAYLOAD_TOO_LARGE),
        (415, ErrorCode.UNSUPPORTED_MEDIA_TYPE),
        (500, ErrorCode.INTERNAL_ERROR),
    ],
)
def test_what_http_decides_has_a_code_of_the_contract(status, code):
    assert of_http(status, "no").code is code
