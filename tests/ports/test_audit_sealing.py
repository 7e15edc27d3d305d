"""Sealing, what comes after it is restored or dropped, and who may change the log."""

from collections.abc import Iterator

import psycopg
import pytest
import trio
from psycopg import errors

from rdev.adapters.postgres import migrate
from rdev.adapters.postgres.audit import PostgresAudit
from rdev.adapters.postgres.roles import as_server
from rdev.adapters.postgres.upkeep import PostgresUpkeep
from rdev.domain.audit import AuditFilter
from rdev.domain.pages import PAGE_BYTES
from rdev.services.audit_verify import AuditVerifier
from tests.ports.conftest import Pools

_WRITE = """
insert into audit_entries (actor, actor_name, action, target)
select 'a', 'a', 'key.created', 'k' || n from generate_series(1, %s::integer) n
"""

# The newest one's detail.
_FILL = """
update audit_entries set detail = jsonb_build_object('text', repeat('x', %s::integer))
where (day, id) = (select day, id from audit_entries order by day desc, id desc limit 1)
"""


@pytest.fixture
def owner(migrated_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def audit(pools: Pools) -> PostgresAudit:
    return PostgresAudit(pool=pools.requests)


async def count_of(audit: PostgresAudit) -> int:
    sealed = await audit.seal(limit=1_000)
    assert sealed is not None
    return sealed.count


async def is_valid(audit: PostgresAudit) -> bool:
    verdict = await AuditVerifier(chain=audit).verify()
    assert verdict.fault is None, verdict
    return True


async def test_what_was_entered_while_nobody_sealed_is_sealed_later(audit, owner):
    for _ in range(3):
        owner.execute(_WRITE, (4,))
    assert await count_of(audit) == 12
    assert await count_of(audit) == 0
    assert await is_valid(audit)


async def test_a_batch_is_no_more_than_asked_for(audit, owner):
    owner.execute(_WRITE, (10,))
    sealed = await audit.seal(limit=4)
    assert (sealed.count, sealed.last_seq) == (4, 4)
    assert sealed.lag_s > 0
    assert await count_of(audit) == 6


async def test_what_an_open_transaction_has_entered_waits_and_so_does_what_follows(
    audit, owner, migrated_dsn
):
    with psycopg.connect(migrated_dsn) as other:
        other.execute(_WRITE, (1,))
        owner.execute(_WRITE, (2,))
        sealed = await audit.seal(limit=100)
        assert (sealed.count, sealed.lag_s is not None) == (0, True)
        other.commit()
    # Any session's transaction holds the snapshot back, also one of another database.
    with trio.fail_after(30):
        total = 0
        while total < 3:
            total += await count_of(audit)
    assert await is_valid(audit)


async def test_two_servers_that_seal_at_once_seal_each_entry_once(pools, audit, owner):
    for _ in range(20):
        owner.execute(_WRITE, (5,))
    counts: list[int] = []

    async def server(one: PostgresAudit) -> None:
        for _ in range(15):
            sealed = await one.seal(limit=7)
            counts.append(0 if sealed is None else sealed.count)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(server, PostgresAudit(pool=pools.requests))
    while (more := await count_of(audit)) > 0:
        counts.append(more)
    assert sum(counts) == 100
    assert owner.execute("select count(*), max(seq) from audit_seals").fetchone() == (100, 100)
    assert await is_valid(audit)


async def test_a_sealer_that_dies_half_way_has_sealed_nothing_and_holds_up_nobody(
    audit, owner, migrated_dsn
):
    owner.execute(_WRITE, (10,))
    dying = psycopg.connect(migrated_dsn)
    assert dying.execute("select sealed from seal_audit(4)").fetchone() == (4,)
    assert await audit.seal(limit=100) is None
    owner.execute("select pg_terminate_backend(%s, 30000)", (dying.info.backend_pid,))
    with pytest.raises(errors.AdminShutdown):
        dying.commit()
    dying.close()
    assert owner.execute("select count(*) from audit_seals").fetchone() == (0,)
    assert await count_of(audit) == 10
    assert await is_valid(audit)


async def test_what_begins_while_a_sealer_waits_does_not_overtake_what_still_runs(
    audit, owner, migrated_dsn
):
    """It is no entry of another cluster, though the sealer's first look did not know of it."""
    with psycopg.connect(migrated_dsn) as running, psycopg.connect(migrated_dsn) as blocker:
        running.execute(_WRITE, (1,))
        blocker.execute("lock table audit_seals in share mode")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_of, audit)
            with trio.fail_after(30):
                while not owner.execute("select 1 from pg_locks where not granted").fetchone():
                    await trio.sleep(0.01)
            owner.execute(_WRITE, (1,))
            blocker.commit()
        assert owner.execute("select count(*) from audit_seals").fetchone() == (0,)
        running.commit()
    with trio.fail_after(30):
        while owner.execute("select count(*) from audit_seals").fetchone() != (2,):
            await count_of(audit)
    assert await is_valid(audit)


