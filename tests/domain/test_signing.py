"""Signatures of webhooks, against the specification's vectors and its published Python library."""

import base64
import json
import time

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.signing import Secret, parse_secret, redacted, sign, verify

# The vector that the reference libraries share.
VECTOR_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
VECTOR_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
VECTOR_TIME_S = 1_614_265_330
VECTOR_BODY = b'{"test": 2432232314}'
VECTOR_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

secrets = st.binary(min_size=24, max_size=64).map(lambda key: Secret(key=key))
ids = st.from_regex(r"[!-\-/-~]{1,64}", fullmatch=True)
times_s = st.integers(0, 10**11)
bodies = st.binary(max_size=300)


def refusal(headers, body, verifiers, **options):
    options.setdefault("now_s", VECTOR_TIME_S)
    with pytest.raises(RdevError) as caught:
        verify(headers, body, verifiers, **options)
    return caught.value.code


def test_the_vector_of_the_specification_is_signed_exactly() -> None:
    headers = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [parse_secret(VECTOR_SECRET)])

    assert headers == {
        "webhook-id": VECTOR_ID,
        "webhook-timestamp": str(VECTOR_TIME_S),
        "webhook-signature": VECTOR_SIGNATURE,
    }


@given(secrets, ids, times_s, bodies)
def test_what_is_signed_verifies(secret, message_id, time_s, body) -> None:
    headers = sign(message_id, time_s, body, [secret])

    assert verify(headers, body, [secret], now_s=time_s) == message_id


@given(secrets, ids, times_s, bodies, bodies)
def test_another_body_is_refused(secret, message_id, time_s, body, other) -> None:
    headers = sign(message_id, time_s, body, [secret])

    if body != other:
        assert refusal(headers, other, [secret], now_s=time_s) == ErrorCode.UNAUTHORIZED


@given(secrets, secrets, ids, bodies)
def test_another_secret_is_refused(secret, other, message_id, body) -> None:
    headers = sign(message_id, VECTOR_TIME_S, body, [secret])

    # HMAC pads its key with zeros: keys that differ in trailing zeros only are one.
    if secret.key.rstrip(b"\0") != other.key.rstrip(b"\0"):
        assert refusal(headers, body, [other]) == ErrorCode.UNAUTHORIZED


@pytest.mark.parametrize("header", ["webhook-id", "webhook-timestamp"])
def test_what_stands_in_a_header_is_signed_too(header) -> None:
    secret = parse_secret(VECTOR_SECRET)
    headers = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [secret])
    changed = headers | {header: {"webhook-id": "evt_1", "webhook-timestamp": "1614265331"}[header]}

    assert refusal(changed, VECTOR_BODY, [secret]) == ErrorCode.UNAUTHORIZED


def test_while_a_secret_is_rotated_either_one_verifies() -> None:
    new, old, foreign = (Secret(key=letter * 32) for letter in (b"n", b"o", b"f"))
    headers = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [new, old])

    assert headers["webhook-signature"].count(" ") == 1
    for held in ([new], [old], [foreign, old]):
        assert verify(headers, VECTOR_BODY, held, now_s=VECTOR_TIME_S) == VECTOR_ID
    assert refusal(headers, VECTOR_BODY, [foreign]) == ErrorCode.UNAUTHORIZED


