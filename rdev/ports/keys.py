"""What the services need from the store of API keys.

All times are the database's; durations are seconds from the moment of the reading. No method is
given or gives the text of a key: only public ids and digests.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from rdev.domain.audit import Actor
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.keys import Key, NewKey, Rotation, Standing

# Between two writes of a key's `last_used_at`.
USED_EVERY_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundKey:
    """The key behind a credential, and how the credential stands."""

    key: Key
    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMade:
    """What the store made of a request, or (`is_replay`) of an earlier one with the same
    idempotency key, as it is now."""

    key: Key
    is_replay: bool = False


class KeyStore(Protocol):
    """API keys with their secrets."""

    async def insert(self, new: NewKey, actor: Actor) -> KeyMade:
        """Store a key with its secret, its audit entry and its idempotency key, where it has one,
        in one transaction. An idempotency key that stands for something already makes nothing.

        Errors: IDEMPOTENCY_MISMATCH when it stands for another request; CONFLICT, with a delay,
        when another request with it took longer than 2 s.
        """
        ...

    async def rotate(self, rotation: Rotation, actor: Actor) -> KeyMade | None:
        """Give a key another secret; None: there is no such key. The one before stays good for
        `grace_s`; older ones end now, so that no more than two are ever good. With an audit entry.

        Errors: CONFLICT for a key that is revoked or expired; those of `insert`.
        """
        ...

    async def revoke(self, key: KeyId, actor: Actor) -> Key | None:
        """End a key now and for ever; None: there is no such key. Again is fine, and keeps the
        time of the first, whose audit entry is the only one."""
        ...

    async def get(self, key: KeyId) -> Key | None:
        """The key as it is now, revoked or not, or None."""
        ...

    async def list_all(
        self, *, within: Collection[ProjectId] | None, before: KeyId | None, limit: int
    ) -> list[Key]:
        """Keys, newest first, those older than `before`, at most `limit`; with `within` only keys
        that are limited to some of these projects."""
        ...

    async def find(self, digest: bytes) -> FoundKey | None:
        """The key one of whose secrets has this digest (its `public_id` is that secret's); None
        where there is none.

        What a caller can measure is the same for an unknown public id and a wrong secret: both are
        a digest that is not there, and one comparison in constant time with a dummy.
        """
        ...

    async def standings(self, public_ids: Collection[str]) -> Mapping[str, Standing]:
        """How these credentials stand; those that are unknown are left out."""
        ...

    async def note_used(self, keys: Collection[KeyId]) -> None:
        """These keys were used just now. Written at most once per `USED_EVERY_S` for each key, by
        whatever server."""
        ...
