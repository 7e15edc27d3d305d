"""Each check of the database finds the fault that is made for it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import trio
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.doctor import DatabaseDoctor
from rdev.adapters.postgres.roles import as_server
from rdev.domain.errors import RdevError
from rdev.domain.findings import Level


def _now() -> datetime:
    return datetime.now(UTC)


def doctor(dsn: str, *, pool_max: int = 12, now: Callable[[], datetime] = _now) -> DatabaseDoctor:
    return DatabaseDoctor(ConnectionSettings(dsn=dsn), pool_max=pool_max, now=now)


async def test_a_fresh_database_in_the_role_that_serves_is_well(migrated_dsn: str):
    about = doctor(as_server(migrated_dsn))
    for look in (
        about.reachable, about.migrations, about.rights, about.clock, about.connections,
        about.audit, about.webhooks, about.queue,
    ):  # fmt: skip
        finding = await look()
        assert finding.level is Level.OK, (look, finding)


async def test_a_database_that_is_not_there_is_told_without_the_password(tmp_path):
    dsn = f"postgresql://me:hidden-secret@/rdev?host={tmp_path}"
    with pytest.raises(RdevError) as told:
        await doctor(dsn).reachable()
    assert str(tmp_path) in told.value.message
    assert "hidden-secret" not in told.value.message


async def test_migrations_that_are_missing_are_named(database_dsn: str):
    finding = await doctor(database_dsn).migrations()
    assert finding.level is Level.FAIL
    assert "0001_" in finding.seen


async def test_who_could_alter_the_audit_log_is_told(migrated_dsn: str):
    finding = await doctor(migrated_dsn).rights()
    assert finding.level is Level.WARN
    assert "could alter the audit log" in finding.seen


async def test_who_may_not_serve_is_told(migrated_dsn: str):
    login = f"outsider_{conninfo_to_dict(migrated_dsn)['dbname']}"
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        name = sql.Identifier(login)
        connection.execute(sql.SQL("create role {} login").format(name))
        try:
            options = f"-c role={login}"
            finding = await doctor(make_conninfo(migrated_dsn, options=options)).rights()
        finally:
            connection.execute(sql.SQL("drop role {}").format(name))
    assert finding.level is Level.FAIL
    assert "grant rdev_app" in finding.advice


@pytest.mark.parametrize(
    ("skew_s", "level"), [(2, Level.WARN), (-2, Level.WARN), (600, Level.FAIL)]
)
async def test_clocks_that_differ_are_told(migrated_dsn: str, skew_s: int, level: Level):
    def wrong_now() -> datetime:
        return _now() + timedelta(seconds=skew_s)

    assert (await doctor(migrated_dsn, now=wrong_now).clock()).level is level


async def test_a_server_that_cannot_fit_is_told(migrated_dsn: str):
    assert (await doctor(migrated_dsn, pool_max=100_000).connections()).level is Level.FAIL


async def test_a_transaction_that_was_left_open_is_told(migrated_dsn: str, monkeypatch):
    monkeypatch.setattr("rdev.adapters.postgres.doctor._TRANSACTION_WARN_S", 0.0)
    with psycopg.connect(migrated_dsn) as connection:
        connection.execute("select 1")
        pid = connection.info.backend_pid
        await trio.sleep(0)
        finding = await doctor(migrated_dsn).transactions()
    assert finding.level is Level.WARN
    assert f"pid {pid}" in finding.seen


async def test_entries_that_nobody_seals_are_told(migrated_dsn: str):
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        connection.execute(
            "insert into audit_entries (at, actor, actor_name, action, target)"
            " values (clock_timestamp() - interval '5 minutes', 'a', 'a', 'x', 'y')"
        )
    finding = await doctor(migrated_dsn).audit()
    assert finding.level is Level.WARN
    assert "1 entries not sealed" in finding.seen


async def test_deliveries_that_wait_are_told(migrated_dsn: str):
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        connection.execute(
            "insert into deliveries (webhook_id, event_id, type, created_at)"
            " values (gen_random_uuid(), gen_random_uuid(), 'ping',"
            " clock_timestamp() - interval '1 hour')"
        )
    finding = await doctor(migrated_dsn).webhooks()
    assert finding.level is Level.WARN
    assert "1 deliveries pending" in finding.seen


async def test_endpoints_that_were_given_up_are_told(migrated_dsn: str):
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        connection.execute(
            "insert into webhooks (id, url, events, secret, is_enabled, disabled_reason)"
            " values (gen_random_uuid(), 'https://x', '{}', '', false, 'failing')"
        )
    finding = await doctor(migrated_dsn).webhooks()
    assert finding.level is Level.WARN
    assert "1 endpoints were disabled" in finding.seen


async def test_a_lease_that_nobody_takes_over_is_told(migrated_dsn: str):
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        connection.execute(
            "insert into projects (id, executor, definition, reach)"
            " values ('p', 'local', '{}', 'elsewhere')"
        )
        connection.execute(
            "insert into commands (id, project, kind, lane_class, status, level, reach, retry,"
            " key_id, request_id, argv, spec, rank, last_seq, lease_id, lease_until, holder,"
            " started_at)"
            " values (gen_random_uuid(), 'p', 'shell', 'shell', 'running', 1, 'elsewhere', 'never',"
            " 'k', 'r', '[]', '', 0, 1, 1, clock_timestamp() - interval '1 hour', 'h',"
            " clock_timestamp())"
        )
    finding = await doctor(migrated_dsn).queue()
    assert finding.level is Level.WARN
    assert "nobody took over" in finding.advice
