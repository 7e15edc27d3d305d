"""Deliveries in PostgreSQL: claiming them under leases, and what comes of them.

The claim is a function of `sql/0019_webhook_shares.sql`, because its steps need snapshots of their
own. All times are the database's. Lock order: endpoints, then what is being sent, then lanes, then
what is pending; a claim never waits for a lane, and who buries never for a delivery.
"""

import json
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from uuid import UUID

from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import Action
from rdev.domain.deliveries import (
    DISABLE_AFTER_S,
    EVENT_PREFIX,
    QUICK_S,
    DeadReason,
    DeliveryLease,
    DeliveryStatus,
    Owed,
    OwnerShares,
    Settled,
)
from rdev.domain.sending import Outcome
from rdev.domain.traces import parse_stored
from rdev.domain.webhooks import DisabledReason, WebhookId, webhook_id, webhook_uuid
from rdev.ports.deliveries import SettleResult, TickResult

# So many that outlived their lease are given back at once, and so many endpoints are looked at.
RECOVER_MAX = 1_000
_INTERRUPTED = "the server that made the attempt ended; whether it arrived is unknown"

_CLAIM = """
select id, lease_id, webhook_id, event_id, attempt, failures, is_ordered, is_trusted,
       is_allowed, url, payload, secret, previous_secret, owner, message_trace(payload)
from claim_deliveries(%s, %s, %s, %s, %s, %s, %s)
"""

# One row of `given` for each attempt. Only what is still under that very lease is updated, and all
# that follows is drawn from what was updated. Success wins where one endpoint had both, but no
# endpoint is trusted of whose attempts one was slow, accepted or not. The rows of lanes change with
# the first failure and the first success after it, not with every attempt.
# (`status || ''`: by the primary key, where the planner would read all that is under way.)
_SETTLE = """
with given as (
    select * from unnest(
        %(ids)s::uuid[], %(leases)s::bigint[], %(statuses)s::text[], %(reasons)s::text[],
        %(again_in_s)s::float8[], %(sent)s::boolean[], %(ats_s)s::float8[],
        %(answers)s::integer[], %(faults)s::text[], %(details)s::text[],
        %(latencies_ms)s::integer[], %(versions)s::text[], %(headers)s::jsonb[],
        %(bodies)s::bytea[], %(truncated)s::boolean[]
    ) g (id, lease_id, status, reason, again_in_s, sent, ago_s, answer, fault, detail, latency_ms,
         version, headers, body, truncated)
), settled as (
    update deliveries d
    set status = g.status, reason = g.reason, lease_id = null, lease_until = null, holder = null,
        attempt = case when g.sent then d.attempt else d.attempt - 1 end,
        failures = case when g.status = 'pending' then d.failures + 1 else d.failures end,
        due = case when (select w.is_ordered from webhooks w where w.id = d.webhook_id)
                   then '-infinity'
                   else clock_timestamp() + make_interval(secs => g.again_in_s) end,
        finished_at = case when g.status <> 'pending' then clock_timestamp() end
    from given g
    where d.id = g.id and d.lease_id = g.lease_id and d.status || '' = 'sending'
    returning d.id, d.webhook_id, d.attempt, d.due = '-infinity' as is_ordered, g.status, g.sent,
              g.again_in_s, g.ago_s, g.answer, g.fault, g.detail, g.latency_ms, g.version,
              g.headers, g.body, g.truncated
), logged as (
    insert into delivery_attempts (delivery_id, number, at, status, fault, detail, latency_ms,
                                   http_version, request_headers, body, truncated)
    select id, attempt, clock_timestamp() - make_interval(secs => ago_s), answer, fault, detail,
           latency_ms, version, headers, body, truncated
    from settled
    where sent
), judged as (
    select webhook_id, bool_or(status = 'delivered') as is_good,
           bool_or(status = 'delivered') and bool_and(ago_s <= %(quick_s)s) as is_quick,
           max(again_in_s) filter (where is_ordered and status = 'pending') as hold_s
    from settled
    where sent
    group by webhook_id
), moved as (
    update webhook_lanes l
    set is_trusted = j.is_quick,
        failing_since = case when j.is_good then null
                             else coalesce(l.failing_since, clock_timestamp()) end,
        held_until = case when j.is_good then '-infinity'
                          else greatest(l.held_until, coalesce(
                               clock_timestamp() + make_interval(secs => j.hold_s),
                               '-infinity')) end
    from judged j
    where l.webhook_id = j.webhook_id
      and (l.is_trusted <> j.is_quick or (l.failing_since is null) <> j.is_good
           or j.hold_s is not null)
)
select s.id, s.webhook_id,
       s.sent and s.status <> 'delivered' and coalesce(
           l.failing_since < clock_timestamp() - make_interval(secs => %(disable_s)s), false)
from settled s
left join webhook_lanes l on l.webhook_id = s.webhook_id
"""

