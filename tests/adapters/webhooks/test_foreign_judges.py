"""Signatures before foreign judges: the published JavaScript library, and node's own Ed25519."""

import json
import subprocess
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from rdev.adapters.webhooks.ed25519 import PrivateKey
from rdev.domain.signing import Secret, sign

SECRETS = [Secret(key=bytes(range(size))) for size in (24, 32, 64)]
BODIES = [
    "",
    "{}",
    '{"type": "ping"}',
    json.dumps({"ü": "→ 🙂", "n": [1.5, None]}),
    '"' + "x" * 20_000 + '"',
]


def judged(folder, requests):
    done = subprocess.run(
        ["node", "judge.mjs"],
        cwd=folder,
        input=json.dumps(requests).encode(),
        capture_output=True,
        check=True,
        timeout=100,
    )
    return json.loads(done.stdout)


def request(secret_text, signers, body, *, age_s=0):
    headers = sign("evt_0190", int(time.time()) - age_s, body.encode(), signers)
    return {"secret": secret_text, "headers": headers, "body": body}


@pytest.mark.slow
def test_the_published_javascript_library_accepts_what_is_signed(node_folder) -> None:
    key = PrivateKey(bytes(range(32)))
    alone = [request(one.text, [one], body) for one in SECRETS for body in BODIES]
    rotated = [request(one.text, SECRETS, BODIES[2]) for one in SECRETS]
    mixed = [
        request(text, [SECRETS[0], key], BODIES[2]) for text in (SECRETS[0].text, key.public.text)
    ]
    curve = [request(key.public.text, [key], body) for body in BODIES]

    requests = [*alone, *rotated, *mixed, *curve]
    assert judged(node_folder, requests) == [True] * len(requests)


@pytest.mark.slow
def test_the_published_javascript_library_refuses_what_rdev_refuses(node_folder) -> None:
    foreign, old = PrivateKey(bytes(32)), request(SECRETS[0].text, SECRETS, "{}", age_s=301)
    other = request(SECRETS[0].text, SECRETS[1:], "{}")
    changed = request(SECRETS[0].text, SECRETS, "{}") | {"body": "[]"}
    curve = request(foreign.public.text, [PrivateKey(bytes(range(32)))], "{}")

    assert judged(node_folder, [old, other, changed, curve]) == [
        "Message timestamp too old",
        *["No matching signature found"] * 3,
    ]


def test_the_published_python_library_knows_no_v1a_and_passes_it_over() -> None:
    """As the JavaScript one (judge.mjs judges v1a by node). Of a public key it makes a secret, of
    which nothing verifies."""
    key, body = PrivateKey(bytes(range(32))), BODIES[2]
    both = request(None, [key, SECRETS[1]], body)
    Webhook(SECRETS[1].text).verify(body, both["headers"])
    for held in (SECRETS[1].text, key.public.text, key.text):
        alone = request(None, [key], body)
        with pytest.raises(WebhookVerificationError, match="No matching signature"):
            Webhook(held).verify(body, alone["headers"])
