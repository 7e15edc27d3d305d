"""API keys in PostgreSQL. Of a key's text only the public id and the SHA-256 ever come here."""

import hmac
from collections.abc import Collection, Mapping

from psycopg.rows import DictRow, dict_row

from rdev.adapters.postgres.entries import ENTRY, entry_parameters
from rdev.adapters.postgres.idempotency import (
    find_made,
    key_parameters,
    translate_key_in_use,
)
from rdev.adapters.postgres.pool import Parameters, Pool, translate_errors
from rdev.domain.audit import Action, Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId, is_key_id, key_id, key_uuid
from rdev.domain.key_text import PREFIX
from rdev.domain.keys import (
    Grant,
    Key,
    KeyStatus,
    NewKey,
    Rotation,
    Scope,
    Standing,
    standing_of,
)
from rdev.domain.limiter import RateLimit
from rdev.ports.keys import USED_EVERY_S, FoundKey, KeyMade

# What is compared where nothing was found: the digest of no text, as far as anybody knows.
DUMMY_DIGEST = bytes(32)

# Arrays of `cidr` come back as networks; the newest secret is the one without an end.
_KEY = """
select k.*,
       (select s.public_id from api_key_secrets s
        where s.key_id = k.id and s.good_until is null) as public_id,
       extract(epoch from k.expires_at - now())::float8 as expires_in_s
from api_keys k
"""
_GET = _KEY + "where k.id = %s"

# The primary key serves it, backwards: ids sort by creation.
_LIST = (
    _KEY
    + """
where (%(before)s::uuid is null or k.id < %(before)s)
  and (%(within)s::text[] is null or k.project_ids <@ %(within)s)
order by k.id desc
limit %(limit)s
"""
)

# `kept` has a row where the idempotency key is the request's own; see commands.py.
_KEEP = """
bounded as materialized (
    select set_config('lock_timeout', %(idempotency_wait)s, true)
    where %(idempotency_key)s::text is not null
), kept as (
    insert into idempotency_keys as k (key_id, key, digest, made)
    select %(idempotency_key_id)s, %(idempotency_key)s, %(idempotency_digest)s,
           %(idempotency_made)s
    from bounded
    on conflict (key_id, key) do update
    set digest = excluded.digest, made = excluded.made, made_at = now()
    where k.made_at <= now() - make_interval(secs => %(idempotency_s)s)
    returning made
), own as (
    select where %(idempotency_key)s::text is null or exists (select from kept)
)
"""

# `least` passes over nulls: no end of either kind is no end.
_INSERT = f"""
with {_KEEP}, made as (
    insert into api_keys (id, name, scopes, project_ids, allowed_ips, rate_requests, rate_window_s,
                          created_by, expires_at)
    select %(id)s, %(name)s, %(scopes)s, %(project_ids)s, %(allowed_ips)s::text[]::cidr[],
           %(rate_requests)s, %(rate_window_s)s, %(created_by)s,
           least(now() + make_interval(secs => %(expires_in_s)s), %(expires_at)s)
    from own
    returning id
), entry as ({ENTRY} from made
)
insert into api_key_secrets (public_id, key_id, digest)
select %(public_id)s, id, %(digest)s from made
returning key_id
"""  # noqa: S608  (put together from constants)

# A rotation is three statements in one transaction. The key's row is locked first: of two that race
# the second then sees what the first has made.
_LOCK = """
select revoked_at is not null as is_revoked, coalesce(expires_at <= now(), false) as is_expired
from api_keys where id = %s for update
"""

_KEEP_ROTATION = f"with {_KEEP} select from own"

# The newest gets the grace, older ones end; long ended ones are forgotten.
_REPLACE = """
with forgotten as (
    delete from api_key_secrets
    where key_id = %(id)s and good_until < now() - interval '30 days'
)
update api_key_secrets
set good_until = case when good_until is null then now() + make_interval(secs => %(grace_s)s)
                      else now() end
where key_id = %(id)s and (good_until is null or good_until > now())
"""
_ADD = f"""
with entry as ({ENTRY})
insert into api_key_secrets (public_id, key_id, digest)
values (%(public_id)s, %(id)s, %(digest)s)
"""  # noqa: S608  (put together from constants)

