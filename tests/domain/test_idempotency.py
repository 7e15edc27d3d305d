"""Idempotency keys: what is a key, and what is the same request."""

import pytest

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import digest_of, parse_key


@pytest.mark.parametrize("key", ["a", "x" * 255, "a key", "~!\"'", "7f9c-4b1e"])
def test_printable_ascii_is_a_key(key: str) -> None:
    assert parse_key(key) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "ü", "a\tb", "a\n", "\x7f"])
def test_anything_else_is_refused(key: str) -> None:
    with pytest.raises(RdevError) as caught:
        parse_key(key)
    assert caught.value.code is ErrorCode.BAD_REQUEST


def test_the_order_of_names_makes_no_other_request() -> None:
    one = digest_of("POST", "/p", {"a": 1, "b": {"c": [1, 2], "d": "ü"}})
    assert one == digest_of("POST", "/p", {"b": {"d": "ü", "c": [1, 2]}, "a": 1})
    assert len(one) == 32


def test_method_path_and_every_value_count() -> None:
    bodies = [{}, {"a": 1}, {"a": "1"}, {"a": None}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": {"1": 2}}]
    digests = {digest_of("POST", "/p", body) for body in bodies}
    digests |= {digest_of("PUT", "/p", {}), digest_of("POST", "/q", {})}
    assert len(digests) == len(bodies) + 2
