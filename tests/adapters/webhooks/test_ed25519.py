"""Scheme v1a against the reference vector of Svix's server."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.adapters.webhooks.ed25519 import PrivateKey, parse_private, parse_public
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.signing import Secret, parse_secret, sign, verify

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


# Vectors of RFC 8032, section 7.1, whose messages are none of ours: seed, public key.
RFC = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    ),
]
RFC_SIGNATURE = (
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


def test_the_vectors_of_the_rfc_are_signed_exactly() -> None:
    for seed, public in RFC:
        key = PrivateKey(bytes.fromhex(seed))
        assert base64.b64decode(key.public.text.removeprefix("whpk_")).hex() == public
    assert key.sign(bytes.fromhex("af82")).hex() == RFC_SIGNATURE


seeds = st.binary(min_size=32, max_size=32)
bodies = st.binary(max_size=100)


@given(seeds, seeds, bodies)
def test_what_one_scheme_signed_the_other_never_takes(seed, other, body) -> None:
    """Neither as it stands, nor under the other's name, nor where both are of the same bytes."""
    pair, secret = PrivateKey(seed), Secret(key=other)
    same = Secret(key=seed)
    raw = base64.b64decode(pair.public.text.removeprefix("whpk_"))
    by_pair, by_secret = (sign("evt_1", MESSAGE[1], body, [one]) for one in (pair, secret))
    by_same = sign("evt_1", MESSAGE[1], body, [same])
    renamed = {
        "v1": by_pair["webhook-signature"].replace("v1a,", "v1,"),
        "v1a": by_secret["webhook-signature"].replace("v1,", "v1a,"),
    }
    cases = [
        (by_pair, [secret, same, Secret(key=raw)]),
        (by_secret, [pair.public]),
        (by_same, [pair.public]),
        (by_pair | {"webhook-signature": renamed["v1"]}, [secret, same, Secret(key=raw)]),
        (by_secret | {"webhook-signature": renamed["v1a"]}, [pair.public]),
    ]
    for headers, verifiers in cases:
        for verifier in verifiers:
            with pytest.raises(RdevError) as caught:
                verify(headers, body, [verifier], now_s=MESSAGE[1])
            assert caught.value.code == ErrorCode.UNAUTHORIZED


@given(seeds)
def test_the_text_of_one_scheme_is_never_taken_for_the_others(seed) -> None:
    pair, secret = PrivateKey(seed), Secret(key=seed)
    readers = {"whsec_": parse_secret, "whpk_": parse_public, "whsk_": parse_private}
    for text in (pair.text, pair.public.text, secret.text):
        for prefix, read in readers.items():
            if text.startswith(prefix):
                read(text)
            else:
                with pytest.raises(RdevError):
                    read(text)