_GIVEN_BACK = """
update deliveries d
set status = 'pending', lease_id = null, lease_until = null, holder = null,
    attempt = case when %(sent)s then d.attempt else d.attempt - 1 end
"""
_LOG_INTERRUPTED = """
insert into delivery_attempts (delivery_id, number, fault, detail)
select id, attempt, 'interrupted', %(detail)s from again where %(sent)s
"""

_RELEASE = f"""
with again as (
    {_GIVEN_BACK}
    from unnest(%(ids)s::uuid[], %(leases)s::bigint[]) g (id, lease_id)
    where d.id = g.id and d.lease_id = g.lease_id and d.status || '' = 'sending'
    returning d.id, d.attempt
)
{_LOG_INTERRUPTED}
"""

# `deliveries_sending` has only what is under way.
_RELEASE_LATE = f"""
with late as (
    select id from deliveries
    where status = 'sending' and lease_until < clock_timestamp()
    order by id
    limit {RECOVER_MAX}
    for update skip locked
), again as (
    {_GIVEN_BACK}
    from late
    where d.id = late.id
    returning d.id, d.attempt
)
{_LOG_INTERRUPTED}
"""  # noqa: S608

_RELEASE_HOLDER = f"""
with mine as (
    select id from deliveries
    where status = 'sending' and holder = %(holder)s
    order by id
    for update
), again as (
    {_GIVEN_BACK}
    from mine
    where d.id = mine.id
    returning d.id, d.attempt
)
{_LOG_INTERRUPTED}
"""  # noqa: S608

_HOLD = """
update webhook_lanes
set held_until = greatest(held_until, clock_timestamp() + make_interval(secs => %s))
where webhook_id = %s
"""

_ENTRIES = """
entry as (
    insert into audit_entries (actor, actor_name, action, target, detail)
    select 'server', '', %(action)s, 'whk_' || encode(uuid_send(id), 'hex'),
           jsonb_build_object('reason', %(reason)s::text)
    from stopped where was_enabled
)
"""
_LOCK = """
select from webhooks where id = any(%(ids)s) order by id for no key update
"""
_DISABLE = f"""
with stopped as materialized (
    select %(id)s::uuid as id, disable_webhook(%(id)s, %(reason)s) as was_enabled
), {_ENTRIES}
select count(*) from stopped where was_enabled
"""  # noqa: S608

# What one statement disables it still counts as enabled: it sees the rows of its beginning.
_END_ORPHANS = f"""
with stopped as materialized (
    select id, disable_webhook(id, %(reason)s) as was_enabled
    from (select id from webhooks where is_enabled and not is_owner_good(owner) order by id) ended
), {_ENTRIES}
select ended, enabled - ended
from (select count(*) as ended from stopped where was_enabled) s,
     (select count(*) as enabled from webhooks where is_enabled) w
"""  # noqa: S608

# By `deliveries_pending` and `deliveries_sending`, so its cost is in what is owed. What waits for
# an endpoint to be enabled is nobody's lag; what is left of one that was deleted is owed no more.
_OLDEST = """
select coalesce(greatest(0, extract(epoch from clock_timestamp() - least(
    (select min(created_at) from deliveries
     where status = 'pending'
       and webhook_id in (select webhook_id from webhook_lanes where is_open)),
    (select min(created_at) from deliveries where status = 'sending')
))), 0)::float8
"""

_OVERFLOWING = """
select l.webhook_id, p.pending
from webhook_lanes l
cross join lateral (
    select count(*) as pending from (
        select from deliveries d
        where d.webhook_id = l.webhook_id and d.status = 'pending'
        limit %(looked_at)s
    ) waiting
) p
where p.pending > %(pending_max)s
"""