# Again changes nothing. Of two that race the second waits for the first, and finds nothing to do.
_REVOKE = f"""
with made as (
    update api_keys set revoked_at = now()
    where id = %(id)s and revoked_at is null
    returning id
)
{ENTRY} from made
"""  # noqa: S608  (put together from constants)

# The unique index of digests serves it. Its comparisons take longer the more bytes agree, but
# nobody chooses the bytes of a SHA-256.
_FIND = """
select k.*, s.digest, s.public_id,
       extract(epoch from k.expires_at - now())::float8 as expires_in_s,
       extract(epoch from s.good_until - now())::float8 as replaced_in_s
from api_key_secrets s
join api_keys k on k.id = s.key_id
where s.digest = %s
"""

_STANDINGS = """
select s.public_id, k.revoked_at is not null as is_revoked,
       extract(epoch from k.expires_at - now())::float8 as expires_in_s,
       extract(epoch from s.good_until - now())::float8 as replaced_in_s
from api_key_secrets s
join api_keys k on k.id = s.key_id
where s.public_id = any(%s)
"""

# In order of id: two servers that write the same keys never wait for each other in a ring.
_USED = """
update api_keys k
set last_used_at = now()
from (
    select id from api_keys
    where id = any(%(ids)s)
      and (last_used_at is null or last_used_at <= now() - make_interval(secs => %(every_s)s))
    order by id
    for update skip locked
) due
where k.id = due.id
"""


