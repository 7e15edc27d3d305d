"""What the door is made of: who may come in, how often, and the record of it.

A part of `wiring.py`. It opens and starts nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import uuid_utils.compat

from rdev.adapters.checkpoints.lines import Signer
from rdev.adapters.checkpoints.sinks import FileSink, UrlSink
from rdev.adapters.http.rate_limits import Allowance, RateLimits
from rdev.adapters.postgres.audit import PostgresAudit
from rdev.adapters.postgres.keys import PostgresKeys
from rdev.adapters.postgres.limiter import PostgresRateLimits
from rdev.adapters.postgres.notifier import Notifier
from rdev.adapters.postgres.pool import Pool
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.domain.keys import ADMIN_KEY_ID, Principal, Scope
from rdev.domain.limiter import parse_rate_limit
from rdev.domain.tickets import Seals
from rdev.identity import Identity
from rdev.ports.audit import CheckpointSink
from rdev.services.audit import AuditKeeper
from rdev.services.denials import Denials
from rdev.services.key_watch import KeyWatch
from rdev.services.keys import Keys
from rdev.services.limiter import AddressLimiter, RateLimiter, StreamLimiter
from rdev.services.tickets import Tickets


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorNeeds:
    """What the rest of the server lends."""

    requests: Pool
    notifier: Notifier
    telemetry: PrometheusTelemetry
    now: Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What was built."""

    keys: Keys
    key_watch: KeyWatch
    tickets: Tickets
    rate_limits: RateLimits
    audit: PostgresAudit
    denials: Denials
    audit_keeper: AuditKeeper


def build_door(settings: Settings, identity: Identity, needs: DoorNeeds) -> Door:
    """Every part, and who needs whom."""
    store = PostgresKeys(pool=needs.requests)
    key_watch = KeyWatch(store=store, now=needs.now)
    keys = Keys(
        store=store,
        admin_key=identity.admin_key,
        tell_replicas=needs.notifier.key_changed,
        changed=key_watch.wake,
        used=key_watch.used,
        new_uuid=uuid_utils.compat.uuid7,
        random_bytes=os.urandom,
        now=needs.now,
    )
    audit = PostgresAudit(pool=needs.requests)
    denials = Denials()
    return Door(
        keys=keys,
        key_watch=key_watch,
        tickets=Tickets(
            keys=keys, seals=Seals(identity.secret), admin_key=identity.admin_key, now=needs.now
        ),
        rate_limits=_rate_limits(settings, needs),
        audit=audit,
        denials=denials,
        audit_keeper=AuditKeeper(
            log=audit, denials=denials, sink=_checkpoints(settings, identity), now=needs.now
        ),
    )


def _rate_limits(settings: Settings, needs: DoorNeeds) -> RateLimits:
    """Who may ask how often. The bootstrap key is exempt."""
    telemetry = needs.telemetry
    limiter = RateLimiter(store=PostgresRateLimits(pool=needs.requests), telemetry=telemetry)
    telemetry.watch("limiter", limiter.statistics)
    of_key = parse_rate_limit(settings.rate_limit)

    def allowance_of(principal: Principal) -> Allowance:
        limit = principal.rate_limit or of_key
        return Allowance(limit=limit, is_exempt=principal.key_id == ADMIN_KEY_ID)

    return RateLimits(
        addresses=AddressLimiter(
            requests=parse_rate_limit(settings.rate_limit_address),
            failures=parse_rate_limit(settings.rate_limit_failures),
            telemetry=telemetry,
        ),
        limiter=limiter,
        streams=StreamLimiter(most=settings.streams_key_max, telemetry=telemetry),
        starts=parse_rate_limit(settings.rate_limit_starts),
        allowance_of=allowance_of,
        may_start=lambda principal, project: principal.may(Scope.PROJECTS_EXECUTE, project),
    )


def _checkpoints(settings: Settings, identity: Identity) -> CheckpointSink | None:
    """Where the chain's checkpoints go: in the state folder when the database is there too."""
    signer = Signer(identity.secret, server=identity.holder)
    place = settings.audit_checkpoint
    if place is not None and place.startswith(("http://", "https://")):
        return UrlSink(place, signer=signer)
    if place is not None:
        return FileSink(Path(place), signer=signer)
    if settings.is_embedded:
        return FileSink(settings.state_dir / "audit-checkpoints", signer=signer)
    return None
