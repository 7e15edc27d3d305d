"""The limiter on a database that is gone: reads go on, writes are refused, nobody waits long."""

import pytest
import trio

from rdev.adapters.postgres import limiter as limiter_adapter
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.adapters.postgres.pool import open_pool
from rdev.domain.breaker import BreakerSettings
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.limiter import Hit, Policy, RateLimit
from rdev.ports.telemetry import Silence
from rdev.services.breaker import CircuitBreaker
from rdev.services.limiter import RateLimiter

HIT = Hit(policy=Policy(name="key", limit=RateLimit(requests=1, window_s=60)), subject="key_1")


async def test_without_the_database_reads_are_open_and_writes_closed(proxy, monkeypatch):
    monkeypatch.setattr(limiter_adapter, "WAIT_S", 0.2)
    settings = ConnectionSettings(dsn=proxy.dsn)
    proxy.refusing = True
    breaker = CircuitBreaker(name="database", telemetry=Silence())
    async with open_pool(settings, min_size=1, max_size=2, wait_s=60, breaker=breaker) as pool:
        limiter = RateLimiter(store=PostgresRateLimits(pool=pool), telemetry=Silence())

        assert await limiter.take([HIT], is_write=False) == ()
        with pytest.raises(RdevError) as closed:
            await limiter.take([HIT], is_write=True)

        assert breaker.statistics().failures == 2

    assert closed.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert closed.value.retry_after_s is not None


async def test_with_the_breaker_open_nobody_waits_for_a_limit_at_all(proxy, monkeypatch):
    monkeypatch.setattr(limiter_adapter, "WAIT_S", 0.2)
    settings = ConnectionSettings(dsn=proxy.dsn)
    proxy.refusing = True
    breaker = CircuitBreaker(
        name="database", telemetry=Silence(), settings=BreakerSettings(calls_min=1)
    )
    async with open_pool(settings, min_size=1, max_size=2, wait_s=0.05, breaker=breaker) as pool:
        limiter = RateLimiter(store=PostgresRateLimits(pool=pool), telemetry=Silence())
        assert await limiter.take([HIT], is_write=False) == ()
        assert breaker.refuses
        waits = pool.statistics().waits

        for _ in range(100):
            assert await limiter.take([HIT], is_write=False) == ()
            await trio.lowlevel.checkpoint()

        assert pool.statistics().waits == waits
        assert limiter.statistics().opened == 101