class PostgresKeys:
    """The `KeyStore` port. Source of contract: `rdev/ports/keys.py`."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def insert(self, new: NewKey, actor: Actor) -> KeyMade:
        """See `KeyStore.insert`."""
        with translate_key_in_use():
            row = await self._one(_INSERT, _insert_parameters(new, actor))
        if row is None:
            assert new.idempotency is not None
            return await self._replayed(new.idempotency)
        key = await self.get(new.id)
        assert key is not None, "keys are never deleted"
        return KeyMade(key=key)

    async def rotate(self, rotation: Rotation, actor: Actor) -> KeyMade | None:
        """See `KeyStore.rotate`."""
        with translate_key_in_use():
            outcome = await self._rotate(rotation, actor)
        if outcome is None:
            return None
        if not outcome:
            assert rotation.idempotency is not None
            return await self._replayed(rotation.idempotency)
        key = await self.get(rotation.key)
        assert key is not None, "keys are never deleted"
        return KeyMade(key=key)

    async def revoke(self, key: KeyId, actor: Actor) -> Key | None:
        """See `KeyStore.revoke`."""
        entry = entry_parameters(actor, Action.KEY_REVOKED, key, detail={})
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_REVOKE, {"id": key_uuid(key)} | entry)
        return await self.get(key)

    async def get(self, key: KeyId) -> Key | None:
        """See `KeyStore.get`."""
        row = await self._one(_GET, (key_uuid(key),))
        return None if row is None else _to_key(row)

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: KeyId | None, limit: int
    ) -> list[Key]:
        """See `KeyStore.list_all`."""
        parameters = {
            "within": None if within is None else sorted(within),
            "before": None if before is None else key_uuid(before),
            "limit": limit,
        }
        return [_to_key(row) for row in await self._all(_LIST, parameters)]

    async def find(self, digest: bytes) -> FoundKey | None:
        """See `KeyStore.find`."""
        row = await self._one(_FIND, (digest,))
        found = DUMMY_DIGEST if row is None else row["digest"]
        if not hmac.compare_digest(found, digest) or row is None:
            return None
        return FoundKey(key=_to_key(row), standing=_to_standing(row))

    async def standings(self, public_ids: Collection[str]) -> Mapping[str, Standing]:
        """See `KeyStore.standings`."""
        rows = await self._all(_STANDINGS, (sorted(public_ids),))
        return {row["public_id"]: _to_standing(row) for row in rows}

    async def note_used(self, keys: Collection[KeyId]) -> None:
        """See `KeyStore.note_used`."""
        values = {"ids": [key_uuid(key) for key in keys], "every_s": USED_EVERY_S}
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute(_USED, values)

    async def _rotate(self, rotation: Rotation, actor: Actor) -> bool | None:
        """Whether it was done now; False: earlier, under the same idempotency key; None: no key."""
        id_ = key_uuid(rotation.key)
        keep = key_parameters(rotation.idempotency, made=rotation.key)
        secret = rotation.secret.credential
        with translate_errors():
            async with self._pool.connection() as connection, connection.transaction():
                cursor = connection.cursor(row_factory=dict_row)
                row = await (await cursor.execute(_LOCK, (id_,))).fetchone()
                if row is None:
                    return None
                if (await cursor.execute(_KEEP_ROTATION, keep)).rowcount == 0:
                    return False
                if row["is_revoked"] or row["is_expired"]:
                    how = "revoked" if row["is_revoked"] else "expired"
                    raise RdevError(ErrorCode.CONFLICT, f"key {rotation.key!r} is {how}")
                await cursor.execute(_REPLACE, {"id": id_, "grace_s": rotation.grace_s})
                added = {"public_id": secret.public_id, "id": id_, "digest": secret.digest}
                await cursor.execute(_ADD, added | _rotation_entry(rotation, actor))
                return True

    async def _replayed(self, idempotency: Idempotency) -> KeyMade:
        made = await find_made(self._pool, idempotency)
        key = await self.get(KeyId(made)) if made is not None and is_key_id(made) else None
        if key is None:
            # It was forgotten between the two statements: 24 hours passed just now.
            message = "what this Idempotency-Key stood for has just been forgotten"
            raise RdevError(ErrorCode.CONFLICT, message, retry_after_s=1.0)
        return KeyMade(key=key, is_replay=True)

    async def _one(self, statement: str, parameters: Parameters) -> DictRow | None:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchone()

    async def _all(self, statement: str, parameters: Parameters) -> list[DictRow]:
        with translate_errors():
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()


def _rotation_entry(rotation: Rotation, actor: Actor) -> dict[str, object]:
    prefix = PREFIX + rotation.secret.credential.public_id
    detail = {"key_prefix": prefix, "grace_s": rotation.grace_s}
    return entry_parameters(actor, Action.KEY_ROTATED, rotation.key, detail=detail)


def _insert_parameters(new: NewKey, actor: Actor) -> dict[str, object]:
    grant, rate = new.grant, new.rate_limit
    values = {
        "id": key_uuid(new.id),
        "name": new.name,
        "scopes": sorted(grant.scopes),
        "project_ids": None if grant.project_ids is None else sorted(grant.project_ids),
        "allowed_ips": [str(network) for network in grant.allowed_ips],
        "rate_requests": None if rate is None else rate.requests,
        "rate_window_s": None if rate is None else rate.window_s,
        "created_by": new.created_by,
        "expires_in_s": new.expires_in_s,
        "expires_at": grant.expires_at,
        "public_id": new.secret.credential.public_id,
        "digest": new.secret.credential.digest,
        **key_parameters(new.idempotency, made=new.id),
    }
    shown = ("name", "scopes", "project_ids", "allowed_ips", "expires_in_s")
    detail = {name: values[name] for name in shown}
    detail["key_prefix"] = PREFIX + new.secret.credential.public_id
    return values | entry_parameters(actor, Action.KEY_CREATED, new.id, detail=detail)


def _to_key(row: DictRow) -> Key:
    projects, requests = row["project_ids"], row["rate_requests"]
    grant = Grant(
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        project_ids=None if projects is None else frozenset(ProjectId(p) for p in projects),
        allowed_ips=tuple(row["allowed_ips"]),
        expires_at=row["expires_at"],
    )
    return Key(
        id=key_id(row["id"]),
        public_id=row["public_id"],
        name=row["name"],
        grant=grant,
        rate_limit=None
        if requests is None
        else RateLimit(requests=requests, window_s=row["rate_window_s"]),
        status=_status(row),
        created_by=row["created_by"],
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
        last_used_at=row["last_used_at"],
    )


def _status(row: DictRow) -> KeyStatus:
    if row["revoked_at"] is not None:
        return KeyStatus.REVOKED
    expires_in_s = row["expires_in_s"]
    has_ended = expires_in_s is not None and expires_in_s <= 0
    return KeyStatus.EXPIRED if has_ended else KeyStatus.ACTIVE


def _to_standing(row: DictRow) -> Standing:
    is_revoked = row["is_revoked"] if "is_revoked" in row else row["revoked_at"] is not None
    return standing_of(
        is_revoked=is_revoked,
        expires_in_s=row["expires_in_s"],
        replaced_in_s=row["replaced_in_s"],
    )
