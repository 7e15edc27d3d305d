"""The rate limiter: what it adds to a request, what a database decides, what it lets through; and
what a circuit breaker adds to a call.

`added`: one question of the service to PostgreSQL (fsync on, 1,000 keys, two windows each, four
tasks at once). `decisions`: the statement alone, one transaction each, pipelined over four
connections, so that the client's cost hardly counts. `most_in_a_window`: admitted hits in the worst
window, for the limit, on the same arrivals for every side; the peers are the strategies of
`limits`. `address`, `denied`, `breaker`: CPU of this process for each.
"""

import json
import random
import subprocess
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psycopg
import trio
from psycopg import pq

from bench.harness import Context, Figure, Measurement, Scenario, percentile
from bench.peers.installed import HERE, venv
from bench.queue import PEERS_FOLDER
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.embedded import open_embedded
from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.adapters.postgres.migrate import up
from rdev.adapters.postgres.pool import open_pool
from rdev.domain.limiter import TICKS_PER_S, Decision, Hit, Policy, RateLimit, SlidingWindow
from rdev.ports.telemetry import Silence
from rdev.services.breaker import CircuitBreaker
from rdev.services.limiter import AddressLimiter, RateLimitedError, RateLimiter

KEYS = 1_000
TASKS = 4
QUESTIONS = 2_000

CONNECTIONS = 4
BATCH = 50
DECIDE_S = 3.0

LOCAL_CALLS = 20_000
BREAKER_CALLS = 100_000

LIMIT = RateLimit(requests=100, window_s=60)
WIDE = RateLimit(requests=1_000_000, window_s=60)
_TAKE = b"select is_admitted from take_hits('{key}', array[$1], '{60000000}', '{1000000}')"


def measure(context: Context) -> Measurement:
    """Everything in one run."""
    found: dict[str, float | Sequence[float]] = dict(_let_through())
    found |= context.repeat(lambda: trio.run(_local))
    found |= trio.run(_in_database, context)
    return found


async def _in_database(context: Context) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="rdev-bench-") as folder:
        async with open_embedded(Path(folder)) as dsn:
            await trio.to_thread.run_sync(up, dsn)
            samples: dict[str, list[float]] = {}
            for repetition in range(-context.warm_ups, context.repetitions):
                once = await _added(dsn)
                for name, subjects in (("decisions", KEYS), ("decisions_hot", 1)):
                    once[name] = await trio.to_thread.run_sync(_decisions, dsn, subjects)
                for name, value in once.items() if repetition >= 0 else ():
                    samples.setdefault(name, []).append(value)
            return samples


async def _added(dsn: str) -> dict[str, float]:
    """Milliseconds of a question with two windows, as the door asks it for a start."""
    took_ms: list[float] = []
    policies = [Policy(name=name, limit=WIDE) for name in ("key", "starts")]

    async def ask(limiter: RateLimiter, chance: random.Random) -> None:
        for _ in range(QUESTIONS // TASKS):
            hits = [Hit(policy=one, subject=f"s{chance.randrange(KEYS)}") for one in policies]
            began_s = time.perf_counter()
            await limiter.take(hits, is_write=True)
            took_ms.append((time.perf_counter() - began_s) * 1_000)

    async with open_pool(ConnectionSettings(dsn=dsn), max_size=12) as pool:
        limiter = RateLimiter(store=PostgresRateLimits(pool=pool), telemetry=Silence())
        async with trio.open_nursery() as nursery:
            for number in range(TASKS):
                nursery.start_soon(ask, limiter, random.Random(number))
    return {"added_p50": percentile(took_ms, 50), "added_p99": percentile(took_ms, 99)}


def _decisions(dsn: str, subjects: int) -> float:
    """Decisions per second of the database, each a transaction of its own."""
    counts: list[int] = []
    stop_at_s = time.monotonic() + DECIDE_S
    threads = [
        threading.Thread(target=_decide, args=(dsn, subjects, number, stop_at_s, counts))
        for number in range(CONNECTIONS)
    ]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - began_s)


def _decide(dsn: str, subjects: int, number: int, stop_at_s: float, counts: list[int]) -> None:
    chance, done = random.Random(number), 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        raw = connection.pgconn
        raw.prepare(b"take", _TAKE)
        raw.enter_pipeline_mode()
        while time.monotonic() < stop_at_s:
            for _ in range(BATCH):
                raw.send_query_prepared(b"take", [b"s%d" % chance.randrange(subjects)])
                raw.pipeline_sync()
            for _ in range(BATCH):
                done += _one_answer(raw)
        raw.exit_pipeline_mode()
    counts.append(done)


def _one_answer(raw: pq.abc.PGconn) -> int:
    """Read one statement's results to their end. Errors: RuntimeError for anything but a row."""
    answer = raw.get_result()
    if answer is None or answer.status != pq.ExecStatus.TUPLES_OK:
        raise RuntimeError(f"no decision: {answer and answer.error_message!r}")
    while (more := raw.get_result()) is None or more.status != pq.ExecStatus.PIPELINE_SYNC:
        pass
    return 1