@pytest.mark.parametrize("away_s", [-301, -300, 300, 301])
def test_a_timestamp_is_taken_within_five_minutes_of_now(away_s) -> None:
    secret = parse_secret(VECTOR_SECRET)
    headers = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [secret])
    now_s = VECTOR_TIME_S + away_s

    if abs(away_s) > 300:
        assert refusal(headers, VECTOR_BODY, [secret], now_s=now_s) == ErrorCode.UNAUTHORIZED
    else:
        assert verify(headers, VECTOR_BODY, [secret], now_s=now_s) == VECTOR_ID
    assert verify(headers, VECTOR_BODY, [secret], now_s=now_s, tolerance_s=400) == VECTOR_ID


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"webhook-id": ""},
        {"webhook-id": "a.b"},
        {"webhook-id": "a b"},
        {"webhook-id": "ä"},
        {"webhook-timestamp": ""},
        {"webhook-timestamp": "-1"},
        {"webhook-timestamp": "1614265330.0"},
        {"webhook-timestamp": "١٦١٤"},
        {"webhook-signature": ""},
    ],
)
def test_missing_and_malformed_headers_are_told_as_such(headers) -> None:
    secret = parse_secret(VECTOR_SECRET)
    whole = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [secret])

    given_headers = whole | headers if headers else {}
    assert refusal(given_headers, VECTOR_BODY, [secret]) == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize(
    "signature",
    [
        VECTOR_SIGNATURE.replace("v1,", "v2,"),
        VECTOR_SIGNATURE.removeprefix("v1,"),
        VECTOR_SIGNATURE.removesuffix("="),
        VECTOR_SIGNATURE + ",x",
        "v1,",
        "v1,ä",
        "v1a," + VECTOR_SIGNATURE.removeprefix("v1,"),
        " ".join(["v1,AAAA"] * 16 + [VECTOR_SIGNATURE]),
    ],
)
def test_a_signature_of_another_form_is_none(signature) -> None:
    secret = parse_secret(VECTOR_SECRET)
    headers = sign(VECTOR_ID, VECTOR_TIME_S, VECTOR_BODY, [secret])

    changed = headers | {"webhook-signature": signature}
    assert refusal(changed, VECTOR_BODY, [secret]) == ErrorCode.UNAUTHORIZED


def test_unknown_schemes_are_passed_over_and_names_come_in_any_case() -> None:
    headers = {
        "Webhook-Id": VECTOR_ID,
        "WEBHOOK-TIMESTAMP": str(VECTOR_TIME_S),
        "webhook-Signature": f"v9,abc v1a,AAAA {VECTOR_SIGNATURE}",
    }

    secret = parse_secret(VECTOR_SECRET)
    assert verify(headers, VECTOR_BODY, [secret], now_s=VECTOR_TIME_S) == VECTOR_ID


@given(secrets)
def test_a_secret_is_the_same_after_its_text(secret) -> None:
    assert secret.text.startswith("whsec_")
    assert parse_secret(secret.text) == secret
    assert parse_secret(secret.text.removeprefix("whsec_")) == secret
    assert repr(secret) == "Secret()"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        "whsec_%",
        "whsec_ä",
        "whsk_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        "whsec_" + base64.b64encode(bytes(25)).decode().rstrip("="),
    ],
)
def test_a_text_that_is_no_secret_is_refused_and_not_repeated(text) -> None:
    with pytest.raises(RdevError) as caught:
        parse_secret(text)

    assert caught.value.code == ErrorCode.BAD_REQUEST
    assert not text or text not in str(caught.value) or text == "whsec_"


def test_a_secret_of_another_length_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="24 to 64"):
        Secret(key=bytes(23))


@pytest.mark.parametrize(
    ("message_id", "time_s", "signers"),
    [
        ("a.b", 1, 1),
        ("", 1, 1),
        ("a\n", 1, 1),
        ("a" * 256, 1, 1),
        ("evt_1", -1, 1),
        ("evt_1", 1, 0),
    ],
)
def test_what_no_receiver_could_verify_is_not_signed(message_id, time_s, signers) -> None:
    with pytest.raises(ValueError, match="needs an id"):
        sign(message_id, time_s, b"", [Secret(key=bytes(32))] * signers)


def test_a_stored_signature_tells_its_scheme_only() -> None:
    headers = {"Webhook-Signature": f"{VECTOR_SIGNATURE} v1a,abc", "webhook-id": VECTOR_ID}

    assert redacted(headers) == {
        "Webhook-Signature": "v1,[redacted] v1a,[redacted]",
        "webhook-id": VECTOR_ID,
    }


@given(secrets, ids, st.dictionaries(st.text(max_size=9), st.text(max_size=9)))
def test_the_published_python_library_accepts_what_is_signed(secret, message_id, payload) -> None:
    body = json.dumps(payload)
    headers = sign(message_id, int(time.time()), body.encode(), [Secret(key=bytes(24)), secret])

    assert standardwebhooks.Webhook(secret.text).verify(body, headers) == payload


def test_the_published_python_library_refuses_what_another_secret_signed() -> None:
    headers = sign("evt_1", int(time.time()), b"{}", [Secret(key=bytes(24))])

    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(VECTOR_SECRET).verify("{}", headers)
