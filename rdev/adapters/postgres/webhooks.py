"""Webhook endpoints in PostgreSQL. Their secrets come here sealed."""

from collections.abc import Collection
from urllib.parse import urlsplit
from uuid import UUID

from psycopg.rows import DictRow, TupleRow, dict_row

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.entries import ENTRY, entry_parameters
from rdev.adapters.postgres.idempotency import find_made, keep, translate_key_in_use
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import Action, Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId, key_id, key_uuid
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.webhooks import (
    LANE_CAP,
    ROTATION_GRACE_S,
    WEBHOOKS_MAX,
    DisabledReason,
    EventType,
    NewWebhook,
    SecretRotation,
    SigningKey,
    Webhook,
    WebhookChange,
    WebhookId,
    is_webhook_id,
    webhook_id,
    webhook_uuid,
)
from rdev.ports.webhooks import WebhookMade

# What to ask where there is no more room; endpoints are deleted by people.
_FULL_RETRY_S = 60.0

_WEBHOOK = """
select w.*, l.failing_since,
       case when w.previous_until > clock_timestamp() then w.previous_until end as grace_until,
       case when w.previous_until > clock_timestamp() then w.previous_public_key end
           as grace_public_key
from webhooks w
left join webhook_lanes l on l.webhook_id = w.id
where w.deleted_at is null
"""
_GET = _WEBHOOK + " and w.id = %s"

_LIST = (
    _WEBHOOK
    + """
  and (%(before)s::uuid is null or w.id < %(before)s)
  and (%(within)s::text[] is null or w.project_ids <@ %(within)s)
order by w.id desc
limit %(limit)s
"""
)

# Whoever makes an endpoint counts alone, on all servers; the statement after this one sees what all
# before it have made. Idempotency keys are kept before it, and nothing is waited for behind it.
_COUNT_ALONE = "select pg_advisory_xact_lock(hashtextextended('rdev.webhooks', 0))"
_COUNT = "select count(*) from webhook_lanes"

_INSERT = """
insert into webhooks (id, url, description, events, project_ids, is_ordered, owner, is_enabled,
                      disabled_reason, disabled_at, secret, public_key)
values (%(id)s, %(url)s, %(description)s, %(events)s, %(project_ids)s, %(is_ordered)s, %(owner)s,
        %(is_enabled)s, case when not %(is_enabled)s then 'requested' end,
        case when not %(is_enabled)s then clock_timestamp() end, %(secret)s, %(public_key)s)
"""
_INSERT_LANE = "insert into webhook_lanes (webhook_id, is_open, cap) values (%s, %s, %s)"

# Being disabled keeps the reason that it has. What was changed or disabled since it was seen stays.
_CHANGE = """
update webhooks
set url = %(url)s, description = %(description)s, events = %(events)s,
    project_ids = %(project_ids)s, is_ordered = %(is_ordered)s, is_enabled = %(is_enabled)s,
    owner = case when %(is_owner_new)s then %(owner)s else owner end,
    disabled_reason = case when not %(is_enabled)s then coalesce(disabled_reason, 'requested') end,
    disabled_at = case when not %(is_enabled)s then coalesce(disabled_at, clock_timestamp()) end,
    updated_at = clock_timestamp()
where id = %(id)s and deleted_at is null
  and updated_at = %(seen_at)s and is_enabled = %(was_enabled)s
"""
_CHANGE_LANE = """
update webhook_lanes
set is_open = %(is_enabled)s, cap = %(cap)s, held_until = '-infinity',
    failing_since = case when %(is_enabled)s and not is_open then null else failing_since end
where webhook_id = %(id)s
"""
# In an ordered endpoint only the order counts; where it was just enabled, all is due.
_CHANGE_PENDING = """
update deliveries
set due = case when %(is_ordered)s then '-infinity' else clock_timestamp() end
where webhook_id = %(id)s and status = 'pending'
  and ((due = '-infinity') <> %(is_ordered)s
       or %(is_enabled)s and not %(was_enabled)s and due > clock_timestamp())
"""

_ROTATE = """
update webhooks
set previous_secret = secret, previous_public_key = public_key,
    secret = %(secret)s, public_key = %(public_key)s, updated_at = clock_timestamp(),
    previous_until = clock_timestamp() + make_interval(secs => %(grace_s)s)
where id = %(id)s and deleted_at is null
"""

