"""A server whose database user is a login of its own, a member of `rdev_app` and nothing else.

The owner migrates before it starts. What the server's own sessions are then refused, PostgreSQL
refuses, whatever the server would ask.
"""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

from tests.app.server import Api, Server, open_api, open_server, until

LOGIN = "rdev_serves_only"


@pytest.fixture
def login_dsn(server_dsn: str, migrated_dsn: str) -> Iterator[str]:
    """A migrated database as a login role sees it that owns nothing of it."""
    role = sql.Identifier(LOGIN)
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("drop role if exists {}").format(role))
        admin.execute(sql.SQL("create role {} login in role rdev_app").format(role))
    yield make_conninfo(migrated_dsn, user=LOGIN)
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("drop role {}").format(role))


@pytest.fixture
def server(quick_place: Path, login_dsn: str) -> Iterator[Server]:
    with open_server(quick_place, RDEV_DATABASE_DSN=login_dsn) as server:
        yield server


# Not among them: `grant`, which of who may not grant is a warning and grants nothing.
FORBIDDEN = [
    "update audit_entries set actor = 'x'",
    "delete from audit_entries",
    "truncate audit_entries",
    "update audit_seals set hash = ''",
    "delete from audit_seals",
    "truncate audit_seals",
    "alter table audit_entries disable trigger all",
    "alter table audit_entries owner to current_user",
    "drop table audit_entries",
    "drop function seal_audit",
    "set role postgres",
    "create or replace function audit_bytes(e audit_entries) returns bytea "
    "language sql as $$ select ''::bytea $$",
]


@pytest.mark.slow
async def test_a_server_that_owns_nothing_serves_and_cannot_change_the_log(
    server: Server, login_dsn: str
) -> None:
    async with open_api(server) as api:
        await work(api)
    with psycopg.connect(login_dsn, autocommit=True) as session:
        users = session.execute(
            "select distinct usename from pg_stat_activity "
            "where datname = current_database() and application_name like 'rdev%'"
        ).fetchall()
        assert users == [(LOGIN,)]

        def seals() -> int:
            row = session.execute("select count(*) from audit_seals").fetchone()
            assert row is not None
            return int(row[0])

        until(lambda: seals() >= 5, "its entries are sealed", server)
        before = session.execute("select * from audit_entries order by id").fetchall()
        session.execute("grant update, delete on audit_entries, audit_seals to public")
        for statement in FORBIDDEN:
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(statement)
        after = session.execute("select * from audit_entries order by id").fetchall()
        assert after[: len(before)] == before


async def work(api: Api) -> None:
    """Changes of every kind; all of them are served, and entered."""
    await api.project()
    await api.run("true")
    made = await api.post("/keys", {"name": "k", "scopes": ["projects:read"]})
    assert made.status_code == 201
    assert (await api.http.delete(f"/keys/{made.json()['data']['id']}")).is_success
    hook = {"url": "https://hooks.example.com/x", "events": ["ping"]}
    assert (await api.post("/webhooks", hook)).status_code == 201
    assert (await api.http.get("/audit/verify")).json()["data"]["valid"] is True
