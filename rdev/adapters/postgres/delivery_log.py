"""The log of deliveries in PostgreSQL, and asking for what is in it again."""

from collections.abc import Collection, Mapping
from datetime import UTC
from uuid import UUID

from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.entries import ENTRY, entry_parameters
from rdev.adapters.postgres.idempotency import find_made, keep, translate_key_in_use
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import Action, Actor
from rdev.domain.deliveries import (
    EVENT_PREFIX,
    DeadReason,
    Delivery,
    DeliveryAttempt,
    DeliveryId,
    DeliveryStatus,
    Redelivery,
    delivery_id,
    delivery_uuid,
    is_delivery_id,
)
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId
from rdev.domain.webhooks import EventType, WebhookId, webhook_id, webhook_uuid
from rdev.ports.webhooks import PingMade

_DELIVERY = """
select d.id, d.webhook_id, d.event_id, d.type, d.project, d.reason, d.attempt, d.created_at,
       d.finished_at, case when d.status = 'sending' then 'pending' else d.status end as status,
       case when d.status in ('pending', 'sending')
            then greatest(d.due, d.created_at, l.held_until) end as due
from deliveries d
left join webhook_lanes l on l.webhook_id = d.webhook_id
"""
_GET = _DELIVERY + "where d.id = %s"

# `deliveries_of_webhook` serves it, of the dead `deliveries_dead`. Ids sort by creation.
_LIST = (
    _DELIVERY
    + """
where d.webhook_id = %(webhook)s
  and (%(before)s::uuid is null or d.id < %(before)s)
  and d.status = any(%(statuses)s)
  and (%(within)s::text[] is null or d.project is null or d.project = any(%(within)s))
order by d.id desc
limit %(limit)s
"""
)
_STATUSES = {
    None: ["pending", "sending", "delivered", "dead"],
    DeliveryStatus.PENDING: ["pending", "sending"],
    DeliveryStatus.DELIVERED: ["delivered"],
    DeliveryStatus.DEAD: ["dead"],
}

_PAYLOAD = """
select m.payload from deliveries d join webhook_messages m on m.id = d.event_id where d.id = %s
"""

_ATTEMPTS = "select * from delivery_attempts where delivery_id = %s order by number"

_AGAIN = """
update deliveries d
set status = 'pending', reason = null, finished_at = null, failures = 0,
    due = case when w.is_ordered then '-infinity' else clock_timestamp() end
"""
# One that is being sent stays as it is; whoever asks is told of it.
_REDELIVER = f"""
with made as (
{_AGAIN}
    from webhooks w
    where d.id = %(id)s and d.status <> 'sending' and w.id = d.webhook_id
      and exists (select from webhook_messages m where m.id = d.event_id)
    returning d.id
)
{ENTRY} from made
"""  # noqa: S608  (constants of ours)

# From the first id of that moment on: ids begin with their milliseconds.
_REDELIVER_SINCE = f"""
with chosen as (
    select id from deliveries
    where webhook_id = %(webhook)s and id >= %(first)s and status = any(%(statuses)s)
      and (%(within)s::text[] is null or project is null or project = any(%(within)s))
    order by id
    limit %(limit)s
)
{_AGAIN}
from chosen c, webhooks w
where d.id = c.id and w.id = d.webhook_id and d.status = any(%(statuses)s)
  and exists (select from webhook_messages m where m.id = d.event_id)
"""  # noqa: S608  (constants of ours)

_PING = """
select owe_message(%(type)s, %(data)s, array[id])
from webhooks
where id = %(webhook)s and is_enabled
"""


