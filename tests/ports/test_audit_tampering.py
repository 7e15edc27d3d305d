"""What an owner of the database can do to the audit log, and what verification says to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.audit import PostgresAudit
from rdev.domain.audit import AuditFilter, Denial, Entry
from rdev.domain.audit_chain import Checkpoint, FaultKind, canonical, next_hash
from rdev.services import audit_verify
from rdev.services.audit_verify import AuditVerifier
from tests.ports.conftest import Pools

ENTRIES = 40


@dataclass(kw_only=True)
class Log:
    """A sealed log, and the hands of an owner."""

    audit: PostgresAudit
    owner: psycopg.Connection

    async def fault(self, *kept: Checkpoint) -> tuple[FaultKind, int] | None:
        verifier = AuditVerifier(chain=self.audit)
        verdict = await verifier.verify()
        kept_since = datetime.now(UTC) - timedelta(days=400)
        fault = verdict.fault or await verifier.compare(
            kept, dropped=verdict.dropped, kept_since=kept_since
        )
        return None if fault is None else (fault.kind, fault.seq)

    async def seal(self) -> None:
        while (sealed := await self.audit.seal(limit=1_000)) is not None and sealed.count:
            pass

    async def checkpoint(self) -> Checkpoint:
        bounds = await self.audit.bounds()
        assert bounds is not None
        found = await self.audit.place(bounds[1])
        assert found is not None
        return Checkpoint(place=found, at=datetime.now(UTC))

    def write(self, count: int) -> None:
        self.owner.execute(
            """
            insert into audit_entries (actor, actor_name, ip, action, target, project, detail)
            select 'key_' || n, 'name', '10.0.0.1', 'command.submitted', 'cmd_' || n, 'demo',
                   jsonb_build_object('n', n)
            from generate_series(1, %s::integer) n
            """,
            (count,),
        )

    def entry_of(self, seq: int) -> int:
        row = self.owner.execute("select entry from audit_seals where seq = %s", (seq,)).fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture
def owner(migrated_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def log(pools: Pools, owner: psycopg.Connection) -> Log:
    log = Log(audit=PostgresAudit(pool=pools.requests), owner=owner)
    for _ in range(4):
        log.write(ENTRIES // 4)
    await log.seal()
    return log


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is looked for stands in many places of a batch."""
    monkeypatch.setattr(audit_verify, "BATCH", 7)
    monkeypatch.setattr(audit_verify, "SEALED_WITHIN_S", 0.01)


async def test_an_untouched_log_verifies(log: Log):
    verdict = await AuditVerifier(chain=log.audit).verify()
    assert (verdict.fault, verdict.checked, verdict.more) == (None, ENTRIES, False)
    assert await log.fault(await log.checkpoint()) is None


async def test_it_can_be_verified_in_parts(log: Log):
    verifier = AuditVerifier(chain=log.audit)
    first = await verifier.verify(limit=15)
    assert (first.checked, first.last.seq, first.more) == (15, 15, True)
    rest = await verifier.verify(after=first.last.seq)
    assert (rest.checked, rest.last.seq, rest.more) == (ENTRIES - 15, ENTRIES, False)


@pytest.mark.parametrize(
    "change",
    [
        "actor = 'somebody else'",
        "at = at - interval '1 microsecond'",
        "detail = detail || '{\"x\": 1}'",
        "ip = null",
        "request_id = ''",
        "outcome = 'denied'",
        "xid = '3'",
    ],
)
async def test_an_edited_entry_is_found(log: Log, change: str):
    log.owner.execute(f"update audit_entries set {change} where id = %s", (log.entry_of(21),))
    found = await log.fault()
    assert found in {(FaultKind.EDITED, 21), (FaultKind.REORDERED, 20)}


async def test_a_deleted_entry_is_found(log: Log):
    log.owner.execute("delete from audit_entries where id = %s", (log.entry_of(14),))
    assert await log.fault() == (FaultKind.DELETED, 14)


async def test_an_entry_that_is_deleted_with_its_seal_is_found(log: Log):
    log.owner.execute("delete from audit_entries where id = %s", (log.entry_of(14),))
    log.owner.execute("delete from audit_seals where seq = 14")
    assert await log.fault() == (FaultKind.SEAL_MISSING, 14)


async def test_a_beginning_that_is_cut_off_is_found(log: Log):
    log.owner.execute("delete from audit_seals where seq <= 5")
    assert await log.fault() == (FaultKind.SEAL_MISSING, 1)


async def test_an_entry_that_is_inserted_before_others_is_found(log: Log):
    log.owner.execute(
        """
        insert into audit_entries (xid, actor, actor_name, action, target)
        select e.xid, 'a', 'a', 'key.created', 'k' from audit_entries e where e.id = %s
        """,
        (log.entry_of(20),),
    )
    log.write(3)
    await log.seal()
    assert await log.fault() == (FaultKind.INSERTED, 21)


