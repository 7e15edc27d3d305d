"""Whatever stands between rdev and the API server may answer anything: an error, no defect."""

import pytest

from rdev.adapters.kubernetes.errors import refusal, translated
from rdev.domain.errors import ErrorCode, RdevError


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad Gateway</html>",
        b'{"message": 1}',
        b'{"message": "nicht verf\xfcgbar"}',
        b'{"x":' * 5_000,
        b'{"details": {"retryAfterSeconds": "soon"}}',
    ],
)
def test_a_page_that_is_no_status_is_a_refusal_without_words(body: bytes) -> None:
    error = refusal(503, body)
    assert (error.code, error.retry_after_s) == (ErrorCode.SERVICE_UNAVAILABLE, None)
    assert error.message == "kubernetes answers 503: no reason given"


@pytest.mark.parametrize(
    ("body", "header", "waits_s"),
    [
        (b"", "7", 7.0),
        (b"", "Wed, 21 Oct 2026 07:28:00 GMT", None),
        (b"", "\N{SUPERSCRIPT TWO}", None),
        (b"", "9" * 400, 3600.0),
        (b'{"details": {"retryAfterSeconds": 2}}', "7", 2.0),
        (b'{"details": {"retryAfterSeconds": -7}}', None, 0.0),
        (b'{"details": {"retryAfterSeconds": 1e300}}', None, 3600.0),
    ],
)
def test_a_pause_that_is_asked_for_is_a_number_of_seconds_within_an_hour(
    body: bytes, header: str | None, waits_s: float | None
) -> None:
    assert refusal(429, body, header).retry_after_s == waits_s


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), UnicodeDecodeError("utf-8", b"", 0, 1, "")]
)
def test_an_answer_that_cannot_be_read_is_an_error_of_the_api_server(error: Exception) -> None:
    with pytest.raises(RdevError) as caught, translated():
        raise error
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
