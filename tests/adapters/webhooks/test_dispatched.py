"""What the dispatcher sends over the wire, before the published libraries of two languages."""

import json
import os
from datetime import UTC, datetime

import pytest
import trio
from standardwebhooks import Webhook

from rdev.adapters.webhooks.sealing import AesGcmBox
from rdev.domain.backoff import Backoff
from rdev.domain.errors import RdevError
from rdev.domain.signing import Secret
from rdev.ports.telemetry import Silence
from rdev.services.webhook_dispatcher import DispatcherLimits, WebhookDispatcher
from tests.adapters.webhooks.test_foreign_judges import judged
from tests.fakes.deliveries import FakeDeliveries

PAYLOADS = [
    b'{"type": "ping"}',
    json.dumps({"type": "command.failed", "data": {"reason": "ü→🙂", "n": [1.5, None]}}).encode(),
    b'{"type": "x", "data": "' + b"y" * 19_000 + b'"}',
]


@pytest.fixture
async def sent(receive, sender_of, nursery):
    """What a receiver got of each payload: headers and body; and the secret's text."""
    receiver = await receive(b"HTTP/1.1 204 No Content\r\n\r\n")
    queue, secret = FakeDeliveries(), Secret(key=os.urandom(32))
    box = AesGcmBox(bytes(range(32)))
    webhook = queue.endpoint(receiver.url())
    queue.endpoints[webhook].secret = box.seal(secret.key, of=webhook)
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
    return secret.text, [_read(raw) for raw in receiver.requests]


def _read(raw: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


async def test_the_published_python_library_accepts_what_is_dispatched(sent) -> None:
    secret, requests = sent
    assert sorted(body for _, body in requests) == sorted(PAYLOADS)
    for headers, body in requests:
        assert Webhook(secret).verify(body, headers) == json.loads(body)


@pytest.mark.slow
async def test_the_published_javascript_library_accepts_what_is_dispatched(
    sent, node_folder
) -> None:
    secret, requests = sent
    asked = [
        {
            "secret": secret,
            "headers": {name: headers[name] for name in headers if name.startswith("webhook-")},
            "body": body.decode(),
        }
        for headers, body in requests
    ]
    assert await trio.to_thread.run_sync(judged, node_folder, asked) == [True] * len(PAYLOADS)


def test_a_sealed_secret_opens_for_its_endpoint_and_its_server_only() -> None:
    box = AesGcmBox(bytes(range(32)))
    sealed = box.seal(b"secret", of="whk_1")
    assert box.open(sealed, of="whk_1") == b"secret"
    assert b"secret" not in sealed
    assert box.seal(b"secret", of="whk_1") != sealed
    for other, of in ((box, "whk_2"), (AesGcmBox(bytes(32)), "whk_1")):
        with pytest.raises(RdevError, match="RDEV_SECRET_FILE"):
            other.open(sealed, of=of)
    for broken in (b"", sealed[:-1], b"\x02" + sealed[1:], sealed[:5]):
        with pytest.raises(RdevError):
            box.open(broken, of="whk_1")
