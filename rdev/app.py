"""The composition root: opens what the server stands on, runs what `wiring.py` builds, heeds
signals.
"""

import logging
import math
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from rdev import interpreter
from rdev.adapters.postgres.checks import check_dsn
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.embedded import open_embedded
from rdev.adapters.postgres.migrate import up
from rdev.adapters.postgres.pool import open_dedicated, open_pool
from rdev.adapters.postgres.roles import as_server
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.execution_wiring import open_execution
from rdev.identity import Identity
from rdev.services.breaker import CircuitBreaker
from rdev.services.subsystems import run_subsystems
from rdev.telemetry_wiring import open_tracing
from rdev.wiring import Pools, Server, build_server

# Signals closer together than this are one.
ONE_SIGNAL_S = 0.3

_log = logging.getLogger("rdev")


@dataclass(slots=True)
class Control:
    """What a signal acts on. `server` is None until it serves."""

    stop: trio.Event = field(default_factory=trio.Event)
    server: Server | None = None
    reload: Callable[[], None] | None = None


async def serve(
    settings: Settings,
    identity: Identity,
    *,
    on_serving: Callable[[str], None] = lambda url: None,
    reload: Callable[[], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT; `on_serving` is told its URL when it can serve.

    With `reload` SIGHUP calls it, and ends nothing.

    SIGTERM leaves the commands running for the next server; SIGINT (Ctrl-C) ends them. A second
    signal, or one before it serves, ends at once. Errors: RdevError when it cannot start; whatever
    a subsystem raised.
    """
    control = Control(reload=reload)
    async with trio.open_nursery() as nursery:
        # First of all: a database that was started must be stopped, whenever the signal comes.
        await nursery.start(_heed_signals, control, nursery.cancel_scope)
        await _serve_until_stopped(settings, identity, control, on_serving)
        nursery.cancel_scope.cancel()


async def _serve_until_stopped(
    settings: Settings, identity: Identity, control: Control, on_serving: Callable[[str], None]
) -> None:
    """Open what the server stands on, run it, and close it in reverse."""
    if identity.is_secret_own and not settings.is_embedded:
        _log.warning(
            "RDEV_SECRET_FILE is not set: sessions and stream tokens are good on this server alone"
        )
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(_database(settings))
        connection = ConnectionSettings(dsn=dsn)
        telemetry = PrometheusTelemetry()
        # The last to close: what the others tell while they end is exported too.
        tracing = await stack.enter_async_context(open_tracing(settings, identity, telemetry))
        breaker = CircuitBreaker(name="database", telemetry=telemetry)
        telemetry.watch("database_breaker", breaker.statistics)
        telemetry.watch_breakers("database", breaker.tally)
        pools = Pools(
            settings=connection,
            requests=await stack.enter_async_context(
                open_pool(connection, max_size=settings.database_pool_max, breaker=breaker)
            ),
            heartbeats=await stack.enter_async_context(
                open_dedicated(connection, "heartbeat", by_key=True)
            ),
            appends=await stack.enter_async_context(
                open_dedicated(connection, "append", by_key=True)
            ),
            claims=await stack.enter_async_context(open_dedicated(connection, "claim")),
            housekeeping=await stack.enter_async_context(
                open_dedicated(connection, "housekeeping")
            ),
            webhooks=await stack.enter_async_context(
                open_pool(connection.named("webhooks"), min_size=1, max_size=3)
            ),
        )
        _watch_pools(telemetry, pools)
        execution = await stack.enter_async_context(open_execution(settings, identity, telemetry))
        server = build_server(settings, identity, pools, execution, telemetry, tracing)
        stack.callback(server.close)

        async def drain() -> None:
            server.readiness.drain()
            await trio.sleep(settings.drain_s)

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await run_subsystems(
                server.subsystems,
                stop=control.stop,
                drain=drain,
                grace_s=settings.grace_s,
                task_status=task_status,
            )

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            control.server = server
            url = server.http.bound[0]
            _write_address(settings.state_dir, url)
            interpreter.give_way()
            interpreter.calm()
            _log.info("serving", extra={"url": url})
            on_serving(url)


def _watch_pools(telemetry: PrometheusTelemetry, pools: Pools) -> None:
    """Connections by their purpose."""
    telemetry.watch_each(
        "pool",
        {
            "requests": pools.requests.statistics,
            "heartbeats": pools.heartbeats.statistics,
            "appends": pools.appends.statistics,
            "claims": pools.claims.statistics,
            "housekeeping": pools.housekeeping.statistics,
            "webhooks": pools.webhooks.statistics,
        },
    )


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[str]:
    """The DSN given, or an embedded PostgreSQL with its migrations applied."""
    if settings.database_dsn is not None:
        dsn = settings.database_dsn.get_secret_value()
        check_dsn(dsn)
        yield dsn
        return
    async with open_embedded(settings.state_dir) as dsn:
        for name in await trio.to_thread.run_sync(up, dsn):
            _log.info("migration applied", extra={"migration": name})
        yield as_server(dsn)


async def _heed_signals(
    control: Control, everything: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    """The first signal stops, the second cancels; so does one before anything serves.

    What comes within `ONE_SIGNAL_S` is one: a terminal's Ctrl-C reaches `make` and its child both,
    and a parent may pass on what its child got too.
    """
    stopped_at_s = -math.inf
    _ignore_for_itself()
    heeded = [signal.SIGTERM, signal.SIGINT]
    if control.reload is not None:
        heeded.append(signal.SIGHUP)
    with trio.open_signal_receiver(*heeded) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP and control.reload is not None:
                control.reload()
                continue
            if trio.current_time() < stopped_at_s + ONE_SIGNAL_S:
                continue
            if control.server is None or control.stop.is_set():
                _log.warning("stopping at once", extra={"signal": signal.Signals(number).name})
                everything.cancel()
                return
            _log.info("stopping", extra={"signal": signal.Signals(number).name})
            if number == signal.SIGINT:
                control.server.queue.cancel_running()
            stopped_at_s = trio.current_time()
            control.stop.set()


def _ignore_for_itself() -> None:
    """What whoever started this server had it ignore (a background job's SIGQUIT, nohup's SIGHUP)
    stays without effect on it, but is not inherited: an exec resets handlers, not what is ignored.
    Those that Python itself ignores, it resets in its children."""
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _write_address(state_dir: Path, url: str) -> None:
    """Where this server listens, for whoever knows only its state folder; by rename."""
    path = state_dir / "address"
    fresh = path.with_suffix(".new")
    fresh.write_text(url.split("://", 1)[1].rstrip("/") + "\n")
    fresh.rename(path)
