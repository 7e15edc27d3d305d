"""No change without its entry, no entry without its change: 0 in 10,000.

Keys, projects and webhooks are changed over a road that breaks at random bytes, so that a
transaction dies before it, in its middle, in its commit, or between the commit and its reply.
Afterwards the tables are held against the log, both ways, and against what the callers were told.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import trio
import uuid_utils.compat

from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.keys import PostgresKeys
from rdev.adapters.postgres.pool import Pool, open_pool
from rdev.adapters.postgres.projects import PostgresProjects
from rdev.adapters.postgres.webhooks import PostgresWebhooks
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.keys import ADMIN_KEY_ID, Rotation
from rdev.domain.projects import ProjectDefinition
from rdev.domain.webhooks import (
    EventType,
    NewWebhook,
    SecretRotation,
    WebhookChange,
    WebhookId,
    webhook_id,
)
from tests.fakes.key_samples import new_key, secret
from tests.fakes.store import ACTOR
from tests.faults.cut_database import Road

NAME = "over-a-road-that-breaks"
URL = "https://hooks.example.com/"
REACH = "local:here"
WORKERS = 4
DEADLINE_S = 60.0

_KEY = "'key_' || replace({}::text, '-', '')"
_HOOK = "select 'whk_' || replace(id::text, '-', '') from webhooks where "
# To what each change was done, as its table tells.
DONE = {
    "key.created": f"select {_KEY.format('id')} from api_keys",
    "key.revoked": f"select {_KEY.format('id')} from api_keys where revoked_at is not null",
    "key.rotated": f"select {_KEY.format('key_id')} from api_key_secrets "
    "group by key_id having count(*) = 2",
    "project.created": "select id from projects",
    "webhook.created": _HOOK + "true",
    "webhook.changed": _HOOK + "description = 'changed'",
    "webhook.rotated": _HOOK + "previous_until is not null",
    "webhook.deleted": _HOOK + "deleted_at is not null",
}
Change = Callable[[], Awaitable[object]]


@dataclass(slots=True, kw_only=True)
class Changes:
    """The changes that are tried, each of a target at most once, and what was told of them."""

    keys: PostgresKeys
    projects: PostgresProjects
    webhooks: PostgresWebhooks
    tried: int = 0
    # (action, target) that the caller was told it is done, and those of which nothing is known.
    kept: set[tuple[str, str]] = field(default_factory=set)
    lost: set[tuple[str, str]] = field(default_factory=set)

    async def work(self, most: int) -> None:
        """One thing after the other, from its beginning to its end."""
        while self.tried < most:
            for story in (self._key(), self._project(), self._webhook()):
                for action, target, change in story:
                    await self._try(action, target, change)

    async def _try(self, action: str, target: str, change: Change) -> None:
        self.tried += 1
        try:
            done = await change()
        except RdevError as error:
            if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                raise
            self.lost.add((action, target))
            return
        if done is not None and done is not False:
            self.kept.add((action, target))

    def _key(self) -> Iterator[tuple[str, str, Change]]:
        new = new_key()
        key: KeyId = new.id
        turned = Rotation(key=key, secret=secret(), grace_s=60)
        yield "key.created", key, lambda: self.keys.insert(new, ACTOR)
        yield "key.rotated", key, lambda: self.keys.rotate(turned, ACTOR)
        yield "key.revoked", key, lambda: self.keys.revoke(key, ACTOR)

    def _project(self) -> Iterator[tuple[str, str, Change]]:
        made = ProjectDefinition(id=ProjectId(f"p{self.tried}"))
        yield (
            "project.created",
            made.id,
            lambda: self.projects.insert(made, ACTOR, executor="local", reach=REACH),
        )

    def _webhook(self) -> Iterator[tuple[str, str, Change]]:
        new = NewWebhook(
            id=webhook_id(uuid_utils.compat.uuid7()),
            url=URL,
            description="",
            events=(EventType.PING,),
            project_ids=None,
            is_ordered=False,
            is_enabled=True,
            owner=ADMIN_KEY_ID,
            secret=b"sealed",
        )
        hook: WebhookId = new.id
        turned = SecretRotation(webhook=hook, secret=b"fresh", grace_s=60)
        yield "webhook.created", hook, lambda: self.webhooks.insert(new, ACTOR)
        yield "webhook.changed", hook, lambda: self._change(hook)
        yield "webhook.rotated", hook, lambda: self.webhooks.rotate(turned, ACTOR)
        yield "webhook.deleted", hook, lambda: self.webhooks.delete(hook, ACTOR)

    async def _change(self, hook: WebhookId) -> object:
        seen = await self.webhooks.get(hook)
        wanted = WebhookChange(
            seen_at=datetime.now(UTC) if seen is None else seen.updated_at,
            was_enabled=True,
            url=URL,
            description="changed",
            events=(EventType.PING,),
            project_ids=None,
            is_ordered=False,
            is_enabled=True,
            owner=None,
        )
        return await self.webhooks.change(hook, wanted, ACTOR)


@pytest.mark.slow
@pytest.mark.parametrize("most", [400, pytest.param(10_000, marks=pytest.mark.full)])
async def test_an_entry_is_there_exactly_if_its_change_is(
    migrated_dsn: str, quick_place: Path, most: int
) -> None:
    luck = random.Random(most)
    with tempfile.TemporaryDirectory(prefix="rdev-road-", dir=quick_place) as folder:
        road = Road(dsn=migrated_dsn, folder=Path(folder), luck=luck)
        settings = ConnectionSettings(dsn=road.broken_dsn, application_name=NAME)
        async with trio.open_nursery() as nursery:
            await nursery.start(road.run)
            async with open_pool(settings, max_size=WORKERS, wait_s=DEADLINE_S) as pool:
                changes = await changed(pool, most)
            nursery.cancel_scope.cancel()
    await nobody_is_left(migrated_dsn)
    with psycopg.connect(migrated_dsn) as connection:
        done = done_to(connection)
        told = Counter(connection.execute("select action, target from audit_entries").fetchall())
    print(
        f"{changes.tried:,} changes, {len(changes.kept):,} told, {len(changes.lost):,} lost "
        f"({len(changes.lost & done):,} made); cuts: {road.asked:,} asking, {road.told:,} telling"
    )
    assert set(told.values()) == {1}
    assert set(told) == done
    assert changes.kept <= done
    assert done <= changes.kept | changes.lost
    # It is no test where nothing died on either side of a commit.
    assert road.asked
    assert changes.lost & done
    assert changes.lost - done


async def changed(pool: Pool, most: int) -> Changes:
    """As many changes as asked for, by some workers at once."""
    changes = Changes(
        keys=PostgresKeys(pool=pool),
        projects=PostgresProjects(pool=pool),
        webhooks=PostgresWebhooks(pool=pool),
    )
    async with trio.open_nursery() as workers:
        for _ in range(WORKERS):
            workers.start_soon(changes.work, most)
    return changes


async def nobody_is_left(dsn: str) -> None:
    """Until no session of a broken road is at work any more."""
    with psycopg.connect(dsn, autocommit=True) as connection, trio.fail_after(DEADLINE_S):
        query = "select from pg_stat_activity where application_name = %s"
        while connection.execute(query, (NAME,)).fetchone():
            await trio.sleep(0.01)


def done_to(connection: psycopg.Connection) -> set[tuple[str, str]]:
    """Every change that the tables show."""
    return {
        (action, target)
        for action, statement in DONE.items()
        for (target,) in connection.execute(statement).fetchall()  # type: ignore[arg-type]
    }
