"""Scheme v1a against the reference vector of Svix's server."""

import base64

import pytest

from rdev.adapters.webhooks.ed25519 import PrivateKey, parse_private, parse_public
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.signing import Secret, sign, verify

PAIR = (
    "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
)
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
SIGNATURE = (
    "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
)
MESSAGE = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}')


@pytest.mark.parametrize(
    "text", [PAIR, "whsk_" + base64.b64encode(base64.b64decode(PAIR[5:])[:32]).decode()]
)
def test_the_reference_vector_is_signed_exactly_by_a_pair_and_by_its_seed(text) -> None:
    key = parse_private(text)

    assert sign(*MESSAGE, [key])["webhook-signature"] == SIGNATURE
    assert key.public.text == PUBLIC
    assert key.text == PAIR
    assert "6Xb" not in repr(key)


def test_the_public_key_verifies_beside_a_secret_of_v1() -> None:
    secret = Secret(key=bytes(32))
    headers = sign(*MESSAGE, [secret, parse_private(PAIR)])

    for held in (secret, parse_public(PUBLIC)):
        assert verify(headers, MESSAGE[2], [held], now_s=MESSAGE[1]) == MESSAGE[0]


def test_another_key_and_a_cut_signature_are_refused() -> None:
    headers = sign(*MESSAGE, [PrivateKey(bytes(32))])

    for signature in (headers["webhook-signature"], "v1a,AAAA"):
        with pytest.raises(RdevError) as caught:
            verify(
                headers | {"webhook-signature": signature},
                MESSAGE[2],
                [parse_public(PUBLIC)],
                now_s=MESSAGE[1],
            )
        assert caught.value.code == ErrorCode.UNAUTHORIZED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsk_",
        PUBLIC,
        PAIR[:-4],
        PAIR.replace("whsk_", "whsec_"),
        "whsk_" + base64.b64encode(bytes(64)).decode(),
    ],
)
def test_what_is_no_private_key_is_refused(text) -> None:
    with pytest.raises(RdevError) as caught:
        parse_private(text)
    assert caught.value.code == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize("text", ["", "whpk_", PAIR, PUBLIC[:-4]])
def test_what_is_no_public_key_is_refused(text) -> None:
    with pytest.raises(RdevError) as caught:
        parse_public(text)
    assert caught.value.code == ErrorCode.BAD_REQUEST