_BURY = """
with oldest as (
    select id from deliveries
    where webhook_id = %(webhook)s and status = 'pending'
    order by id
    limit %(excess)s
    for no key update skip locked
), buried as (
    update deliveries d
    set status = 'dead', reason = 'overflow', finished_at = clock_timestamp()
    from oldest
    where d.id = oldest.id and d.status = 'pending'
    returning d.id
)
update webhooks
set overflowed = overflowed + (select count(*) from buried)
where id = %(webhook)s
returning (select count(*) from buried)
"""
# Over the bound, so many are buried in one statement.
BURY_MAX = 10_000


class PostgresDeliveries:
    """The `DeliveryQueue` port. `lease_s`: how long a claim holds, longer than any attempt."""

    def __init__(self, *, pool: Pool, lease_s: float) -> None:
        """`pool` is the dispatcher's own: requests do not wait behind deliveries."""
        self._pool = pool
        self._lease_s = lease_s

    async def claim(
        self, *, holder: str, limit: int, untrusted_limit: int, shares: OwnerShares | None = None
    ) -> list[Owed]:
        """See `DeliveryQueue.claim`."""
        bounds = shares or OwnerShares(most=limit, untrusted_most=limit, held={})
        values = (
            holder,
            self._lease_s,
            limit,
            untrusted_limit,
            bounds.most,
            bounds.untrusted_most,
            Jsonb({str(owner or ""): held for owner, held in bounds.held.items()}),
        )
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(binary=True)
                await cursor.execute(_CLAIM, values)
                return [_to_owed(*row) for row in await cursor.fetchall()]

    async def settle(self, settled: Sequence[Settled]) -> SettleResult:
        """See `DeliveryQueue.settle`."""
        # In order of id: two statements never wait for each other in a ring.
        ordered = sorted(settled, key=lambda one: one.owed.lease.delivery)
        gone = {one.owed.lease.delivery for one in settled if _is_gone(one)}
        disabled = set()
        with translate_errors():
            async with self._pool.connection() as connection, _transaction(connection, needed=gone):
                if gone:
                    ended = [webhook_uuid(one.owed.webhook) for one in settled if _is_gone(one)]
                    await connection.execute(_LOCK, {"ids": ended})
                cursor = await connection.execute(_SETTLE, _settle_parameters(ordered))
                rows = await cursor.fetchall()
                for webhook in sorted({row[1] for row in rows if row[0] in gone}):
                    await connection.execute(_DISABLE, _stop(DisabledReason.GONE, webhook))
                    disabled.add(webhook_id(webhook))
        found = {row[0] for row in rows}
        return SettleResult(
            stale=frozenset(one.owed.lease.delivery for one in settled) - found,
            disabled=frozenset(disabled),
            failing_too_long=frozenset(webhook_id(row[1]) for row in rows if row[2]) - disabled,
        )

    async def release(self, leases: Sequence[DeliveryLease], *, sent: bool) -> None:
        """See `DeliveryQueue.release`."""
        values = {
            "ids": [lease.delivery for lease in leases],
            "leases": [lease.id for lease in leases],
            "sent": sent,
            "detail": _INTERRUPTED,
        }
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_RELEASE, values)

    async def release_holder(self, holder: str) -> int:
        """See `DeliveryQueue.release_holder`."""
        values = {"holder": holder, "sent": True, "detail": _INTERRUPTED}
        with translate_errors():
            async with self._pool.connection() as connection:
                return (await connection.execute(_RELEASE_HOLDER, values)).rowcount

    async def hold(self, webhook: WebhookId, *, for_s: float) -> None:
        """See `DeliveryQueue.hold`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_HOLD, (for_s, webhook_uuid(webhook)))

    async def disable(self, webhook: WebhookId, reason: DisabledReason) -> bool:
        """See `DeliveryQueue.disable`."""
        return bool(await self._number(_DISABLE, _stop(reason, webhook_uuid(webhook))))

    async def tick(self) -> TickResult:
        """See `DeliveryQueue.tick`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                values = {"sent": True, "detail": _INTERRUPTED}
                interrupted = (await connection.execute(_RELEASE_LATE, values)).rowcount
                cursor = await connection.execute(_END_ORPHANS, _stop(DisabledReason.KEY_ENDED))
                row = await cursor.fetchone()
        ended, enabled = row or (0, 0)
        return TickResult(interrupted=interrupted, ended=ended, enabled=enabled)

    async def oldest_undelivered_s(self) -> float:
        """See `DeliveryQueue.oldest_undelivered_s`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                row = await (await connection.execute(_OLDEST)).fetchone()
        return 0.0 if row is None else float(row[0])

    async def bury_overflow(self, *, pending_max: int) -> int:
        """See `DeliveryQueue.bury_overflow`."""
        buried = 0
        bounds = {"pending_max": pending_max, "looked_at": pending_max + BURY_MAX}
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_OVERFLOWING, bounds)
                for webhook, pending in await cursor.fetchall():
                    values = {"webhook": webhook, "excess": pending - pending_max}
                    async with connection.transaction():
                        await connection.execute(_LOCK, {"ids": [webhook]})
                        row = await (await connection.execute(_BURY, values)).fetchone()
                    buried += 0 if row is None else row[0]
        return buried

    async def _number(self, statement: str, values: Parameters = ()) -> int:
        with translate_errors():
            async with self._pool.connection() as connection:
                row = await (await connection.execute(statement, values)).fetchone()
                return 0 if row is None else int(row[0])


def _is_gone(one: Settled) -> bool:
    return one.verdict.reason is DeadReason.GONE


def _transaction(
    connection: TrioConnection[TupleRow], *, needed: Collection[UUID]
) -> AbstractAsyncContextManager[object]:
    """A transaction where there are several statements; one alone is one by itself."""
    return connection.transaction() if needed else nullcontext()


def _to_owed(
    id: UUID,
    lease_id: int,
    webhook: UUID,
    event: UUID,
    attempt: int,
    failures: int,
    is_ordered: bool,
    is_trusted: bool,
    is_allowed: bool,
    url: str,
    payload: str,
    secret: bytes,
    previous: bytes | None,
    owner: UUID | None,
    trace: str | None,
) -> Owed:
    return Owed(
        lease=DeliveryLease(delivery=id, id=lease_id),
        webhook=webhook_id(webhook),
        event=EVENT_PREFIX + event.hex,
        attempt=attempt,
        failures=failures,
        is_ordered=is_ordered,
        is_trusted=is_trusted,
        is_allowed=is_allowed,
        url=url,
        payload=payload.encode(),
        secrets=(bytes(secret),) if previous is None else (bytes(secret), bytes(previous)),
        owner=owner,
        trace=parse_stored(trace),
    )


def _stop(reason: DisabledReason, webhook: UUID | None = None) -> dict[str, object]:
    """What `_DISABLE` and, without an endpoint, `_END_ORPHANS` are given."""
    return {"id": webhook, "reason": reason.value, "action": Action.WEBHOOK_DISABLED.value}


def _settle_parameters(settled: Sequence[Settled]) -> dict[str, object]:
    outcomes = [one.outcome for one in settled]
    return {
        "ids": [one.owed.lease.delivery for one in settled],
        "leases": [one.owed.lease.id for one in settled],
        "statuses": [one.verdict.status.value for one in settled],
        "reasons": [one.verdict.reason and one.verdict.reason.value for one in settled],
        "again_in_s": [
            one.verdict.again_in_s if one.verdict.status is DeliveryStatus.PENDING else 0.0
            for one in settled
        ],
        "sent": [outcome is not None for outcome in outcomes],
        "ats_s": [0.0 if outcome is None else outcome.latency_s for outcome in outcomes],
        "answers": [outcome and outcome.status for outcome in outcomes],
        "faults": [outcome and outcome.fault and outcome.fault.value for outcome in outcomes],
        "details": ["" if outcome is None else outcome.detail for outcome in outcomes],
        "latencies_ms": [outcome and round(outcome.latency_s * 1000) for outcome in outcomes],
        "versions": [outcome and outcome.http_version for outcome in outcomes],
        "headers": [_headers(outcome) for outcome in outcomes],
        "bodies": [b"" if outcome is None else outcome.body for outcome in outcomes],
        "truncated": [outcome is not None and outcome.truncated for outcome in outcomes],
        "disable_s": DISABLE_AFTER_S,
        "quick_s": QUICK_S,
    }


def _headers(outcome: Outcome | None) -> str:
    """The request's headers as JSON; signatures came redacted."""
    return "{}" if outcome is None else json.dumps(dict(outcome.request_headers))
