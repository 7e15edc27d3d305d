"""The text of a key: its form, its checksum, and what is made of it."""

import hashlib
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.key_text import ENTROPY_BYTES, checksum_of, make_secret, public_id_of

BASE62 = string.digits + string.ascii_letters
ENTROPY = st.binary(min_size=ENTROPY_BYTES, max_size=ENTROPY_BYTES)


@given(ENTROPY)
def test_a_made_key_has_the_form_and_is_recognised(entropy: bytes) -> None:
    made = make_secret(entropy)
    assert re.fullmatch(r"rdev_sk_[0-9A-Za-z]{8}_[0-9A-Za-z]{43}[0-9A-Za-z]{6}", made.text)
    assert public_id_of(made.text) == made.credential.public_id == made.text[8:16]
    assert made.credential.digest == hashlib.sha256(made.text.encode()).digest()


@given(ENTROPY, st.integers(8, 65), st.sampled_from(BASE62))
def test_a_typo_is_told_from_a_key(entropy: bytes, place: int, letter: str) -> None:
    text = make_secret(entropy).text
    typo = text[:place] + letter + text[place + 1 :]
    assert (public_id_of(typo) is None) == (typo != text)


@given(st.text(max_size=100))
def test_what_is_no_key_is_none(text: str) -> None:
    assert public_id_of(text) is None


@given(ENTROPY, ENTROPY)
def test_other_entropy_is_another_key(one: bytes, two: bytes) -> None:
    assert (make_secret(one).text == make_secret(two).text) == (one == two)


@pytest.mark.parametrize(
    "change",
    [lambda t: t + "0", lambda t: t[:-1], lambda t: " " + t, lambda t: t + "\n", str.upper],
)
def test_a_key_is_its_whole_text_and_nothing_more(change) -> None:
    assert public_id_of(change(make_secret(bytes(range(ENTROPY_BYTES))).text)) is None


def test_the_checksum_is_the_crc32_that_others_compute() -> None:
    # "123456789" is the check value of CRC-32/ISO-HDLC: 0xCBF43926 = 3421780262.
    number = 0
    for digit in checksum_of("123456789"):
        number = number * 62 + (
            string.digits + string.ascii_uppercase + string.ascii_lowercase
        ).index(digit)
    assert number == 0xCBF43926


def test_the_text_and_the_digest_are_in_no_repr() -> None:
    made = make_secret(bytes(range(ENTROPY_BYTES)))
    assert made.text not in repr(made)
    assert repr(made.credential.digest) not in repr(made)