async def test_an_entry_that_is_put_into_another_day_is_found(log: Log):
    log.owner.execute(
        """
        create table audit_entries_20200101 partition of audit_entries
        for values from ('2020-01-01') to ('2020-01-02')
        """
    )
    log.owner.execute(
        """
        insert into audit_entries (day, at, actor, actor_name, action, target)
        values ('2020-01-01', '2020-01-01', 'a', 'a', 'key.created', 'k')
        """
    )
    await log.seal()
    assert await log.fault() == (FaultKind.INSERTED, ENTRIES + 1)


async def test_an_entry_that_is_inserted_before_the_first_is_found(log: Log):
    log.owner.execute(
        "insert into audit_entries (id, xid, actor, actor_name, action, target) "
        "values (0, '3', 'a', 'a', 'key.created', 'k')"
    )
    await log.seal()
    assert await log.fault() == (FaultKind.INSERTED, 1)


async def test_an_entry_that_is_inserted_is_found_although_another_is_not_in_its_order(log: Log):
    """As many seals and entries, and none for the other: a count of both tells nothing."""
    log.owner.execute(
        """
        insert into audit_entries (xid, actor, actor_name, action, target)
        values ('4000000000000000000', 'a', 'a', 'key.created', 'k')
        """
    )
    log.write(3)
    for _ in range(3):
        await log.seal()
    log.owner.execute(
        """
        insert into audit_entries (xid, actor, actor_name, action, target)
        select e.xid, 'a', 'a', 'key.created', 'k' from audit_entries e where e.id = %s
        """,
        (log.entry_of(20),),
    )
    log.write(3)
    await log.seal()
    assert await log.fault() == (FaultKind.INSERTED, 21)


def forge_drop(owner: psycopg.Connection, anchor: int, day: str) -> None:
    """The entry that a day leaves which was dropped after its time, and its row."""
    owner.execute(
        """
        with made as (
            insert into audit_entries (actor, actor_name, action, target, detail)
            select 'server', 'server', 'audit.day_dropped', %(day)s,
                   jsonb_build_object('entries', 1, 'anchor_seq', seq,
                                      'anchor_hash', encode(hash, 'hex'))
            from audit_seals where seq = %(anchor)s
            returning day, id
        )
        insert into audit_drops (day, entry_day, entry) select %(day)s::date, day, id from made
        """,
        {"day": day, "anchor": anchor},
    )


async def test_a_beginning_that_is_cut_off_as_if_it_were_old_is_found_by_a_checkpoint(log: Log):
    kept = await log.checkpoint()
    log.write(3)
    await log.seal()
    forge_drop(log.owner, ENTRIES + 1, "2020-01-01")
    await log.seal()
    log.owner.execute(
        "delete from audit_entries e using audit_seals s where s.entry = e.id and s.seq <= %s",
        (ENTRIES + 1,),
    )
    log.owner.execute("delete from audit_seals where seq <= %s", (ENTRIES,))
    assert await log.fault() is None
    assert await log.fault(kept) == (FaultKind.PARTITION_LOST, ENTRIES)


async def test_a_beginning_that_is_cut_off_as_if_today_were_old_is_found(log: Log):
    today = datetime.now(UTC).date().isoformat()
    forge_drop(log.owner, 5, today)
    await log.seal()
    log.owner.execute("delete from audit_seals where seq < 5")
    assert await log.fault() == (FaultKind.SEAL_MISSING, 1)


async def test_a_day_that_is_lost_as_if_it_were_old_is_found_by_a_checkpoint(log: Log):
    kept = await log.checkpoint()
    log.write(3)
    forge_drop(log.owner, 1, "2020-01-01")
    await log.seal()
    log.owner.execute(
        "delete from audit_entries e using audit_seals s "
        "where s.entry = e.id and s.seq between 2 and %s",
        (ENTRIES,),
    )
    log.owner.execute(
        "update audit_seals set day = '2020-01-01' where seq between 2 and %s", (ENTRIES,)
    )
    assert await log.fault() is None
    assert await log.fault(kept) == (FaultKind.PARTITION_LOST, ENTRIES)


async def test_an_older_checkpoint_says_nothing_of_what_came_after_it(log: Log):
    """Who can put an older file back hides what was cut off since: keep it where they cannot."""
    older = await log.checkpoint()
    log.write(3)
    await log.seal()
    newer = await log.checkpoint()
    log.owner.execute(
        "delete from audit_entries e using audit_seals s where s.entry = e.id and s.seq > %s",
        (ENTRIES,),
    )
    log.owner.execute("delete from audit_seals where seq > %s", (ENTRIES,))
    assert await log.fault(older) is None
    assert await log.fault(older, newer) == (FaultKind.TAIL_CUT, ENTRIES + 1)
    # In whatever order they come: servers share a file.
    assert await log.fault(newer, older) == (FaultKind.TAIL_CUT, ENTRIES + 1)


async def test_a_log_that_is_emptied_is_found_by_a_checkpoint(log: Log):
    kept = await log.checkpoint()
    log.owner.execute("truncate audit_entries, audit_seals")
    assert await log.fault() is None
    assert await log.fault(kept) == (FaultKind.TAIL_CUT, 1)