class PostgresDeliveryLog:
    """The `DeliveryLog` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def list_of(
        self,
        webhook: WebhookId,
        *,
        within: Collection[ProjectId] | None,
        status: DeliveryStatus | None,
        before: DeliveryId | None,
        limit: int,
    ) -> list[Delivery]:
        """See `DeliveryLog.list_of`."""
        parameters = {
            "webhook": webhook_uuid(webhook),
            "within": None if within is None else sorted(within),
            "before": None if before is None else delivery_uuid(before),
            "statuses": _STATUSES[status],
            "limit": limit,
        }
        return [_to_delivery(row) for row in await self._all(_LIST, parameters)]

    async def get(self, delivery: DeliveryId) -> Delivery | None:
        """See `DeliveryLog.get`."""
        rows = await self._all(_GET, (delivery_uuid(delivery),))
        return _to_delivery(rows[0]) if rows else None

    async def payload(self, delivery: DeliveryId) -> bytes | None:
        """See `DeliveryLog.payload`."""
        rows = await self._all(_PAYLOAD, (delivery_uuid(delivery),))
        return str(rows[0]["payload"]).encode() if rows else None

    async def attempts(self, delivery: DeliveryId) -> list[DeliveryAttempt]:
        """See `DeliveryLog.attempts`."""
        return [_to_attempt(row) for row in await self._all(_ATTEMPTS, (delivery_uuid(delivery),))]

    async def redeliver(self, delivery: DeliveryId, actor: Actor) -> bool:
        """See `DeliveryLog.redeliver`."""
        entry = entry_parameters(actor, Action.WEBHOOK_REDELIVERED, delivery, detail={})
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_REDELIVER, {"id": delivery_uuid(delivery)} | entry)
        return await self.get(delivery) is not None

    async def redeliver_since(self, wanted: Redelivery, actor: Actor, *, limit: int) -> int:
        """See `DeliveryLog.redeliver_since`."""
        statuses = ["delivered", "dead"] if wanted.status is None else _STATUSES[wanted.status]
        since_ms = int(wanted.since.astimezone(UTC).timestamp() * 1000)
        parameters = {
            "webhook": webhook_uuid(wanted.webhook),
            "within": None if wanted.within is None else sorted(wanted.within),
            "first": UUID(int=max(0, since_ms) << 80),
            "statuses": [status for status in statuses if status != "sending"],
            "limit": limit,
        }
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                count = (await connection.execute(_REDELIVER_SINCE, parameters)).rowcount
                if count:
                    await connection.execute(ENTRY, _redelivered(wanted, actor, count))
                return count

    async def ping(
        self,
        webhook: WebhookId,
        data: Mapping[str, str],
        actor: Actor,
        *,
        idempotency: Idempotency | None,
    ) -> PingMade | None:
        """See `DeliveryLog.ping`."""
        parameters = {
            "type": EventType.PING.value,
            "data": Jsonb(dict(data)),
            "webhook": webhook_uuid(webhook),
        }
        # Before all else: what has become of the endpoint since is no matter of a repeat.
        if (earlier := await self._pinged(idempotency)) is not None:
            return earlier
        with translate_key_in_use(), translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                row = await (await connection.execute(_PING, parameters)).fetchone()
                is_own = row is not None
                if row is not None:
                    made = delivery_id(row[0])
                    is_own = await keep(connection, idempotency, made=made)
                    if is_own:
                        await connection.execute(ENTRY, _tested(webhook, made, actor))
                    else:
                        # What was owed just now is not; the key's own delivery stands for it.
                        await connection.execute("delete from deliveries where id = %s", (row[0],))
        if is_own:
            return PingMade(delivery=made)
        # Another request with this key was there first; None: there is none, it is disabled.
        return await self._pinged(idempotency)

    async def _pinged(self, idempotency: Idempotency | None) -> PingMade | None:
        """What the key stands for. Errors: IDEMPOTENCY_MISMATCH."""
        earlier = None if idempotency is None else await find_made(self._pool, idempotency)
        if earlier is None or not is_delivery_id(earlier):
            return None
        return PingMade(delivery=DeliveryId(earlier), is_replay=True)

    async def _all(self, statement: str, parameters: Parameters) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()


def _tested(webhook: WebhookId, made: DeliveryId, actor: Actor) -> dict[str, object]:
    detail = {"delivery_id": made}
    return entry_parameters(actor, Action.WEBHOOK_TESTED, webhook, detail=detail)


def _redelivered(wanted: Redelivery, actor: Actor, count: int) -> dict[str, object]:
    detail = {"since": wanted.since.isoformat(), "status": wanted.status, "count": count}
    return entry_parameters(actor, Action.WEBHOOK_REDELIVERED, wanted.webhook, detail=detail)


def _to_delivery(row: DictRow) -> Delivery:
    project, reason = row["project"], row["reason"]
    return Delivery(
        id=delivery_id(row["id"]),
        webhook=webhook_id(row["webhook_id"]),
        event=EVENT_PREFIX + row["event_id"].hex,
        type=row["type"],
        project=None if project is None else ProjectId(project),
        status=DeliveryStatus(row["status"]),
        reason=None if reason is None else DeadReason(reason),
        attempts=row["attempt"],
        due=row["due"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
    )


def _to_attempt(row: DictRow) -> DeliveryAttempt:
    return DeliveryAttempt(
        number=row["number"],
        at=row["at"],
        status=row["status"],
        fault=row["fault"],
        detail=row["detail"],
        latency_ms=row["latency_ms"],
        http_version=row["http_version"],
        request_headers=row["request_headers"],
        body=bytes(row["body"]),
        truncated=row["truncated"],
    )