async def _local() -> dict[str, float]:
    """Microseconds of what asks nobody."""
    addresses = AddressLimiter(requests=WIDE, failures=WIDE, telemetry=Silence())
    names = [f"10.0.{number // 256}.{number % 256}" for number in range(KEYS)]
    return {
        "address": _each_us(LOCAL_CALLS, lambda number: addresses.enter(names[number % KEYS])),
        "denied": await _denied_us(),
        "breaker": _breaker_us(),
    }


async def _denied_us() -> float:
    """A request of a key that is denied already."""
    limiter = RateLimiter(store=_Refusing(), telemetry=Silence())
    hit = Hit(policy=Policy(name="key", limit=LIMIT), subject="key_1")
    began_s = 0.0
    for number in range(LOCAL_CALLS):
        try:
            await limiter.take([hit], is_write=True)
        except RateLimitedError:
            pass
        if number == 0:
            began_s = time.thread_time()
    if limiter.statistics().asked != 1:
        raise RuntimeError("a denied key asked the store")
    return (time.thread_time() - began_s) / (LOCAL_CALLS - 1) * 1e6


class _Refusing:
    """A store in which the window of every subject is full."""

    def __init__(self) -> None:
        self._window = SlidingWindow()

    async def take(self, hits: Sequence[Hit]) -> list[Decision]:
        for _ in range(LIMIT.requests):
            self._window.take(hits[0].policy, 0)
        return [self._window.ask(hit.policy, 0) for hit in hits]


def _breaker_us() -> float:
    breaker = CircuitBreaker(name="exec", telemetry=Silence())

    def call(_: int) -> None:
        with breaker.call():
            pass

    def nothing(_: int) -> None:
        pass

    return _each_us(BREAKER_CALLS, call) - _each_us(BREAKER_CALLS, nothing)


def _each_us(calls: int, call: Callable[[int], None]) -> float:
    began_s = time.thread_time()
    for number in range(calls):
        call(number)
    return (time.thread_time() - began_s) / calls * 1e6


def _let_through() -> Mapping[str, float]:
    """Hits in the worst window for the limit, of every side; on three kinds of arrivals."""
    worst: dict[str, float] = {}
    for arrivals_s in _arrivals():
        sides = {"rdev": _ours(arrivals_s), **_theirs(arrivals_s)}
        for name, admitted_s in sides.items():
            most = _most_in_a_window(admitted_s) / LIMIT.requests
            name = f"most_in_a_window_{name}"
            worst[name] = max(worst.get(name, 0.0), most)
    for name in ("fixed", "sliding_counter", "moving"):
        worst.setdefault(f"most_in_a_window_{name}", float("nan"))
    return worst


def _arrivals() -> list[list[float]]:
    """Two limits at the end of a window and a stream after it; bursts; chance."""
    chance = random.Random(1)
    edge = [LIMIT.window_s - 0.01] * 200 + [LIMIT.window_s + n * 0.05 for n in range(2_400)]
    bursts = sorted(chance.randrange(300) + chance.random() / 50 for _ in range(3_000))
    return [edge, bursts, sorted(chance.uniform(0, 300) for _ in range(3_000))]


def _ours(arrivals_s: Sequence[float]) -> list[float]:
    policy, window = Policy(name="key", limit=LIMIT), SlidingWindow()
    return [at for at in arrivals_s if window.take(policy, round(at * TICKS_PER_S)).is_admitted]


def _theirs(arrivals_s: Sequence[float]) -> Mapping[str, list[float]]:
    """What the strategies of `limits` admit; nothing where it cannot be installed."""
    try:
        python = venv(PEERS_FOLDER / "limits", "limits")
    except (OSError, subprocess.SubprocessError) as error:
        print(f"left out: limits: {error}", flush=True)
        return {}
    work = {
        "requests": LIMIT.requests,
        "window_s": LIMIT.window_s,
        "arrivals_s": list(arrivals_s),
    }
    done = subprocess.run(
        [python, str(HERE / "on_limits.py")],
        input=json.dumps(work).encode(),
        capture_output=True,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout)["admitted_s"]
    return found


def _most_in_a_window(admitted_s: Sequence[float]) -> int:
    """The most hits in any interval [t, t + window)."""
    ends = (bisect_left(admitted_s, at + LIMIT.window_s) for at in admitted_s)
    return max((end - index for index, end in enumerate(ends)), default=0)


SCENARIO = Scenario(
    name="limiter",
    what="What the limiter adds and decides, what it lets through beside `limits`; the breaker.",
    figures=(
        Figure(name="added_p50", unit="ms", at_most=1),
        Figure(name="added_p99", unit="ms", at_most=5),
        Figure(name="decisions", unit="/s", at_least=10_000),
        Figure(name="decisions_hot", unit="/s", at_least=10_000),
        Figure(name="most_in_a_window_rdev", unit="× limit", at_most=1),
        Figure(name="most_in_a_window_moving", unit="× limit"),
        Figure(name="most_in_a_window_sliding_counter", unit="× limit"),
        Figure(name="most_in_a_window_fixed", unit="× limit"),
        Figure(name="address", unit="µs"),
        Figure(name="denied", unit="µs"),
        Figure(name="breaker", unit="µs", at_most=3),
    ),
    measure=measure,
)