# Its deliveries are put away with time; nothing of it is claimed any more.
_DELETE = f"""
with made as (
    update webhooks
    set deleted_at = clock_timestamp(), is_enabled = false, secret = '', previous_secret = null
    where id = %(id)s and deleted_at is null
    returning id
), gone as (delete from webhook_lanes using made where webhook_id = made.id)
{ENTRY} from made
"""  # noqa: S608  (put together from constants)


class PostgresWebhooks:
    """The `WebhookStore` port. Source of contract: `rdev/ports/webhooks.py`."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def insert(self, new: NewWebhook, actor: Actor) -> WebhookMade:
        """See `WebhookStore.insert`."""
        with translate_key_in_use(), translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                is_own = await keep(connection, new.idempotency, made=new.id)
                if is_own:
                    await _insert(connection, new)
                    await connection.execute(ENTRY, _created(new, actor))
        if not is_own:
            assert new.idempotency is not None
            return await self._replayed(new.idempotency)
        return WebhookMade(webhook=await self._made(new.id))

    async def get(self, webhook: WebhookId) -> Webhook | None:
        """See `WebhookStore.get`."""
        rows = await self._all(_GET, (webhook_uuid(webhook),))
        return _to_webhook(rows[0]) if rows else None

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: WebhookId | None, limit: int
    ) -> list[Webhook]:
        """See `WebhookStore.list_all`."""
        parameters = {
            "within": None if within is None else sorted(within),
            "before": None if before is None else webhook_uuid(before),
            "limit": limit,
        }
        return [_to_webhook(row) for row in await self._all(_LIST, parameters)]

    async def change(
        self, webhook: WebhookId, change: WebhookChange, actor: Actor
    ) -> Webhook | None:
        """See `WebhookStore.change`."""
        parameters = {
            "id": webhook_uuid(webhook),
            "seen_at": change.seen_at,
            "was_enabled": change.was_enabled,
            "url": change.url,
            "description": change.description,
            "events": [event.value for event in change.events],
            "project_ids": _sorted(change.project_ids),
            "is_ordered": change.is_ordered,
            "is_enabled": change.is_enabled,
            "is_owner_new": change.owner is not None,
            "owner": None if change.owner is None else _owner_uuid(change.owner),
            "cap": _cap(is_ordered=change.is_ordered),
        }
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                if (await connection.execute(_CHANGE, parameters)).rowcount == 0:
                    return None
                # Lane before deliveries, as a claim.
                await connection.execute(_CHANGE_LANE, parameters)
                await connection.execute(_CHANGE_PENDING, parameters)
                if change.key is not None:
                    key = {"grace_s": ROTATION_GRACE_S, **_key(change.key)}
                    await connection.execute(_ROTATE, parameters | key)
                await connection.execute(ENTRY, _changed(webhook, change, actor))
        return await self.get(webhook)

    async def rotate(self, rotation: SecretRotation, actor: Actor) -> WebhookMade | None:
        """See `WebhookStore.rotate`."""
        parameters = {
            "id": webhook_uuid(rotation.webhook),
            "grace_s": rotation.grace_s,
            **_key(rotation.key),
        }
        with translate_key_in_use(), translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                is_own = await keep(connection, rotation.idempotency, made=rotation.webhook)
                if is_own:
                    if (await connection.execute(_ROTATE, parameters)).rowcount == 0:
                        return None
                    await connection.execute(ENTRY, _rotated(rotation, actor))
        if not is_own:
            assert rotation.idempotency is not None
            return await self._replayed(rotation.idempotency)
        return WebhookMade(webhook=await self._made(rotation.webhook))

    async def delete(self, webhook: WebhookId, actor: Actor) -> bool:
        """See `WebhookStore.delete`."""
        with translate_errors():
            async with self._pool.connection() as connection:
                entry = entry_parameters(actor, Action.WEBHOOK_DELETED, webhook, detail={})
                cursor = await connection.execute(_DELETE, {"id": webhook_uuid(webhook)} | entry)
                return cursor.rowcount == 1

    async def _made(self, webhook: WebhookId) -> Webhook:
        found = await self.get(webhook)
        if found is None:
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no webhook {webhook!r} any more")
        return found

    async def _replayed(self, idempotency: Idempotency) -> WebhookMade:
        made = await find_made(self._pool, idempotency)
        found = await self.get(WebhookId(made)) if made and is_webhook_id(made) else None
        if found is None:
            message = "what this Idempotency-Key stood for has been deleted"
            raise RdevError(ErrorCode.GONE, message)
        return WebhookMade(webhook=found, is_replay=True)

    async def _all(self, statement: str, parameters: Parameters) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()


async def _insert(connection: TrioConnection[TupleRow], new: NewWebhook) -> None:
    await connection.execute(_COUNT_ALONE)
    row = await (await connection.execute(_COUNT)).fetchone()
    if row is not None and row[0] >= WEBHOOKS_MAX:
        message = f"there are {WEBHOOKS_MAX} webhooks already"
        raise RdevError(ErrorCode.TOO_MANY_REQUESTS, message, retry_after_s=_FULL_RETRY_S)
    parameters = {
        "id": webhook_uuid(new.id),
        "url": new.url,
        "description": new.description,
        "events": [event.value for event in new.events],
        "project_ids": _sorted(new.project_ids),
        "is_ordered": new.is_ordered,
        "owner": _owner_uuid(new.owner),
        "is_enabled": new.is_enabled,
        **_key(new.key),
    }
    await connection.execute(_INSERT, parameters)
    cap = _cap(is_ordered=new.is_ordered)
    await connection.execute(_INSERT_LANE, (parameters["id"], new.is_enabled, cap))


def _created(new: NewWebhook, actor: Actor) -> dict[str, object]:
    return entry_parameters(actor, Action.WEBHOOK_CREATED, new.id, detail=_detail(new))


def _changed(webhook: WebhookId, change: WebhookChange, actor: Actor) -> dict[str, object]:
    detail = _detail(change)
    if change.owner is not None:
        detail["key_id"] = change.owner
    return entry_parameters(actor, Action.WEBHOOK_CHANGED, webhook, detail=detail)


def _rotated(rotation: SecretRotation, actor: Actor) -> dict[str, object]:
    detail = {"grace_s": rotation.grace_s, "signature_scheme": rotation.key.scheme}
    return entry_parameters(actor, Action.WEBHOOK_ROTATED, rotation.webhook, detail=detail)


def _detail(said: NewWebhook | WebhookChange) -> dict[str, object]:
    """What an entry tells of an endpoint. Of the URL only where it leads: paths hold secrets."""
    parts = urlsplit(said.url)
    scheme = {} if said.key is None else {"signature_scheme": said.key.scheme}
    return {
        "origin": f"{parts.scheme}://{parts.netloc}",
        "events": [event.value for event in said.events],
        "project_ids": _sorted(said.project_ids),
        "ordered": said.is_ordered,
        "enabled": said.is_enabled,
        **scheme,
    }


def _key(key: SigningKey) -> dict[str, object]:
    return {"secret": key.sealed, "public_key": key.public_key}


def _cap(*, is_ordered: bool) -> int:
    return 1 if is_ordered else LANE_CAP


def _sorted(projects: frozenset[ProjectId] | None) -> list[ProjectId] | None:
    return None if projects is None else sorted(projects)


def _owner_uuid(owner: KeyId) -> UUID | None:
    """The bootstrap key has no row."""
    return None if owner == ADMIN_KEY_ID else key_uuid(owner)


def _to_webhook(row: DictRow) -> Webhook:
    projects, reason = row["project_ids"], row["disabled_reason"]
    return Webhook(
        id=webhook_id(row["id"]),
        url=row["url"],
        description=row["description"],
        events=tuple(EventType(event) for event in row["events"]),
        project_ids=None if projects is None else frozenset(ProjectId(p) for p in projects),
        is_ordered=row["is_ordered"],
        owner=ADMIN_KEY_ID if row["owner"] is None else key_id(row["owner"]),
        is_enabled=row["is_enabled"],
        disabled_reason=None if reason is None else DisabledReason(reason),
        disabled_at=row["disabled_at"],
        failing_since=row["failing_since"],
        overflowed=row["overflowed"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        previous_until=row["grace_until"],
        public_key=row["public_key"],
        previous_public_key=row["grace_public_key"],
    )
