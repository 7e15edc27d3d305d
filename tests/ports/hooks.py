"""A world of webhooks: the ports on a PostgreSQL of the test's own, and on the fake."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol
from uuid import UUID

import uuid_utils.compat
from psycopg.types.json import Jsonb

from rdev.adapters.postgres.deliveries import PostgresDeliveries
from rdev.adapters.postgres.delivery_log import PostgresDeliveryLog
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.postgres.webhooks import PostgresWebhooks
from rdev.domain.deliveries import (
    Delivery,
    DeliveryStatus,
    Owed,
    Settled,
    Verdict,
    delivery_id,
)
from rdev.domain.ids import KeyId, ProjectId, key_uuid
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.sending import Outcome, SendFault
from rdev.domain.webhooks import EventType, NewWebhook, SigningKey, WebhookId, webhook_id
from rdev.ports.deliveries import DeliveryQueue
from rdev.ports.webhooks import DeliveryLog, WebhookStore
from tests.fakes.store import ACTOR

LEASE_S = 600.0
ALL_EVENTS = tuple(EventType)


class Happen(Protocol):
    """Writes events of a command, all in one statement; their UUIDs."""

    def __call__(
        self, *types: str, project: str = "demo", command: UUID | None = None
    ) -> Awaitable[list[UUID]]: ...


@dataclass(slots=True, kw_only=True)
class Hooks:
    """The ports of one store, and the steps that tests have in common."""

    webhooks: WebhookStore
    log: DeliveryLog
    queue: DeliveryQueue
    # That of a server whose leases are over at once.
    brief_queue: DeliveryQueue
    happen: Happen
    # Make a key, and revoke it.
    key: Callable[[frozenset[str] | None], Awaitable[KeyId]]
    revoke: Callable[[KeyId], Awaitable[None]]
    # Make everything of deliveries and lanes so many seconds older.
    age: Callable[[float], Awaitable[None]]
    serial: Iterator[int] = field(default_factory=lambda: count(1))

    async def endpoint(
        self,
        *,
        events: tuple[EventType, ...] = ALL_EVENTS,
        projects: frozenset[str] | None = None,
        is_ordered: bool = False,
        owner: KeyId = ADMIN_KEY_ID,
        url: str = "https://hooks.example.com/",
        secret: bytes = b"sealed",
        public_key: str | None = None,
    ) -> WebhookId:
        new = NewWebhook(
            id=webhook_id(uuid_utils.compat.uuid7()),
            url=url,
            description="",
            events=events,
            project_ids=None if projects is None else frozenset(map(ProjectId, projects)),
            is_ordered=is_ordered,
            is_enabled=True,
            owner=owner,
            key=SigningKey(sealed=secret, public_key=public_key),
        )
        return (await self.webhooks.insert(new, ACTOR)).webhook.id

    async def claim(self, limit: int = 1_000, untrusted_limit: int = 1_000) -> list[Owed]:
        return await self.queue.claim(holder="one", limit=limit, untrusted_limit=untrusted_limit)

    async def trust(self, *webhooks: WebhookId) -> None:
        """Let each accept something."""
        await self.happen("command.queued")
        for owed in await self.claim():
            await self.queue.settle([accepted(owed)])
        for webhook in webhooks:
            assert not await self.waiting(webhook)

    async def deliveries(self, webhook: WebhookId) -> list[Delivery]:
        """Oldest first."""
        found = await self.log.list_of(webhook, within=None, status=None, before=None, limit=1_000)
        return found[::-1]

    async def waiting(self, webhook: WebhookId) -> list[Delivery]:
        found = await self.deliveries(webhook)
        return [one for one in found if one.status is DeliveryStatus.PENDING]

    async def delivery(self, owed: Owed) -> Delivery:
        found = await self.log.get(delivery_id(owed.lease.delivery))
        assert found is not None
        return found


def outcome(status: int | None = 200, *, fault: SendFault | None = None) -> Outcome:
    return Outcome(
        status=status,
        fault=fault,
        detail="",
        latency_s=0.01,
        request_headers={"webhook-id": "evt_1", "webhook-signature": "v1,[redacted]"},
        body=b"\0thanks",
        truncated=False,
        http_version="1.1",
        retry_after=None,
    )


def accepted(owed: Owed) -> Settled:
    verdict = Verdict(status=DeliveryStatus.DELIVERED)
    return Settled(owed=owed, verdict=verdict, outcome=outcome())


def refused(owed: Owed, *, again_in_s: float = 0.0) -> Settled:
    verdict = Verdict(status=DeliveryStatus.PENDING, again_in_s=again_in_s)
    return Settled(owed=owed, verdict=verdict, outcome=outcome(500))


_HAPPEN = """
insert into events (xid, id, type, project, command_id, kind, status, attempt, seq, detail)
select pg_current_xact_id(), e.id, e.type, %(project)s, %(command)s, 'shell',
       split_part(e.type, '.', 2), 1, e.number, %(detail)s
from unnest(%(ids)s::uuid[], %(types)s::text[]) with ordinality e (id, type, number)
order by e.number
"""

_AGE = (
    "update deliveries set due = due - make_interval(secs => %(s)s),"
    " lease_until = lease_until - make_interval(secs => %(s)s),"
    " created_at = created_at - make_interval(secs => %(s)s)",
    "update webhook_lanes set held_until = held_until - make_interval(secs => %(s)s),"
    " failing_since = failing_since - make_interval(secs => %(s)s)",
    "update webhooks set previous_until = previous_until - make_interval(secs => %(s)s)",
)


def postgres_hooks(pool: Pool) -> Hooks:
    """The ports on PostgreSQL."""

    async def happen(*types: str, project: str = "demo", command: UUID | None = None) -> list[UUID]:
        ids = [uuid_utils.compat.uuid7() for _ in types]
        async with pool.connection() as connection:
            values = {
                "ids": ids,
                "types": list(types),
                "project": project,
                "command": command or uuid_utils.compat.uuid7(),
                "detail": Jsonb({"exit_code": 0, "duration_ms": 12}),
            }
            await connection.execute(_HAPPEN, values)
        return ids

    async def key(projects: frozenset[str] | None) -> KeyId:
        id_ = uuid_utils.compat.uuid7()
        async with pool.connection() as connection:
            await connection.execute(
                "insert into api_keys (id, name, scopes, project_ids, created_by)"
                " values (%s, 'a', '{projects:read}', %s, 'key_admin')",
                (id_, None if projects is None else sorted(projects)),
            )
        return KeyId(f"key_{id_.hex}")

    async def revoke(key: KeyId) -> None:
        async with pool.connection() as connection:
            await connection.execute(
                "update api_keys set revoked_at = now() where id = %s", (key_uuid(key),)
            )

    async def age(seconds: float) -> None:
        async with pool.connection() as connection:
            for statement in _AGE:
                await connection.execute(statement, {"s": seconds})

    return Hooks(
        webhooks=PostgresWebhooks(pool=pool),
        log=PostgresDeliveryLog(pool=pool),
        queue=PostgresDeliveries(pool=pool, lease_s=LEASE_S),
        brief_queue=PostgresDeliveries(pool=pool, lease_s=-1.0),
        happen=happen,
        key=key,
        revoke=revoke,
        age=age,
    )
