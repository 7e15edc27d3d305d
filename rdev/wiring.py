"""What a server is made of: every part, and who needs whom.

Reads top to bottom: adapters, services, subsystems, routes. It opens and starts nothing; `app.py`
runs what is built here.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import uuid_utils.compat

from rdev import __version__
from rdev.adapters.http.app import HttpLimits, build_app
from rdev.adapters.http.audit import audit_routes
from rdev.adapters.http.commands import command_routes, submission_routes
from rdev.adapters.http.documents import document_routes
from rdev.adapters.http.feed import Feeds
from rdev.adapters.http.following import Followers
from rdev.adapters.http.keys import key_routes
from rdev.adapters.http.openapi import DESCRIBED, document
from rdev.adapters.http.plain import PlainRoute
from rdev.adapters.http.probes import Readiness, probe_routes
from rdev.adapters.http.projects import DESCRIBED_FOLDERS, project_routes
from rdev.adapters.http.queue import queue_routes
from rdev.adapters.http.server import HttpServer, TlsFiles
from rdev.adapters.http.stream import stream_routes
from rdev.adapters.http.tickets import ticket_routes
from rdev.adapters.http.webhooks import delivery_routes, webhook_routes
from rdev.adapters.postgres.checks import DatabaseChecks
from rdev.adapters.postgres.commands import PostgresCommands
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.depths import PostgresDepths
from rdev.adapters.postgres.feed import PostgresFeed
from rdev.adapters.postgres.lanes import PostgresLanes
from rdev.adapters.postgres.leases import PostgresLeases
from rdev.adapters.postgres.listen import Listener
from rdev.adapters.postgres.notifier import (
    CANCEL_CHANNEL,
    FEED_CHANNEL,
    KEYS_CHANNEL,
    PROJECTS_CHANNEL,
    QUEUE_CHANNEL,
    STREAM_CHANNEL,
    WEBHOOKS_CHANNEL,
    Notifier,
)
from rdev.adapters.postgres.output import PostgresOutput
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.postgres.upkeep import PostgresUpkeep
from rdev.adapters.postgres.vitals import PostgresVitals
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.domain.backoff import Backoff
from rdev.domain.depths import DepthLimits
from rdev.domain.ids import CommandId
from rdev.domain.lanes import Lane
from rdev.domain.retention import FEED_KEPT_S, Retention
from rdev.door_wiring import DoorNeeds, build_door
from rdev.execution_wiring import ExecutionParts
from rdev.identity import Identity
from rdev.ports.tracing import Tracing
from rdev.project_wiring import ProjectNeeds, build_projects
from rdev.services.appender import Appender
from rdev.services.audit_verify import AuditVerifier
from rdev.services.commands import Commands
from rdev.services.database_meter import DatabaseMeter
from rdev.services.depths import QueueGate
from rdev.services.feed import Feed
from rdev.services.housekeeper import Housekeeper
from rdev.services.key_watch import KeyWatch
from rdev.services.keys import Keys
from rdev.services.loop_meter import LoopMeter
from rdev.services.project_watch import ProjectWatch
from rdev.services.projects import Projects
from rdev.services.queue import CommandQueue
from rdev.services.queue_meter import QueueMeter
from rdev.services.stream import Fanout
from rdev.services.stream_poll import StreamPoll
from rdev.services.subsystems import Subsystem
from rdev.services.webhook_dispatcher import WebhookDispatcher
from rdev.webhook_wiring import WebhookNeeds, WebhookParts, build_webhooks

# Of the grace, for telling very many streams one after the other that they end.
_CLOSING_SHARE = 0.7


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
    close: Callable[[], None]


def build_server(
    settings: Settings,
    identity: Identity,
    pools: Pools,
    execution: ExecutionParts,
    telemetry: PrometheusTelemetry,
    tracing: Tracing,
) -> Server:
    """Every part, and who needs whom."""
    notifier = Notifier(pool=pools.requests, server=identity.holder)
    store = PostgresCommands(pool=pools.requests)
    leases = PostgresLeases(
        pool=pools.requests, heartbeats=pools.heartbeats, lease_s=settings.lease_s
    )
    log = PostgresOutput(pool=pools.requests, appends=pools.appends)
    executor = execution.executor
    hooks = build_webhooks(
        settings,
        identity,
        WebhookNeeds(
            requests=pools.requests,
            deliveries=pools.webhooks,
            notifier=notifier,
            telemetry=telemetry,
            tracing=tracing,
            backoff=_backoff,
            now=_now,
        ),
    )
    feed, fanout = _streams(settings, pools, log, notifier, hooks.dispatcher, telemetry)
    appender = Appender(log=log, publish=fanout.publish, backoff=_backoff)
    queue = CommandQueue(
        lanes=PostgresLanes(pool=pools.claims, lease_s=settings.lease_s),
        leases=leases,
        executor=executor,
        appender=appender,
        log=log,
        telemetry=telemetry,
        backoff=_backoff,
        announce=fanout.announce,
        wake_replicas=notifier.queue_changed,
        holder=identity.holder,
        lease_s=settings.lease_s,
        running_max=settings.running_max,
        left_alone=lambda: [*executor.left_alone(), *execution.starting()],
        tracing=tracing,
        is_reachable=execution.is_reachable,
    )

    def reach_holder(command: CommandId) -> None:
        queue.cancel(command)
        notifier.cancel_asked(command)

    gate = QueueGate(
        queue=PostgresDepths(pool=pools.requests),
        limits=DepthLimits(project_max=settings.queue_project_max, server_max=settings.queue_max),
        telemetry=telemetry,
    )
    projects, project_watch, keepers = build_projects(
        settings,
        identity,
        execution,
        ProjectNeeds(
            requests=pools.requests,
            announce=fanout.announce,
            ask_to_end=reach_holder,
            tell_replicas=notifier.project_changed,
            written=hooks.dispatcher.wake,
            now=_now,
        ),
    )
    commands = Commands(
        store=store,
        log=log,
        gate=gate,
        fanout=fanout,
        wake_workers=_lane_changed(queue, feed, hooks.dispatcher),
        reach_holder=reach_holder,
        new_uuid=uuid_utils.compat.uuid7,
        tracing=tracing,
        # A folder has none.
        env_of=projects.env_of if settings.executor == "kubernetes" else None,
    )
    door = build_door(
        settings,
        identity,
        DoorNeeds(requests=pools.requests, notifier=notifier, telemetry=telemetry, now=_now),
    )
    listener = _listener(
        pools, notifier, queue, fanout, feed, door.keys, projects, project_watch, hooks
    )
    housekeeper = Housekeeper(
        upkeep=PostgresUpkeep(pool=pools.housekeeping, holder=identity.holder),
        executor=executor,
        telemetry=telemetry,
        retention=Retention(
            days=settings.retention_days,
            log_max_bytes=settings.log_max_bytes,
            delivery_days=settings.webhook_retention_days,
        ),
        audit_days=settings.audit_retention_days,
        backoff=_backoff,
    )

    checks = DatabaseChecks(pool=pools.requests)
    readiness = Readiness(
        checks={
            "database": checks.database,
            "migrations": checks.migrations,
            **execution.checks,
        }
    )
    app = build_app(
        routes=[
            probe_routes(readiness=readiness, render_metrics=telemetry.render),
            project_routes(projects, are_pods=settings.executor == "kubernetes"),
            submission_routes(commands, claude_command=settings.claude_argv),
            command_routes(commands, projects),
            queue_routes(gate, queue.statistics, running_max=settings.running_max),
            key_routes(door.keys),
            webhook_routes(hooks.webhooks),
            delivery_routes(hooks.webhooks),
            document_routes(_document(settings)),
            audit_routes(door.audit, AuditVerifier(chain=door.audit)),
            ticket_routes(door.tickets, commands.project_of, settings.trusted_proxies),
        ],
        plain=_event_streams(
            commands, fanout, feed, projects, door.key_watch, project_watch, telemetry
        ),
        authenticate=door.keys.authenticate,
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
        rate_limits=door.rate_limits,
        denied=door.denials.note,
        check_ticket=door.tickets.check,
        tracing=tracing,
    )
    http = HttpServer(
        app=app,
        bind=[settings.bind],
        grace_s=settings.grace_s,
        telemetry=telemetry,
        refusal=app.unreadable,
        tls=_tls(settings),
    )
    database_meter = DatabaseMeter(database=PostgresVitals(pool=pools.requests))
    parts = {
        "database": database_meter.statistics,
        "queue": queue.statistics,
        "appender": appender.statistics,
        "stream": fanout.statistics,
        "feed": feed.statistics,
        "listener": listener.statistics,
        "notifier": notifier.statistics,
        "exec_breaker": executor.statistics,
        "keys": door.keys.statistics,
        "key_watch": door.key_watch.statistics,
        "projects": projects.statistics,
        "project_watch": project_watch.statistics,
        "audit": door.audit_keeper.statistics,
        "webhooks": hooks.dispatcher.statistics,
        "webhook_sender": hooks.sender.statistics,
        "http": app.admission.statistics,
        **execution.statistics,
    }
    for part, statistics in parts.items():
        telemetry.watch(part, statistics)
    telemetry.watch_breakers("exec", executor.tally)
    telemetry.watch_breakers("webhook", hooks.dispatcher.tally)
    poll = StreamPoll(
        log=log, holder=identity.holder, watched=fanout.watched, wake_each=fanout.wake_each
    )
    return Server(
        subsystems=(
            notifier,
            listener,
            *execution.subsystems,
            *keepers,
            door.key_watch,
            housekeeper,
            door.audit_keeper,
            fanout,
            feed,
            poll,
            hooks.dispatcher,
            queue,
            QueueMeter(gate=gate, telemetry=telemetry),
            LoopMeter(telemetry=telemetry),
            database_meter,
            http,
        ),
        readiness=readiness,
        queue=queue,
        http=http,
        close=hooks.sender.close,
    )


def _document(settings: Settings) -> dict[str, object]:
    """What this server takes: a project that is a folder has no fields of a pod."""
    folders = DESCRIBED_FOLDERS if settings.executor == "local" else {}
    return document(version=__version__, described={**DESCRIBED, **folders})


def _lane_changed(
    queue: CommandQueue, feed: Feed, dispatcher: WebhookDispatcher
) -> Callable[[Lane], None]:
    """Whoever heeds that a command was queued, or left the queue, here."""

    def changed(lane: Lane) -> None:
        queue.wake(lane)
        feed.changed()
        dispatcher.wake()

    return changed


def _event_streams(
    commands: Commands,
    fanout: Fanout,
    feed: Feed,
    projects: Projects,
    key_watch: KeyWatch,
    project_watch: ProjectWatch,
    telemetry: PrometheusTelemetry,
) -> list[PlainRoute]:
    """The streams of single commands, and the feeds."""
    followers = Followers(key_watch.watch, telemetry)
    feeds = Feeds(feed, followers, projects.check_known, project_watch.watch)
    return stream_routes(commands, fanout, feeds, followers)


def _streams(
    settings: Settings,
    pools: Pools,
    log: PostgresOutput,
    notifier: Notifier,
    dispatcher: WebhookDispatcher,
    telemetry: PrometheusTelemetry,
) -> tuple[Feed, Fanout]:
    """Whoever watches: the life of all commands, and each command's own stream."""
    feed = Feed(
        log=PostgresFeed(pool=pools.requests, kept_s=FEED_KEPT_S),
        tell_replicas=notifier.feed_changed,
        buffer_bytes=settings.stream_buffer_bytes,
        drain_s=settings.grace_s * _CLOSING_SHARE,
    )

    def status_changed() -> None:
        feed.changed()
        dispatcher.wake()

    fanout = Fanout(
        log=log,
        tell_replicas=notifier.stream_changed,
        status_changed=status_changed,
        buffer_bytes=settings.stream_buffer_bytes,
        drain_s=settings.grace_s * _CLOSING_SHARE,
        told=telemetry.stream_written,
    )
    return feed, fanout


