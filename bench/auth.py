"""What checking a credential costs, and what its time tells a stranger.

`Keys.authenticate` in this process, on a PostgreSQL of the scenario's own. Cached: one key with two
projects and two CIDRs, asked again and again. Timing: credentials with right checksums that no key
has, 10,000 of unknown ids and 10,000 of a known id with another secret, in turns (each a look-up);
the difference is that of the two medians.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import trio
import uuid_utils.compat

from bench.harness import Context, Figure, Measurement, Scenario
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.embedded import open_embedded
from rdev.adapters.postgres.keys import PostgresKeys
from rdev.adapters.postgres.migrate import up
from rdev.adapters.postgres.pool import open_pool
from rdev.domain.audit import Actor
from rdev.domain.errors import RdevError
from rdev.domain.key_requests import parse_key
from rdev.domain.key_text import ENTROPY_BYTES, PREFIX, checksum_of, make_secret
from rdev.domain.keys import ADMIN
from rdev.services.keys import Keys

CACHED_RUNS = 500
CALLS_PER_RUN = 50
TIMED_CALLS = 10_000
TARGET_CACHED_US = 15.0
TARGET_DIFFERENCE_PERCENT = 1.0

ADMIN_KEY = "the bootstrap key of the benchmark, long enough"
CLIENT_IP = "10.1.2.3"
ACTOR = Actor(key_id="key_admin", key_name="bootstrap", ip=CLIENT_IP, request_id="bench")
BODY = {
    "name": "bench",
    "scopes": ["projects:read", "projects:execute"],
    "project_ids": ["one", "two"],
    "allowed_ips": ["192.0.2.0/24", "10.0.0.0/8"],
}


async def _repetition(keys: Keys, text: str) -> dict[str, float]:
    cached_us, admin_us = await _cached_us(keys, text), await _cached_us(keys, ADMIN_KEY)
    unknown_us, wrong_us = await _refused_us(keys, text)
    unknown, wrong = statistics.median(unknown_us), statistics.median(wrong_us)
    return {
        "cached_us": cached_us,
        "bootstrap_us": admin_us,
        "unknown_id_us": unknown,
        "wrong_secret_us": wrong,
        "timing_difference": abs(unknown - wrong) / wrong * 100,
    }


async def _cached_us(keys: Keys, text: str) -> float:
    """µs for a check of a key that is remembered: the median of many runs of calls (each shorter
    than the scheduler's slice, so that other programs' time falls into few of them)."""
    found = []
    for _ in range(CACHED_RUNS):
        await keys.authenticate(text, CLIENT_IP)
        began = time.perf_counter()
        for _ in range(CALLS_PER_RUN):
            await keys.authenticate(text, CLIENT_IP)
        found.append((time.perf_counter() - began) / CALLS_PER_RUN * 1e6)
    return statistics.median(found)


async def _refused_us(keys: Keys, text: str) -> tuple[list[float], list[float]]:
    """µs of every refusal: of unknown ids, of wrong secrets."""
    known = text[len(PREFIX) : len(PREFIX) + 8]
    found: tuple[list[float], list[float]] = ([], [])
    pairs = [(_invented(None), _invented(known)) for _ in range(TIMED_CALLS)]
    for pair in pairs:
        order = [0, 1]
        random.shuffle(order)
        for which in order:
            began = time.perf_counter()
            try:
                await keys.authenticate(pair[which], CLIENT_IP)
            except RdevError:
                found[which].append((time.perf_counter() - began) * 1e6)
    return found


def _invented(public_id: str | None) -> str:
    """A key that nobody has, under a public id that is known, or that is none."""
    text = make_secret(os.urandom(ENTROPY_BYTES)).text
    if public_id is None:
        return text
    body = PREFIX + public_id + text[len(PREFIX) + 8 : -6]
    return body + checksum_of(body)


def _measure(context: Context) -> Measurement:
    """The scenario: a database of its own, in a folder of its own."""

    async def main() -> dict[str, list[float]]:
        with tempfile.TemporaryDirectory(prefix="rdev-bench-") as folder:
            async with open_embedded(Path(folder)) as dsn:
                await trio.to_thread.run_sync(up, dsn)
                async with open_pool(ConnectionSettings(dsn=dsn)) as pool:
                    return await _repeat(_keys(PostgresKeys(pool=pool)), context)

    return trio.run(main)


async def _repeat(keys: Keys, context: Context) -> dict[str, list[float]]:
    made = await keys.create(ADMIN, parse_key(BODY), ACTOR)
    assert made.text is not None
    samples: dict[str, list[float]] = {}
    for number in range(context.warm_ups + context.repetitions):
        for name, value in (await _repetition(keys, made.text)).items():
            if number >= context.warm_ups:
                samples.setdefault(name, []).append(value)
    return samples


def _keys(store: PostgresKeys) -> Keys:
    return Keys(
        store=store,
        admin_key=ADMIN_KEY,
        tell_replicas=lambda _: None,
        changed=lambda: None,
        used=lambda *_: None,
        new_uuid=uuid_utils.compat.uuid7,
        random_bytes=os.urandom,
        now=lambda: datetime.now(UTC),
    )


def _figures() -> Sequence[Figure]:
    return (
        Figure(name="cached_us", unit="µs", at_most=TARGET_CACHED_US),
        Figure(name="bootstrap_us", unit="µs", at_most=TARGET_CACHED_US),
        Figure(name="unknown_id_us", unit="µs"),
        Figure(name="wrong_secret_us", unit="µs"),
        Figure(name="timing_difference", unit="%", at_most=TARGET_DIFFERENCE_PERCENT),
    )


SCENARIO = Scenario(
    name="auth",
    what="Checking a credential that is remembered; unknown id against wrong secret, 10,000 each.",
    figures=tuple(_figures()),
    measure=_measure,
)