async def test_sealing_goes_on_where_the_last_sealed_entry_was_deleted(audit, owner):
    """Verification finds it; the server is not to fail of it."""
    owner.execute(_WRITE, (3,))
    assert await count_of(audit) == 3
    owner.execute("delete from audit_entries where id = (select max(entry) from audit_seals)")
    owner.execute(_WRITE, (2,))
    assert await count_of(audit) == 2
    assert await count_of(audit) == 0
    verdict = await AuditVerifier(chain=audit).verify()
    assert verdict.fault is not None
    assert verdict.fault.seq == 3


async def test_a_database_restored_into_another_cluster_goes_on(audit, owner):
    owner.execute(_WRITE, (5,))
    assert await count_of(audit) == 5
    # What the other cluster had given out is far above what this one gives out, and one entry of it
    # had not been sealed yet.
    owner.execute("truncate audit_seals")
    owner.execute("update audit_entries set xid = ((xid::text)::bigint + 1000000000)::text::xid8")
    owner.execute(_WRITE, (2,))
    sealed = 0
    with trio.fail_after(30):
        while sealed < 7:
            sealed += await count_of(audit)
    owner.execute(_WRITE, (3,))
    with trio.fail_after(30):
        while sealed < 10:
            sealed += await count_of(audit)
    assert await count_of(audit) == 0
    assert await is_valid(audit)


async def test_a_restored_database_that_had_sealed_all_says_so_and_goes_on(audit, owner):
    owner.execute(_WRITE, (3,))
    owner.execute("update audit_entries set xid = ((xid::text)::bigint + 1000000000)::text::xid8")
    assert await count_of(audit) == 3
    # Nothing of this cluster is there to go on from: an entry is made.
    assert await count_of(audit) == 0
    assert await count_of(audit) == 1
    assert await count_of(audit) == 0
    page = await audit.page(AuditFilter(action="audit.resumed"), before=None, limit=5)
    assert len(page.entries) == 1
    assert await is_valid(audit)


async def test_a_page_ends_with_the_entry_that_brings_it_to_its_bytes(audit, owner):
    """Each entry once, whether the bytes, the limit or the chain's begin ends a page."""
    for size_bytes in (10, 500_000, 500_000, 500_000, 10, 2 * PAGE_BYTES, 10, 10, 10):
        owner.execute(_WRITE, (1,))
        owner.execute(_FILL, (size_bytes,))
    assert await count_of(audit) == 9

    pages, before = [], None
    while True:
        page = await audit.page(AuditFilter(action="key.created"), before=before, limit=3)
        pages.append([one.seq for one in page.entries])
        before = page.before
        if before is None:
            break

    assert pages == [[9, 8, 7], [6], [5, 4, 3], [2, 1]]
    (first,) = (await audit.page(AuditFilter(), before=2, limit=3)).entries
    assert len(first.entry.detail["text"]) == 10


def old_day(owner: psycopg.Connection, days: int, rows: int) -> str:
    """Entries of so many days ago, as if they had been written then."""
    row = owner.execute(
        "select ((now() at time zone 'utc')::date - %s::integer)::text", (days,)
    ).fetchone()
    day = row[0]
    owner.execute(
        f"create table audit_entries_{day.replace('-', '')} partition of audit_entries "
        f"for values from ('{day}') to (date '{day}' + 1)"
    )
    owner.execute(
        "insert into audit_entries (day, at, actor, actor_name, action, target) "
        f"select '{day}', '{day}', 'a', 'a', 'key.created', 'k' "
        "from generate_series(1, %s::integer)",
        (rows,),
    )
    return day


