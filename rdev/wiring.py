"""What a server is made of: every part, and who needs whom.

Reads top to bottom: adapters, services, subsystems, routes. It opens and starts nothing; `app.py`
runs what is built here.
"""

import os
import pwd
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ParamSpec

import uuid_utils.compat

from rdev.adapters.execution.local import LocalExecutor
from rdev.adapters.http.app import HttpLimits, build_app
from rdev.adapters.http.commands import command_routes, submission_routes
from rdev.adapters.http.keys import key_routes
from rdev.adapters.http.probes import Readiness, probe_routes
from rdev.adapters.http.projects import project_routes
from rdev.adapters.http.queue import queue_routes
from rdev.adapters.http.rate_limits import Allowance, RateLimits
from rdev.adapters.http.server import HttpServer, TlsFiles
from rdev.adapters.http.stream import stream_routes
from rdev.adapters.http.webhooks import delivery_routes, webhook_routes
from rdev.adapters.postgres.checks import DatabaseChecks
from rdev.adapters.postgres.commands import PostgresCommands
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.deliveries import PostgresDeliveries
from rdev.adapters.postgres.delivery_log import PostgresDeliveryLog
from rdev.adapters.postgres.depths import PostgresDepths
from rdev.adapters.postgres.keys import PostgresKeys
from rdev.adapters.postgres.lanes import PostgresLanes
from rdev.adapters.postgres.leases import PostgresLeases
from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.adapters.postgres.listen import Listener
from rdev.adapters.postgres.notifier import (
    CANCEL_CHANNEL,
    KEYS_CHANNEL,
    PROJECTS_CHANNEL,
    QUEUE_CHANNEL,
    STREAM_CHANNEL,
    WEBHOOKS_CHANNEL,
    Notifier,
)
from rdev.adapters.postgres.output import PostgresOutput
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.adapters.postgres.upkeep import PostgresUpkeep
from rdev.adapters.postgres.webhooks import PostgresWebhooks
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.adapters.webhooks.dialling import tls_context
from rdev.adapters.webhooks.sealing import AesGcmBox
from rdev.adapters.webhooks.sender import HttpWebhookSender
from rdev.config import Settings
from rdev.domain.backoff import Backoff
from rdev.domain.deliveries import parse_schedule
from rdev.domain.depths import DepthLimits
from rdev.domain.ids import CommandId
from rdev.domain.keys import ADMIN_KEY_ID, Principal, Scope
from rdev.domain.limiter import parse_rate_limit
from rdev.domain.retention import Retention
from rdev.domain.stream import Chunk, Source
from rdev.identity import Identity
from rdev.services.appender import Appender
from rdev.services.commands import Commands
from rdev.services.depths import QueueGate
from rdev.services.guarded_executor import GuardedExecutor
from rdev.services.housekeeper import Housekeeper
from rdev.services.key_watch import KeyWatch
from rdev.services.keys import Keys
from rdev.services.limiter import AddressLimiter, RateLimiter, StreamLimiter
from rdev.services.projects import Projects
from rdev.services.queue import CommandQueue
from rdev.services.stream import Fanout
from rdev.services.stream_poll import StreamPoll
from rdev.services.subsystems import Subsystem
from rdev.services.webhook_dispatcher import DispatcherLimits, WebhookDispatcher
from rdev.services.webhooks import Webhooks

P = ParamSpec("P")

# Of the grace, for telling very many streams one after the other that they end.
_CLOSING_SHARE = 0.7
# A delivery's lease outlives its attempt by so much: for storing what came of it.
LEASE_MARGIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Connections to the database, by what must not wait for what."""

    settings: ConnectionSettings
    requests: Pool
    heartbeats: Pool
    appends: Pool
    claims: Pool
    housekeeping: Pool
    webhooks: Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What was built, as far as running it needs to know."""

    subsystems: tuple[Subsystem, ...]
    readiness: Readiness
    queue: CommandQueue
    http: HttpServer
    sender: HttpWebhookSender


