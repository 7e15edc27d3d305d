"""API keys in memory."""

import hmac
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import trio

from rdev.domain.audit import Actor
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.key_text import Credential
from rdev.domain.keys import Key, KeyStatus, NewKey, Rotation, Standing, standing_of
from rdev.ports.keys import USED_EVERY_S, FoundKey, KeyMade
from tests.fakes.store import StoreState


@dataclass(slots=True, kw_only=True)
class Secret:
    """One secret of a key as it is stored."""

    key: KeyId
    digest: bytes
    good_until: datetime | None = None


@dataclass(slots=True)
class FakeKeys:
    """`KeyStore`. Shares time, faults and idempotency keys with the other fakes of its state."""

    state: StoreState
    keys: dict[KeyId, Key] = field(default_factory=dict)
    secrets: dict[str, Secret] = field(default_factory=dict)
    # How many times the store was asked for a credential, and for standings.
    finds: int = 0
    looks: int = 0
    # So long the standings take, and the writing of uses.
    stalls_s: float = 0.0
    # Called between the reading and the answer of `find`.
    on_find: Callable[[], object] = lambda: None

    async def insert(self, new: NewKey, actor: Actor) -> KeyMade:
        await self.state.step()
        if (earlier := self._kept(new.idempotency, new.id)) is not None:
            return earlier
        now = self.state.now
        ends = [] if new.grant.expires_at is None else [new.grant.expires_at]
        ends += [] if new.expires_in_s is None else [now + timedelta(seconds=new.expires_in_s)]
        self.keys[new.id] = Key(
            id=new.id,
            public_id=new.secret.credential.public_id,
            name=new.name,
            grant=replace(new.grant, expires_at=min(ends, default=None)),
            rate_limit=new.rate_limit,
            status=KeyStatus.ACTIVE,
            created_by=new.created_by,
            created_at=now,
        )
        self._add(new.id, new.secret.credential)
        self.state.reply()
        return KeyMade(key=self._shown(self.keys[new.id]))

    async def rotate(self, rotation: Rotation, actor: Actor) -> KeyMade | None:
        await self.state.step()
        key = self.keys.get(rotation.key)
        if key is None:
            return None
        earlier = self._find_kept(rotation.idempotency)
        if earlier is not None:
            return earlier
        if (status := self._shown(key).status) is not KeyStatus.ACTIVE:
            raise RdevError(ErrorCode.CONFLICT, f"key {key.id!r} is {status}")
        self._kept(rotation.idempotency, rotation.key)
        now = self.state.now
        for secret in self.secrets.values():
            if secret.key != key.id:
                continue
            if secret.good_until is None:
                secret.good_until = now + timedelta(seconds=rotation.grace_s)
            else:
                secret.good_until = min(secret.good_until, now)
        self._add(key.id, rotation.secret.credential)
        made = replace(key, public_id=rotation.secret.credential.public_id)
        self.keys[key.id] = made
        self.state.reply()
        return KeyMade(key=self._shown(made))

    async def revoke(self, key: KeyId, actor: Actor) -> Key | None:
        await self.state.step()
        found = self.keys.get(key)
        if found is None:
            return None
        self.keys[key] = replace(found, revoked_at=found.revoked_at or self.state.now)
        self.state.reply()
        return self._shown(self.keys[key])

    async def get(self, key: KeyId) -> Key | None:
        await self.state.step()
        found = self.keys.get(key)
        return None if found is None else self._shown(found)

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: KeyId | None, limit: int
    ) -> list[Key]:
        await self.state.step()
        found = [
            self._shown(key)
            for key in sorted(self.keys.values(), key=lambda key: key.id, reverse=True)
            if (before is None or key.id < before) and _is_within(key, within)
        ]
        return found[:limit]

    async def find(self, digest: bytes) -> FoundKey | None:
        self.finds += 1
        await self.state.step()
        found = None
        for public_id, secret in self.secrets.items():
            if hmac.compare_digest(secret.digest, digest):
                key = replace(self._shown(self.keys[secret.key]), public_id=public_id)
                found = FoundKey(key=key, standing=self._standing(secret))
        self.on_find()
        await trio.lowlevel.checkpoint()
        return found

    async def standings(self, public_ids: Collection[str]) -> Mapping[str, Standing]:
        self.looks += 1
        await trio.sleep(self.stalls_s)
        await self.state.step()
        return {
            public_id: self._standing(self.secrets[public_id])
            for public_id in public_ids
            if public_id in self.secrets
        }

    async def note_used(self, keys: Collection[KeyId]) -> None:
        await trio.sleep(self.stalls_s)
        await self.state.step()
        now = self.state.now
        for id_ in keys:
            key = self.keys.get(id_)
            if key is None:
                continue
            last = key.last_used_at
            if last is None or last <= now - timedelta(seconds=USED_EVERY_S):
                self.keys[id_] = replace(key, last_used_at=now)

    def age(self, seconds: float) -> None:
        """Make all that is stored so much older."""
        back = timedelta(seconds=seconds)
        for id_, key in self.keys.items():
            ends, used = key.grant.expires_at, key.last_used_at
            self.keys[id_] = replace(
                key,
                grant=replace(key.grant, expires_at=None if ends is None else ends - back),
                last_used_at=None if used is None else used - back,
            )
        for secret in self.secrets.values():
            until = secret.good_until
            secret.good_until = None if until is None else until - back

    def _add(self, key: KeyId, credential: Credential) -> None:
        self.secrets[credential.public_id] = Secret(key=key, digest=credential.digest)

    def _shown(self, key: Key) -> Key:
        ends = key.grant.expires_at
        if key.revoked_at is not None:
            return replace(key, status=KeyStatus.REVOKED)
        if ends is not None and ends <= self.state.now:
            return replace(key, status=KeyStatus.EXPIRED)
        return key

    def _standing(self, secret: Secret) -> Standing:
        key = self.keys[secret.key]
        return standing_of(
            is_revoked=key.revoked_at is not None,
            expires_in_s=self._left_s(key.grant.expires_at),
            replaced_in_s=self._left_s(secret.good_until),
        )

    def _left_s(self, until: datetime | None) -> float | None:
        return None if until is None else (until - self.state.now).total_seconds()

    def _kept(self, idempotency: Idempotency | None, made: KeyId) -> KeyMade | None:
        """What the idempotency key stands for; from now on it stands for this, if for nothing."""
        earlier = self._find_kept(idempotency)
        if earlier is None and idempotency is not None:
            self.state.keys.keep(idempotency, made)
        return earlier

    def _find_kept(self, idempotency: Idempotency | None) -> KeyMade | None:
        made = None if idempotency is None else self.state.keys.find(idempotency)
        if made is None:
            return None
        return KeyMade(key=self._shown(self.keys[KeyId(made)]), is_replay=True)


def _is_within(key: Key, within: Collection[ProjectId] | None) -> bool:
    projects = key.grant.project_ids
    return within is None or (projects is not None and projects <= set(within))