async def test_a_day_that_is_old_and_sealed_is_dropped_and_the_chain_holds(pools, audit, owner):
    upkeep = PostgresUpkeep(pool=pools.housekeeping, holder="one")
    for days in (403, 402):
        old_day(owner, days, 4)
        assert await count_of(audit) == 4
    owner.execute(_WRITE, (3,))
    assert await count_of(audit) == 3
    async with upkeep.store_turn() as store:
        assert store is not None
        days_left = await store.old_audit_days(keep_days=1)
        assert len(days_left) == 2
        for day in days_left:
            assert await store.drop_audit(day, keep_days=1)
            assert await count_of(audit) == 1
            assert await is_valid(audit)
        assert await store.old_audit_days(keep_days=1) == []
    dropped = await audit.page(AuditFilter(action="audit.day_dropped"), before=None, limit=5)
    assert [entry.entry.target for entry in dropped.entries] == [
        str(day) for day in reversed(days_left)
    ]
    # The last seal of the dropped days stays: the chain hangs on it.
    assert await audit.bounds() == (8, 13)


async def test_a_day_that_is_young_or_not_sealed_stays(pools, audit, owner):
    upkeep = PostgresUpkeep(pool=pools.housekeeping, holder="one")
    young = old_day(owner, 300, 2)
    assert await count_of(audit) == 2
    unsealed = old_day(owner, 500, 2)
    async with upkeep.store_turn() as store:
        assert store is not None
        for day in (young, unsealed):
            assert not await store.drop_audit(day, keep_days=1)
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        owner.execute("select drop_audit_day(%s, 1)", (young,))


@pytest.mark.parametrize(
    "statement",
    [
        "update audit_entries set actor = 'x'",
        "delete from audit_entries",
        "truncate audit_entries",
        "update audit_seals set hash = ''",
        "delete from audit_seals",
        "truncate audit_seals",
        "update audit_policy set retention_days = 1",
        "insert into audit_drops values (now(), now(), 1)",
        "drop table audit_entries",
        "create table mine (a int)",
        "select grant_to_server('rdev_app')",
        "update schema_migrations set version = '1'",
    ],
)
async def test_the_serving_role_changes_nothing_of_the_log(
    migrated_dsn: str, owner: psycopg.Connection, statement: str
):
    owner.execute(_WRITE, (1,))
    with (
        psycopg.connect(as_server(migrated_dsn), autocommit=True) as server,
        pytest.raises(errors.InsufficientPrivilege),
    ):
        server.execute(statement)


async def test_the_serving_role_changes_no_partition_that_is_made_later(migrated_dsn, owner):
    with psycopg.connect(as_server(migrated_dsn), autocommit=True) as server:
        server.execute("select ensure_audit_partitions(20)")
        server.execute("select ensure_output_partitions(20)")
        server.execute(_WRITE, (1,))
        names = owner.execute(
            "select inhrelid::regclass::text from pg_inherits "
            "where inhparent = 'audit_entries'::regclass"
        ).fetchall()
        assert len(names) == 21
        for (name,) in names:
            for statement in (f"delete from {name}", f"update {name} set actor = ''"):
                with pytest.raises(errors.InsufficientPrivilege):
                    server.execute(statement)


def test_it_migrates_down_and_up_again(database_dsn: str):
    migrate.up(database_dsn)
    migrate.down(database_dsn)
    migrate.up(database_dsn)
    with psycopg.connect(as_server(database_dsn), autocommit=True) as server:
        server.execute(_WRITE, (1,))


def test_a_role_that_may_make_no_roles_migrates_too(database_dsn: str, server_dsn: str):
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute("drop role if exists plain_owner")
        admin.execute("create role plain_owner nologin")
    with psycopg.connect(database_dsn, autocommit=True) as admin:
        admin.execute("grant all on schema public to plain_owner")
        name = admin.info.dbname
        admin.execute(f"grant all on database {name} to plain_owner")
    dsn = psycopg.conninfo.make_conninfo(database_dsn, options="-c role=plain_owner")
    migrate.up(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_WRITE, (1,))
        assert connection.execute("select sealed from seal_audit(10)").fetchone() is not None
