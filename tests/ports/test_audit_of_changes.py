"""No change without its entry, no entry without its change: keys and projects."""

from collections import Counter

import psycopg
import pytest
import trio

from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.keys import PostgresKeys
from rdev.adapters.postgres.pool import open_pool
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId
from rdev.domain.keys import NewKey, Rotation
from rdev.domain.projects import ProjectDefinition
from tests.fakes.key_samples import new_key, secret
from tests.fakes.store import ACTOR
from tests.ports.conftest import REACH, Pools

ROUNDS = 40
_ENTRIES = "select action, target, detail from audit_entries order by id"


async def entries(pools: Pools) -> list[tuple[str, str, dict[str, object]]]:
    async with pools.requests.connection() as connection:
        return await (await connection.execute(_ENTRIES)).fetchall()


async def test_what_changes_a_key_is_entered_once(pools: Pools):
    keys = PostgresKeys(pool=pools.requests)
    new = new_key()
    await keys.insert(new, ACTOR)
    turned = secret()
    await keys.rotate(Rotation(key=new.id, secret=turned, grace_s=5), ACTOR)
    await keys.revoke(new.id, ACTOR)
    await keys.revoke(new.id, ACTOR)
    found = await entries(pools)
    assert [(action, target) for action, target, _ in found] == [
        ("key.created", new.id),
        ("key.rotated", new.id),
        ("key.revoked", new.id),
    ]
    told = str(found)
    for each in (new.secret, turned):
        assert each.text not in told
        assert each.credential.public_id in told


async def test_what_changes_nothing_is_not_entered(pools: Pools):
    keys, projects = PostgresKeys(pool=pools.requests), PostgresProjects(pool=pools.requests)
    await keys.revoke(new_key().id, ACTOR)
    await keys.rotate(Rotation(key=new_key().id, secret=secret(), grace_s=5), ACTOR)
    definition = ProjectDefinition(id=ProjectId("demo"))
    for _ in range(2):
        await projects.insert(definition, ACTOR, executor="local", reach=REACH)
    assert [row[:2] for row in await entries(pools)] == [("project.created", "demo")]


async def test_who_did_it_stands_in_the_entry(pools: Pools):
    definition = ProjectDefinition(id=ProjectId("demo"))
    await PostgresProjects(pool=pools.requests).insert(
        definition, ACTOR, executor="local", reach=REACH
    )
    async with pools.requests.connection() as connection:
        found = await connection.execute(
            "select actor, actor_name, ip, request_id, project, outcome from audit_entries"
        )
        row = await found.fetchone()
    assert row == (ACTOR.key_id, ACTOR.key_name, ACTOR.ip, ACTOR.request_id, "demo", "ok")


@pytest.mark.slow
async def test_connections_that_are_lost_leave_no_difference(pools: Pools, migrated_dsn: str):
    """Two clients work while another session ends their connections again and again."""
    settings = ConnectionSettings(dsn=migrated_dsn, application_name="victim")
    lost = 0

    async def tried(work: object) -> None:
        nonlocal lost
        try:
            await work  # type: ignore[misc]
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            lost += 1

    async def client(name: str, keys: PostgresKeys, projects: PostgresProjects) -> None:
        made: list[NewKey] = []
        for number in range(ROUNDS):
            new = new_key()
            made.append(new)
            await tried(keys.insert(new, ACTOR))
            older = made[number // 2].id
            await tried(keys.rotate(Rotation(key=new.id, secret=secret(), grace_s=60), ACTOR))
            await tried(keys.revoke(older, ACTOR))
            definition = ProjectDefinition(id=ProjectId(f"{name}{number}"))
            await tried(projects.insert(definition, ACTOR, executor="local", reach=REACH))

    async def cut(done: trio.Event) -> None:
        while not done.is_set():
            async with pools.housekeeping.connection() as connection:
                await connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where application_name = 'victim' and state <> 'idle' "
                    "and datname = current_database()"
                )
            await trio.sleep(0.002)

    done = trio.Event()
    async with trio.open_nursery() as nursery, open_pool(settings, max_size=2, wait_s=60) as pool:
        nursery.start_soon(cut, done)
        keys, projects = PostgresKeys(pool=pool), PostgresProjects(pool=pool)
        async with trio.open_nursery() as clients:
            clients.start_soon(client, "a", keys, projects)
            clients.start_soon(client, "b", keys, projects)
        done.set()
    with psycopg.connect(migrated_dsn) as connection:
        rows = connection.execute("select action, target from audit_entries").fetchall()
        told = Counter(rows)
        assert set(told.values()) == {1}
        for action, sql in {
            "key.created": "select 'key_' || replace(id::text, '-', '') from api_keys",
            "key.revoked": (
                "select 'key_' || replace(id::text, '-', '') from api_keys "
                "where revoked_at is not null"
            ),
            "key.rotated": (
                "select 'key_' || replace(key_id::text, '-', '') from api_key_secrets "
                "group by key_id having count(*) = 2"
            ),
            "project.created": "select id from projects",
        }.items():
            done_to = {row[0] for row in connection.execute(sql).fetchall()}
            assert {target for what, target in told if what == action} == done_to, action
    assert lost > 0, "nothing was cut"
