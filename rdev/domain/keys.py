"""Who may ask for what: scopes, keys, the principals behind them, and who may grant what.

A key holds scopes for projects, from addresses, until a time. Nobody grants what they do not hold:
not a scope, not a project, not an address, not a day more.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address

from rdev.domain.addresses import Address, Network
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.key_text import NewSecret
from rdev.domain.limiter import RateLimit

# The bootstrap key's, which no table holds.
ADMIN_KEY_ID = KeyId("key_admin")


class Scope(StrEnum):
    """A named right. `ADMIN` holds all of them."""

    PROJECTS_READ = "projects:read"
    PROJECTS_WRITE = "projects:write"
    PROJECTS_EXECUTE = "projects:execute"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    AUDIT_READ = "audit:read"
    ADMIN = "admin"


class KeyEnd(StrEnum):
    """Why a key is no longer good, in the words of a stream's `disconnecting`."""

    REVOKED = "key_revoked"
    EXPIRED = "key_expired"


class KeyStatus(StrEnum):
    """A key at the moment it was read."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a key may do. `project_ids` None: in all projects. `allowed_ips` empty: from anywhere.
    `expires_at` None: never ends."""

    scopes: frozenset[Scope]
    project_ids: frozenset[ProjectId] | None = None
    allowed_ips: tuple[Network, ...] = ()
    expires_at: datetime | None = None

    def may(self, scope: Scope, project: ProjectId | None = None) -> bool:
        """Whether it holds the scope, and that for the project where one is named."""
        if scope not in self.scopes and Scope.ADMIN not in self.scopes:
            return False
        return project is None or self.sees(project)

    def sees(self, project: ProjectId) -> bool:
        """Whether the project is one of its own."""
        return self.project_ids is None or project in self.project_ids

    def admits(self, address: str) -> bool:
        """Whether it may be used from this IP address."""
        if not self.allowed_ips:
            return True
        at = _address(address)
        return any(at in network for network in self.allowed_ips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The holder of an accepted credential: fit for logs, since it holds nothing of the secret.
    `public_id` is the credential's, None for the bootstrap key. `ends_at`: when the credential ends
    although its key does not (a session, a stream token)."""

    key_id: KeyId
    name: str
    grant: Grant
    public_id: str | None = None
    rate_limit: RateLimit | None = None
    ends_at: datetime | None = None

    @property
    def project_ids(self) -> frozenset[ProjectId] | None:
        """The projects it may see; None for all."""
        return self.grant.project_ids

    def may(self, scope: Scope, project: ProjectId | None = None) -> bool:
        """See `Grant.may`."""
        return self.grant.may(scope, project)


ADMIN = Principal(
    key_id=ADMIN_KEY_ID, name="bootstrap", grant=Grant(scopes=frozenset({Scope.ADMIN}))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it is stored. `public_id` is that of its newest secret."""

    id: KeyId
    public_id: str
    name: str
    grant: Grant
    rate_limit: RateLimit | None
    status: KeyStatus
    created_by: str
    created_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key to be stored. It ends `expires_in_s` seconds from now by the database's clock (None:
    never), and at `grant.expires_at` at the latest."""

    id: KeyId
    name: str
    secret: NewSecret
    grant: Grant
    expires_in_s: int | None
    rate_limit: RateLimit | None
    created_by: str
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A fresh secret for a key; the one it replaces stays good for `grace_s` seconds."""

    key: KeyId
    secret: NewSecret
    grace_s: int
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whether a credential is good, by the database's clock at the time of the reading.

    `ended`: it is not, and why. Otherwise it is good for `good_for_s` more seconds (None: no end is
    set), and then ends as `ends_as`.
    """

    ended: KeyEnd | None = None
    good_for_s: float | None = None
    ends_as: KeyEnd = KeyEnd.EXPIRED


@lru_cache(maxsize=4_096)
def _address(text: str) -> Address:
    """Parsed once for a client that asks again and again (1.5 µs)."""
    return ip_address(text)


def standing_of(
    *, is_revoked: bool, expires_in_s: float | None, replaced_in_s: float | None
) -> Standing:
    """The standing of a credential: its key is revoked, its key expires in so many seconds, and a
    rotation takes it away in so many (None: not at all; 0 or less: it has happened)."""
    if is_revoked or (replaced_in_s is not None and replaced_in_s <= 0):
        return Standing(ended=KeyEnd.REVOKED)
    if expires_in_s is not None and expires_in_s <= 0:
        return Standing(ended=KeyEnd.EXPIRED)
    if replaced_in_s is not None and (expires_in_s is None or replaced_in_s < expires_in_s):
        return Standing(good_for_s=replaced_in_s, ends_as=KeyEnd.REVOKED)
    return Standing(good_for_s=expires_in_s)


def check_scopes(holder: Grant, wanted: Collection[Scope]) -> None:
    """Errors: FORBIDDEN, naming the scopes that are not held."""
    missing = sorted(scope for scope in wanted if not holder.may(scope))
    if missing:
        raise forbidden(f"a key without {_listed(missing)} cannot grant it", missing)


def check_projects(holder: Grant, wanted: frozenset[ProjectId] | None) -> None:
    """Errors: FORBIDDEN, naming the projects that are not held."""
    if holder.project_ids is None:
        return
    if wanted is None:
        raise RdevError(ErrorCode.FORBIDDEN, "a key of some projects cannot grant all projects")
    foreign = sorted(wanted - holder.project_ids)
    if foreign:
        message = f"the key cannot grant the projects {_listed(foreign)}"
        raise RdevError(ErrorCode.FORBIDDEN, message)


def check_addresses(holder: Grant, wanted: Iterable[Network]) -> None:
    """Errors: FORBIDDEN where an address would be allowed from which the holder is not."""
    if not holder.allowed_ips:
        return
    networks = list(wanted)
    wider = [network for network in networks if not _is_covered(network, holder.allowed_ips)]
    if wider or not networks:
        told = _listed(wider) if wider else "every address"
        raise RdevError(ErrorCode.FORBIDDEN, f"the key cannot grant the use from {told}")


def check_end(holder: Grant, wanted: datetime | None) -> None:
    """Errors: FORBIDDEN for what would outlive the holder."""
    if holder.expires_at is not None and (wanted is None or wanted > holder.expires_at):
        raise RdevError(ErrorCode.FORBIDDEN, "the key cannot grant beyond its own end")


def check_covers(holder: Grant, wanted: Grant) -> None:
    """Errors: FORBIDDEN unless the holder holds everything of it."""
    check_scopes(holder, wanted.scopes)
    check_projects(holder, wanted.project_ids)
    check_addresses(holder, wanted.allowed_ips)
    check_end(holder, wanted.expires_at)


def forbidden(message: str, scopes: Iterable[Scope]) -> RdevError:
    """A missing scope; `details.scope` names it, several with commas between."""
    return RdevError(ErrorCode.FORBIDDEN, message, details={"scope": ",".join(scopes)})


def _is_covered(network: Network, allowed: Collection[Network]) -> bool:
    """Whether one network holds all of it. (Several that only hold it together are not seen as one;
    `parse_networks` joins them.)"""
    for wider in allowed:
        if isinstance(network, IPv4Network):
            if isinstance(wider, IPv4Network) and network.subnet_of(wider):
                return True
        elif isinstance(wider, IPv6Network) and network.subnet_of(wider):
            return True
    return False


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
