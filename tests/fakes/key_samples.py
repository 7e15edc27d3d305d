"""Secrets and keys that tests make, each different from all before."""

import hashlib
from itertools import count
from uuid import UUID

from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import ProjectId, key_id
from rdev.domain.key_text import ENTROPY_BYTES, NewSecret, make_secret
from rdev.domain.keys import Grant, NewKey, Scope
from rdev.domain.limiter import RateLimit

_serial = count(1)


def secret() -> NewSecret:
    """A secret that no other test has."""
    return make_secret(hashlib.sha512(b"sample %d" % next(_serial)).digest()[:ENTROPY_BYTES])


def new_key(
    *scopes: Scope,
    projects: tuple[str, ...] | None = None,
    grant: Grant | None = None,
    expires_in_s: int | None = None,
    rate_limit: RateLimit | None = None,
    idempotency: Idempotency | None = None,
) -> NewKey:
    """A key with an id greater than all before."""
    serial = next(_serial)
    project_ids = None if projects is None else frozenset(ProjectId(p) for p in projects)
    held = Grant(scopes=frozenset(scopes or {Scope.PROJECTS_READ}), project_ids=project_ids)
    return NewKey(
        id=key_id(UUID(int=(0x0199_0000_0000_7000 + serial) << 64 | serial)),
        name=f"key {serial}",
        secret=secret(),
        grant=grant or held,
        expires_in_s=expires_in_s,
        rate_limit=rate_limit,
        created_by="key_admin",
        idempotency=idempotency,
    )
