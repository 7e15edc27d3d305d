"""Keys derived from the one secret."""

import hashlib
import hmac

import pytest

from rdev.domain.purposes import SECRET_BYTES, derived_key

SECRET = bytes(range(SECRET_BYTES))


def hkdf(secret: bytes, salt: bytes, info: bytes, size_bytes: int) -> bytes:
    """RFC 5869 to the letter."""
    pseudorandom = hmac.new(salt, secret, hashlib.sha256).digest()
    block, made = b"", b""
    for number in range(1, -(-size_bytes // 32) + 1):
        block = hmac.new(pseudorandom, block + info + bytes([number]), hashlib.sha256).digest()
        made += block
    return made[:size_bytes]


def test_the_reference_is_the_one_of_the_rfc() -> None:
    """Test case 1 of RFC 5869, appendix A."""
    made = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert made.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@pytest.mark.parametrize("purpose", ["session", "stream-token", ""])
def test_a_key_is_that_of_the_rfc(purpose: str) -> None:
    assert derived_key(SECRET, purpose) == hkdf(SECRET, b"rdev", purpose.encode(), 32)


def test_each_purpose_and_each_secret_has_a_key_of_its_own() -> None:
    made = {
        derived_key(secret, purpose)
        for secret in (SECRET, SECRET + b"\n", bytes(SECRET_BYTES))
        for purpose in ("session", "stream-token", "session ", "")
    }
    assert len(made) == 12


def test_a_short_secret_derives_nothing() -> None:
    with pytest.raises(AssertionError):
        derived_key(SECRET[:-1], "session")
