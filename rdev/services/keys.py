"""API keys: checking credentials, and making, showing, rotating and revoking keys.

A credential is looked up by its SHA-256, so an unknown id and a wrong secret take the same path;
one that was accepted before (a session's) by its name. What was found is remembered for at most
`TTL_S` (`cached.py`); a change is told to all servers. The bootstrap key of the administrator is
known without the database.
"""

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import trio

from rdev.domain.audit import Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, NewUuid, is_key_id, key_id
from rdev.domain.key_requests import KeyRequest
from rdev.domain.key_text import (
    ENTROPY_BYTES,
    NewSecret,
    digest_of,
    make_secret,
    public_id_of,
)
from rdev.domain.keys import (
    ADMIN,
    Grant,
    Key,
    KeyEnd,
    NewKey,
    Principal,
    Rotation,
    check_addresses,
    check_covers,
    check_end,
    check_projects,
    check_scopes,
)
from rdev.ports.keys import FoundKey, KeyMade, KeyStore
from rdev.services.cached import Cached, CachedStatistics
from rdev.services.shield import commit_shield

# A key, and the public id of one of its secrets.
_Named = tuple[KeyId, str]

_ENDED = {
    KeyEnd.REVOKED: (ErrorCode.KEY_REVOKED, "the API key was revoked, or replaced by a rotation"),
    KeyEnd.EXPIRED: (ErrorCode.KEY_EXPIRED, "the API key has expired"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownKey:
    """A key that was made or rotated. `text` is the whole key, None in a replay: it is nowhere."""

    key: Key
    text: str | None = field(repr=False)
    is_replay: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What a credential is good for: nothing any more, or until a `trio.current_time()`."""

    principal: Principal
    ended: KeyEnd | None
    ends_at_s: float
    ends_as: KeyEnd


class Keys:
    """The use cases of keys."""

    def __init__(
        self,
        *,
        store: KeyStore,
        admin_key: str,
        tell_replicas: Callable[[KeyId], None],
        changed: Callable[[], None],
        used: Callable[[KeyId, float], None],
        new_uuid: NewUuid,
        random_bytes: Callable[[int], bytes],
        now: Callable[[], datetime],
    ) -> None:
        """`tell_replicas` says to the other servers that a key was changed, `changed` to this one
        that some key was, `used` that one was used now; none of them waits. Of the bootstrap key
        only the SHA-256 is kept."""
        self._store = store
        self._admin_digest = digest_of(admin_key)
        self._tell_replicas = tell_replicas
        self._changed = changed
        self._used = used
        self._new_uuid = new_uuid
        self._random_bytes = random_bytes
        self._now = now
        self._cached: Cached[bytes | _Named, _Known] = Cached(
            self._load, tag=lambda _, known: None if known is None else known.principal.key_id
        )

    async def authenticate(self, credential: str | None, client_ip: str) -> Principal:
        """The principal behind the credential.

        Errors: UNAUTHORIZED, with the same message whatever is wrong; KEY_REVOKED, KEY_EXPIRED and
        IP_NOT_ALLOWED for whoever knows the secret; SERVICE_UNAVAILABLE when it cannot be known.
        """
        text = credential or ""
        digest = digest_of(text)
        if hmac.compare_digest(digest, self._admin_digest):
            return ADMIN
        known = self._cached.peek(digest)
        if known is None and public_id_of(text) is not None:
            known = await self._cached.get(digest)
        return self._accepted(known, client_ip)

    async def authenticate_named(self, key: KeyId, public_id: str, client_ip: str) -> Principal:
        """The principal of a key and one of its secrets, which whoever asks has shown before.

        Errors: those of `authenticate`. Also for a secret that has since ended, as for its text.
        """
        return self._accepted(await self._cached.get((key, public_id)), client_ip)

    def _accepted(self, known: _Known | None, client_ip: str) -> Principal:
        """What is good now, from here. Errors: see `authenticate`."""
        if known is None:
            raise _unauthorized()
        now_s = trio.current_time()
        ended = known.ends_as if now_s >= known.ends_at_s else known.ended
        if ended is not None:
            raise RdevError(*_ENDED[ended])
        principal = known.principal
        if not principal.grant.admits(client_ip):
            message = "the API key may not be used from this address"
            raise RdevError(ErrorCode.IP_NOT_ALLOWED, message)
        self._used(principal.key_id, now_s)
        return principal

    async def create(
        self,
        by: Principal,
        request: KeyRequest,
        actor: Actor,
        *,
        idempotency: Idempotency | None = None,
    ) -> ShownKey:
        """Make a key; its text is in the answer and nowhere else.

        What the request does not say is as narrow as `by` itself: its addresses, and its end where
        that comes before the default. Errors: FORBIDDEN for what `by` does not hold; those of
        `KeyStore.insert`. Cancellation: the key is stored or not.
        """
        held = by.grant
        check_scopes(held, request.scopes)
        check_projects(held, request.project_ids)
        allowed_ips = held.allowed_ips if request.allowed_ips is None else request.allowed_ips
        check_addresses(held, allowed_ips)
        if request.is_end_given:
            check_end(held, self._end_of(request))
        secret = self._new_secret()
        grant = Grant(
            scopes=request.scopes,
            project_ids=request.project_ids,
            allowed_ips=allowed_ips,
            expires_at=held.expires_at,
        )
        new = NewKey(
            id=key_id(self._new_uuid()),
            name=request.name,
            secret=secret,
            grant=grant,
            expires_in_s=request.expires_in_s,
            rate_limit=request.rate_limit,
            created_by=by.key_id,
            idempotency=idempotency,
        )
        return _shown(await self._store.insert(new, actor), secret)

    async def rotate(
        self,
        by: Principal,
        key: str,
        actor: Actor,
        *,
        grace_s: int,
        idempotency: Idempotency | None = None,
    ) -> ShownKey:
        """Give a key another secret. Who learns it can do all that the key can: `by` must hold it.

        Errors: NOT_FOUND; FORBIDDEN; those of `KeyStore.rotate`.
        """
        found = await self.get(by, key)
        check_covers(by.grant, found.grant)
        secret = self._new_secret()
        rotation = Rotation(key=found.id, secret=secret, grace_s=grace_s, idempotency=idempotency)
        with commit_shield():
            try:
                made = await self._store.rotate(rotation, actor)
            finally:
                # Also where it failed: the reply alone may be lost.
                self._announce(found.id)
        if made is None:
            raise _unknown(key)
        return _shown(made, secret)

    async def revoke(self, by: Principal, key: str, actor: Actor) -> Key:
        """End a key now and for ever; again is fine.

        Errors: NOT_FOUND; FORBIDDEN for a key that may do what `by` may not.
        """
        found = await self.get(by, key)
        check_scopes(by.grant, found.grant.scopes)
        with commit_shield():
            try:
                revoked = await self._store.revoke(found.id, actor)
            finally:
                # Also where it failed: the reply alone may be lost.
                self._announce(found.id)
        if revoked is None:
            raise _unknown(key)
        return revoked

    async def get(self, by: Principal, key: str) -> Key:
        """The key as it is now. Errors: NOT_FOUND, also for one of projects that `by` has not."""
        found = await self._store.get(KeyId(key)) if is_key_id(key) else None
        if found is None or not _is_visible(by.grant, found.grant):
            raise _unknown(key)
        return found

    async def list_all(self, by: Principal, *, before: KeyId | None, limit: int) -> list[Key]:
        """Keys that `by` may see, newest first."""
        return await self._store.list_all(within=by.project_ids, before=before, limit=limit)

    def heed(self, keys: Sequence[str]) -> None:
        """Another server changed these keys. Never waits."""
        self._cached.invalidate(keys)
        self._changed()

    def flush(self) -> None:
        """Keys may have been changed unheard."""
        self._cached.flush()
        self._changed()

    def statistics(self) -> CachedStatistics:
        """What is remembered."""
        return self._cached.statistics()

    async def _load(self, asked: bytes | _Named) -> _Known | None:
        began_s = trio.current_time()
        if isinstance(asked, bytes):
            found = await self._store.find(asked)
        else:
            found = await self._find_named(*asked)
        if found is None:
            return None
        key, standing = found.key, found.standing
        good_for_s = float("inf") if standing.good_for_s is None else standing.good_for_s
        principal = Principal(
            key_id=key.id,
            name=key.name,
            grant=key.grant,
            public_id=key.public_id,
            rate_limit=key.rate_limit,
        )
        return _Known(principal, standing.ended, began_s + good_for_s, standing.ends_as)

    async def _find_named(self, id_: KeyId, public_id: str) -> FoundKey | None:
        """As `KeyStore.find`, by name. The standing is read last: what a key holds never changes,
        how it stands may."""
        key = await self._store.get(id_)
        standing = (await self._store.standings([public_id])).get(public_id)
        if key is None or standing is None:
            return None
        return FoundKey(key=replace(key, public_id=public_id), standing=standing)

    def _announce(self, key: KeyId) -> None:
        """The key was changed, or may have been."""
        self._cached.invalidate([key])
        self._changed()
        self._tell_replicas(key)

    def _end_of(self, request: KeyRequest) -> datetime | None:
        if request.expires_in_s is None:
            return None
        return self._now() + timedelta(seconds=request.expires_in_s)

    def _new_secret(self) -> NewSecret:
        return make_secret(self._random_bytes(ENTROPY_BYTES))


def _is_visible(by: Grant, key: Grant) -> bool:
    """Whether all projects of the key are its own."""
    if by.project_ids is None:
        return True
    return key.project_ids is not None and key.project_ids <= by.project_ids


def _shown(made: KeyMade, secret: NewSecret) -> ShownKey:
    text = None if made.is_replay else secret.text
    return ShownKey(key=made.key, text=text, is_replay=made.is_replay)


def _unauthorized() -> RdevError:
    message = "a valid API key is required (X-API-Key, or Authorization: Bearer)"
    return RdevError(ErrorCode.UNAUTHORIZED, message)


def _unknown(key: str) -> RdevError:
    return RdevError(ErrorCode.NOT_FOUND, f"there is no key {key!r}")
