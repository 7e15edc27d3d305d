"""A commit and its announcement: both, or an error that says that nobody knows."""

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.services.shield import COMMIT_SHIELD_S, commit_shield


async def test_a_cancel_waits_for_the_announcement() -> None:
    announced = False
    with trio.move_on_after(1) as scope:
        with commit_shield():
            await trio.sleep(3)
            announced = True
        await trio.sleep(100)
    assert announced
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(3, abs=0.1)


async def test_a_cancel_from_before_does_not_stop_the_write() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with commit_shield():
            await trio.sleep(1)
            done = True
    assert done


async def test_what_takes_too_long_is_unknown() -> None:
    with pytest.raises(RdevError) as caught, commit_shield():
        await trio.sleep(60)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s == 1
    assert trio.current_time() == pytest.approx(COMMIT_SHIELD_S, abs=0.1)


async def test_an_error_goes_through() -> None:
    with pytest.raises(ValueError, match="no"), commit_shield():
        raise ValueError("no")