def build_server(
    settings: Settings, identity: Identity, pools: Pools, telemetry: PrometheusTelemetry
) -> Server:
    """Every part, and who needs whom."""
    notifier = Notifier(pool=pools.requests, server=identity.holder)
    store = PostgresCommands(pool=pools.requests)
    leases = PostgresLeases(
        pool=pools.requests, heartbeats=pools.heartbeats, lease_s=settings.lease_s
    )
    log = PostgresOutput(pool=pools.requests, appends=pools.appends)
    executor = GuardedExecutor(
        LocalExecutor(
            projects_dir=settings.projects_folder,
            machine_id=identity.machine,
            base_env=base_env(),
        ),
        telemetry=telemetry,
    )

    sender = _sender(settings)
    dispatcher = _dispatcher(settings, identity, pools, notifier, sender, telemetry)
    fanout = Fanout(
        log=log,
        tell_replicas=notifier.stream_changed,
        buffer_bytes=settings.stream_buffer_bytes,
        drain_s=settings.grace_s * _CLOSING_SHARE,
    )
    appender = Appender(
        log=log, publish=_publisher(fanout.publish, dispatcher.wake), backoff=_backoff
    )
    queue = CommandQueue(
        lanes=PostgresLanes(pool=pools.claims, lease_s=settings.lease_s),
        leases=leases,
        executor=executor,
        appender=appender,
        log=log,
        telemetry=telemetry,
        backoff=_backoff,
        announce=_both(fanout.announce, dispatcher.wake),
        wake_replicas=notifier.queue_changed,
        holder=identity.holder,
        lease_s=settings.lease_s,
        running_max=settings.running_max,
    )

    def reach_holder(command: CommandId) -> None:
        queue.cancel(command)
        notifier.cancel_asked(command)

    gate = QueueGate(
        queue=PostgresDepths(pool=pools.requests),
        limits=DepthLimits(project_max=settings.queue_project_max, server_max=settings.queue_max),
        telemetry=telemetry,
    )
    commands = Commands(
        store=store,
        log=log,
        gate=gate,
        fanout=fanout,
        wake_workers=_both(queue.wake, dispatcher.wake),
        reach_holder=reach_holder,
        new_uuid=uuid_utils.compat.uuid7,
    )
    projects = Projects(
        store=PostgresProjects(pool=pools.requests),
        executor=executor,
        executor_name=settings.executor,
        tell_replicas=notifier.project_changed,
    )
    keys, key_watch = _keys(identity, pools, notifier)
    webhooks = _webhooks(settings, identity, pools, notifier, dispatcher)

    listener = _listener(pools, notifier, queue, fanout, keys, projects, dispatcher)
    housekeeper = Housekeeper(
        upkeep=PostgresUpkeep(pool=pools.housekeeping),
        executor=executor,
        telemetry=telemetry,
        retention=Retention(
            days=settings.retention_days,
            log_max_bytes=settings.log_max_bytes,
            delivery_days=settings.webhook_retention_days,
        ),
        backoff=_backoff,
    )

    checks = DatabaseChecks(pool=pools.requests)
    readiness = Readiness(checks={"database": checks.database, "migrations": checks.migrations})
    app = build_app(
        routes=[
            probe_routes(readiness=readiness, render_metrics=telemetry.render),
            project_routes(projects),
            submission_routes(commands, claude_command=settings.claude_argv),
            command_routes(commands, projects),
            queue_routes(gate, queue.statistics, running_max=settings.running_max),
            key_routes(keys),
            webhook_routes(webhooks),
            delivery_routes(webhooks),
        ],
        plain=stream_routes(commands, fanout, key_watch.watch, telemetry),
        authenticate=keys.authenticate,
        project_of=commands.project_of,
        telemetry=telemetry,
        now=_now,
        new_request_id=_new_request_id,
        trusted_proxies=settings.trusted_proxies,
        limits=HttpLimits(
            max_in_flight=settings.in_flight_max,
            max_held=settings.streams_max,
            body_bytes=settings.body_max_bytes,
        ),
        rate_limits=_rate_limits(settings, pools, telemetry),
    )
    http = HttpServer(
        app=app,
        bind=[settings.bind],
        grace_s=settings.grace_s,
        telemetry=telemetry,
        tls=_tls(settings),
    )
    for part, statistics in {
        "queue": queue.statistics,
        "appender": appender.statistics,
        "stream": fanout.statistics,
        "pool": pools.requests.statistics,
        "listener": listener.statistics,
        "notifier": notifier.statistics,
        "exec_breaker": executor.statistics,
        "keys": keys.statistics,
        "key_watch": key_watch.statistics,
        "projects": projects.statistics,
        "webhooks": dispatcher.statistics,
        "webhook_sender": sender.statistics,
    }.items():
        telemetry.watch(part, statistics)
    poll = StreamPoll(
        log=log, holder=identity.holder, watched=fanout.watched, wake_each=fanout.wake_each
    )
    return Server(
        subsystems=(
            notifier,
            listener,
            key_watch,
            housekeeper,
            fanout,
            poll,
            dispatcher,
            queue,
            http,
        ),
        readiness=readiness,
        queue=queue,
        http=http,
        sender=sender,
    )


def _rate_limits(settings: Settings, pools: Pools, telemetry: PrometheusTelemetry) -> RateLimits:
    """Who may ask how often. The bootstrap key is exempt."""
    limiter = RateLimiter(store=PostgresRateLimits(pool=pools.requests), telemetry=telemetry)
    telemetry.watch("limiter", limiter.statistics)
    of_key = parse_rate_limit(settings.rate_limit)

    def allowance_of(principal: Principal) -> Allowance:
        limit = principal.rate_limit or of_key
        return Allowance(limit=limit, is_exempt=principal.key_id == ADMIN_KEY_ID)

    return RateLimits(
        addresses=AddressLimiter(
            requests=parse_rate_limit(settings.rate_limit_address),
            failures=parse_rate_limit(settings.rate_limit_failures),
            telemetry=telemetry,
        ),
        limiter=limiter,
        streams=StreamLimiter(most=settings.streams_key_max, telemetry=telemetry),
        starts=parse_rate_limit(settings.rate_limit_starts),
        allowance_of=allowance_of,
        may_start=lambda principal, project: principal.may(Scope.PROJECTS_EXECUTE, project),
    )