@pytest.mark.parametrize("entries", [0, 1])
async def test_a_log_of_hardly_anything_verifies(
    pools: Pools, owner: psycopg.Connection, entries: int
):
    log = Log(audit=PostgresAudit(pool=pools.requests), owner=owner)
    log.write(entries)
    await log.seal()
    verdict = await AuditVerifier(chain=log.audit).verify()
    assert (verdict.fault, verdict.checked, verdict.more) == (None, entries, False)


async def test_it_verifies_while_sealing_goes_on(log: Log):
    async def write(done: trio.Event) -> None:
        for _ in range(30):
            log.write(5)
            await log.seal()
        done.set()

    done = trio.Event()
    rounds = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, done)
        while not done.is_set():
            assert await log.fault(await log.checkpoint()) is None
            rounds += 1
    assert rounds > 1


async def test_a_clock_that_is_set_back_does_not_disturb_the_chain(log: Log):
    """Stamps are told, not relied on: the order is that of transactions."""
    for hours in (-30, 30, 0):
        log.owner.execute(
            "insert into audit_entries (at, actor, actor_name, action, target) "
            "values (now() + %s * interval '1 hour', 'a', 'a', 'key.created', 'k')",
            (hours,),
        )
        await log.seal()
    assert await log.fault(await log.checkpoint()) is None


async def test_entries_that_changed_places_are_found(log: Log):
    one, two = log.entry_of(20), log.entry_of(21)
    log.owner.execute("update audit_seals set entry = -1 where seq = 20")
    log.owner.execute("update audit_seals set entry = %s where seq = 21", (one,))
    log.owner.execute("update audit_seals set entry = %s where seq = 20", (two,))
    assert await log.fault() == (FaultKind.REORDERED, 20)


async def test_a_tail_that_is_cut_off_is_found_by_a_checkpoint(log: Log):
    kept = await log.checkpoint()
    log.owner.execute(
        "delete from audit_entries e using audit_seals s where s.entry = e.id and s.seq > 30"
    )
    log.owner.execute("delete from audit_seals where seq > 30")
    assert await log.fault() is None
    assert await log.fault(kept) == (FaultKind.TAIL_CUT, 31)


async def test_a_day_that_is_lost_is_found(log: Log):
    log.owner.execute(
        "do $$ begin execute format('drop table %I', "
        "'audit_entries_' || to_char((now() at time zone 'utc')::date, 'YYYYMMDD')); end $$"
    )
    assert await log.fault() == (FaultKind.PARTITION_LOST, 1)


async def test_a_chain_that_is_computed_anew_is_found_by_a_checkpoint(log: Log):
    kept = await log.checkpoint()
    log.owner.execute("update audit_entries set actor = 'x' where id = %s", (log.entry_of(9),))
    log.owner.execute("truncate audit_seals")
    await log.seal()
    assert await log.fault() is None
    assert await log.fault(kept) == (FaultKind.RECOMPUTED, ENTRIES)


async def test_a_function_of_the_database_that_lies_is_not_asked(log: Log):
    log.owner.execute("update audit_entries set actor = 'x' where id = %s", (log.entry_of(9),))
    log.owner.execute(
        """
        create or replace function audit_bytes(e audit_entries) returns bytea
        language sql as $$ select ''::bytea $$
        """
    )
    assert await log.fault() == (FaultKind.EDITED, 9)


async def test_denials_are_entries(log: Log):
    denial = Denial(
        actor="anonymous",
        actor_name="",
        ip="192.0.2.1",
        request_id="r",
        reason="UNAUTHORIZED",
        route="GET /projects",
    )
    await log.audit.add_denials([denial])
    await log.seal()
    page = await log.audit.page(AuditFilter(action="access.denied"), before=None, limit=10)
    (found,) = page.entries
    assert (found.entry.outcome, found.entry.ip) == ("denied", "192.0.2.1")
    assert found.entry.detail == {"reason": "UNAUTHORIZED"}
    assert next_hash(found.prev_hash or b"", canonical(found.entry)) == found.hash


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
DETAIL = st.dictionaries(
    TEXT, st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=5,
    ), max_size=4,
)  # fmt: skip


@given(
    texts=st.tuples(TEXT, TEXT, TEXT, TEXT),
    maybe=st.tuples(*[st.none() | TEXT] * 3),
    detail=DETAIL,
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_database_and_the_domain_make_the_same_bytes(owner, texts, maybe, detail):
    row = owner.execute(
        """
        insert into audit_entries (actor, actor_name, action, target, ip, request_id, project,
                                   detail)
        values (%s, %s, %s, %s, %s, %s, %s, %s)
        returning *, audit_bytes(audit_entries) as bytes
        """,
        (*texts, *maybe, Jsonb(detail)),
    )
    names = [column.name for column in row.description]
    values = dict(zip(names, row.fetchone(), strict=True))
    made = values.pop("bytes")

    assert canonical(Entry(**values | {"xid": int(values["xid"])})) == made
