"""What the dispatcher sends over the wire, before the published libraries of two languages."""

import base64
import json
from datetime import UTC, datetime

import pytest
import trio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook

from rdev.adapters.webhooks.ed25519 import PrivateKey
from rdev.adapters.webhooks.sealing import AesGcmBox
from rdev.domain.backoff import Backoff
from rdev.domain.errors import RdevError
from rdev.domain.signing import Secret, SignatureScheme
from rdev.ports.telemetry import Silence
from rdev.services.webhook_dispatcher import DispatcherLimits, WebhookDispatcher
from tests.adapters.webhooks.test_foreign_judges import judged
from tests.fakes.deliveries import FakeDeliveries

PAYLOADS = [
    b'{"type": "ping"}',
    json.dumps({"type": "command.failed", "data": {"reason": "ü→🙂", "n": [1.5, None]}}).encode(),
    b'{"type": "x", "data": "' + b"y" * 19_000 + b'"}',
]


@pytest.fixture(params=["v1 v1", "v1a v1", "v1 v1a"])
def schemes(request):
    """Of an endpoint's key, and of the one before."""
    return [SignatureScheme(one) for one in request.param.split()]


@pytest.fixture
async def sent(receive, sender_of, nursery, schemes):
    """What a receiver got of each payload (headers, body); what verifies, the newest first."""
    receiver = await receive(b"HTTP/1.1 204 No Content\r\n\r\n")
    queue, box = FakeDeliveries(), AesGcmBox(bytes(range(32)))
    webhook = queue.endpoint(receiver.url())
    fresh, before = (box.make(scheme, of=webhook) for scheme in schemes)
    queue.endpoints[webhook].secret = fresh.key.sealed
    queue.endpoints[webhook].previous_secret = before.key.sealed
    dispatcher = WebhookDispatcher(
        queue=queue,
        sender=sender_of(),
        box=box,
        telemetry=Silence(),
        backoff=lambda: Backoff(random=lambda: 0.5),
        now=lambda: datetime.now(UTC),
        wake_replicas=lambda: None,
        holder="one",
        limits=DispatcherLimits(),
    )
    rows = [queue.owe(webhook, payload=payload)[0] for payload in PAYLOADS]
    await nursery.start(dispatcher.run)
    with trio.fail_after(60):
        while not all(row.status == "delivered" for row in rows):
            await trio.sleep(0.01)
    dispatcher.stop()
    held = [one.secret or one.key.public_key for one in (fresh, before)]
    return held, [_read(raw) for raw in receiver.requests]


def _read(raw: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


async def test_the_published_python_library_accepts_what_is_dispatched(sent) -> None:
    """It knows v1 alone, and passes over what is signed beside it."""
    held, requests = sent
    assert sorted(body for _, body in requests) == sorted(PAYLOADS)
    for headers, body in requests:
        for text in held:
            if text.startswith("whsec_"):
                assert Webhook(text).verify(body, headers) == json.loads(body)


async def test_whoever_reads_the_specification_accepts_what_is_dispatched_with_v1a(
    sent, schemes
) -> None:
    """By its words alone: base64 behind `whpk_` and `v1a,`, and what stands between the dots."""
    held, requests = sent
    for headers, body in requests:
        signatures = [one.split(",", 1) for one in headers["webhook-signature"].split(" ")]
        assert [scheme for scheme, _ in signatures] == schemes
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        for text, (scheme, signature) in zip(held, signatures, strict=True):
            if scheme == "v1a":
                raw = base64.b64decode(text.removeprefix("whpk_"), validate=True)
                key = Ed25519PublicKey.from_public_bytes(raw)
                key.verify(base64.b64decode(signature, validate=True), content)
                with pytest.raises(InvalidSignature):
                    key.verify(base64.b64decode(signature), content + b" ")


@pytest.mark.slow
async def test_the_published_javascript_library_accepts_what_is_dispatched(
    sent, node_folder
) -> None:
    held, requests = sent
    asked = [
        {
            "secret": text,
            "headers": {name: headers[name] for name in headers if name.startswith("webhook-")},
            "body": body.decode(),
        }
        for headers, body in requests
        for text in held
    ]
    assert await trio.to_thread.run_sync(judged, node_folder, asked) == [True] * 2 * len(PAYLOADS)


@pytest.mark.parametrize("scheme", SignatureScheme)
def test_a_sealed_secret_opens_for_its_endpoint_and_its_server_only(scheme) -> None:
    box = AesGcmBox(bytes(range(32)))
    key = bytes(range(100, 132))
    sealed = box.seal(key, scheme=scheme, of="whk_1")
    signer = box.open(sealed, of="whk_1")
    signs = Secret(key=key) if scheme == "v1" else PrivateKey(key)
    assert (signer.scheme, signer.sign(b"x")) == (scheme, signs.sign(b"x"))
    assert key not in sealed
    assert box.seal(key, scheme=scheme, of="whk_1") != sealed
    for other, of in ((box, "whk_2"), (AesGcmBox(bytes(32)), "whk_1")):
        with pytest.raises(RdevError, match="RDEV_SECRET_FILE"):
            other.open(sealed, of=of)
    # Among them: what was sealed for one scheme signs with no other, whoever turns its byte.
    for broken in (b"", sealed[:-1], sealed[:5], *(bytes([n]) + sealed[1:] for n in (0, 1, 2, 3))):
        if broken != sealed:
            with pytest.raises(RdevError):
                box.open(broken, of="whk_1")


def test_what_was_sealed_before_there_was_another_scheme_opens() -> None:
    sealed = bytes.fromhex(
        "01000102030405060708090a0b"
        "b09e1fd8f8239496fbea0614bf100b842328f989592b67e0"
        "d5b7c9e211500be5f248f84ecc53379aace55fcadd155ae2"
    )
    assert AesGcmBox(bytes(range(32))).open(sealed, of="whk_1").scheme == "v1"


def test_a_fresh_key_shows_what_its_receiver_needs_and_nothing_else() -> None:
    box = AesGcmBox(bytes(range(32)), random_bytes=bytes)
    secret = box.make(SignatureScheme.V1, of="whk_1")
    assert (secret.secret, secret.key.public_key) == (Secret(key=bytes(32)).text, None)
    pair = box.make(SignatureScheme.V1A, of="whk_1")
    assert (pair.secret, pair.key.public_key) == (None, PrivateKey(bytes(32)).public.text)
    assert "whsec" not in repr(secret)
    assert "sealed" not in repr(pair)