def _listener(
    pools: Pools,
    notifier: Notifier,
    queue: CommandQueue,
    fanout: Fanout,
    feed: Feed,
    keys: Keys,
    projects: Projects,
    project_watch: ProjectWatch,
    hooks: WebhookParts,
) -> Listener:
    """What the other servers tell, and who heeds it."""

    def cancel_each(commands: Sequence[CommandId]) -> None:
        for command in commands:
            queue.cancel(command)

    def heed_projects(changed: Sequence[str]) -> None:
        projects.heed(changed)
        project_watch.wake()

    def look_again() -> None:
        """Notifications may have been missed."""
        queue.wake()
        fanout.wake_all()
        feed.wake()
        keys.flush()
        projects.flush()
        project_watch.wake()
        hooks.dispatcher.endpoints_changed()

    return Listener(
        pools.settings,
        {
            QUEUE_CHANNEL: notifier.heard(lambda _: queue.wake()),
            CANCEL_CHANNEL: notifier.heard(cancel_each),
            STREAM_CHANNEL: notifier.heard(fanout.wake_each),
            FEED_CHANNEL: notifier.heard_ids(lambda _: feed.wake()),
            KEYS_CHANNEL: notifier.heard_ids(keys.heed),
            PROJECTS_CHANNEL: notifier.heard_ids(heed_projects),
            WEBHOOKS_CHANNEL: notifier.heard_ids(lambda _: hooks.dispatcher.endpoints_changed()),
        },
        on_connect=look_again,
    )


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