def _both(tell: Callable[P, None], wake: Callable[[], None]) -> Callable[P, None]:
    """Tell, then wake: both are told of the same commit."""

    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        tell(*args, **kwargs)
        wake()

    return told


def _publisher(
    publish: Callable[[Chunk], None], wake: Callable[[], None]
) -> Callable[[Chunk], None]:
    """Publish a chunk; one that changes a status wakes who tells of that."""

    def published(chunk: Chunk) -> None:
        publish(chunk)
        if chunk.source is Source.LIFE:
            wake()

    return published


def _webhooks(
    settings: Settings,
    identity: Identity,
    pools: Pools,
    notifier: Notifier,
    dispatcher: WebhookDispatcher,
) -> Webhooks:
    """Endpoints and the log of their deliveries."""

    def changed() -> None:
        dispatcher.endpoints_changed()
        notifier.webhooks_changed()

    return Webhooks(
        store=PostgresWebhooks(pool=pools.requests),
        log=PostgresDeliveryLog(pool=pools.requests),
        box=AesGcmBox(identity.secret),
        rules=settings.webhook_rules,
        changed=changed,
        new_uuid=uuid_utils.compat.uuid7,
        random_bytes=os.urandom,
    )


def _sender(settings: Settings) -> HttpWebhookSender:
    return HttpWebhookSender(
        rules=settings.webhook_rules,
        tls=tls_context(settings.webhook_ca_file),
        connect_s=settings.webhook_connect_s,
        total_s=settings.webhook_total_s,
    )


def _dispatcher(
    settings: Settings,
    identity: Identity,
    pools: Pools,
    notifier: Notifier,
    sender: HttpWebhookSender,
    telemetry: PrometheusTelemetry,
) -> WebhookDispatcher:
    """Who sends what is owed to webhook endpoints."""
    return WebhookDispatcher(
        queue=PostgresDeliveries(
            pool=pools.webhooks, lease_s=settings.webhook_total_s + LEASE_MARGIN_S
        ),
        sender=sender,
        box=AesGcmBox(identity.secret),
        telemetry=telemetry,
        backoff=_backoff,
        now=_now,
        wake_replicas=notifier.webhooks_changed,
        holder=identity.holder,
        limits=DispatcherLimits(
            in_flight_max=settings.webhook_in_flight_max,
            schedule_s=parse_schedule(settings.webhook_schedule),
            pending_max=settings.webhook_pending_max,
        ),
    )


def _keys(identity: Identity, pools: Pools, notifier: Notifier) -> tuple[Keys, KeyWatch]:
    """Who may come in, and who must leave."""
    store = PostgresKeys(pool=pools.requests)
    watch = KeyWatch(store=store)
    keys = Keys(
        store=store,
        admin_key=identity.admin_key,
        tell_replicas=notifier.key_changed,
        changed=watch.wake,
        used=watch.used,
        new_uuid=uuid_utils.compat.uuid7,
        random_bytes=os.urandom,
        now=_now,
    )
    return keys, watch


def _listener(
    pools: Pools,
    notifier: Notifier,
    queue: CommandQueue,
    fanout: Fanout,
    keys: Keys,
    projects: Projects,
    dispatcher: WebhookDispatcher,
) -> Listener:
    """What the other servers tell, and who heeds it."""

    def cancel_each(commands: Sequence[CommandId]) -> None:
        for command in commands:
            queue.cancel(command)

    def look_again() -> None:
        """Notifications may have been missed."""
        queue.wake()
        fanout.wake_all()
        keys.flush()
        projects.flush()
        dispatcher.endpoints_changed()

    return Listener(
        pools.settings,
        {
            QUEUE_CHANNEL: notifier.heard(lambda _: queue.wake()),
            CANCEL_CHANNEL: notifier.heard(cancel_each),
            STREAM_CHANNEL: notifier.heard(fanout.wake_each),
            KEYS_CHANNEL: notifier.heard_ids(keys.heed),
            PROJECTS_CHANNEL: notifier.heard_ids(projects.heed),
            WEBHOOKS_CHANNEL: notifier.heard_ids(lambda _: dispatcher.endpoints_changed()),
        },
        on_connect=look_again,
    )


def base_env() -> dict[str, str]:
    """What every local command gets: nothing of the server's environment."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _home(),
        "LANG": "C.UTF-8",
    }


def _home() -> str:
    """Where this user's files are; "/" for one that the system does not know (a container's)."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def _tls(settings: Settings) -> TlsFiles | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    return TlsFiles(cert_file=str(settings.tls_cert_file), key_file=str(settings.tls_key_file))


def _backoff() -> Backoff:
    return Backoff(random=random.random)


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  (this is the `now` that is injected)


def _new_request_id() -> str:
    return f"req-{uuid_utils.compat.uuid7().hex}"
