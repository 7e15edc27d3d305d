"""The bodies of `POST /keys` and `POST /keys/{id}/rotate`."""

from dataclasses import dataclass
from typing import Final

from rdev.domain.addresses import Network, joined, parse_network
from rdev.domain.fields import Fields, Json
from rdev.domain.ids import PROJECT_MAX_BYTES, PROJECT_PATTERN, ProjectId
from rdev.domain.keys import Scope
from rdev.domain.limiter import RateLimit

NAME_MAX_BYTES = 100
PROJECTS_MAX = 200
ADDRESSES_MAX = 100
_ADDRESS_MAX_BYTES = 64

_DAY_S = 86_400
EXPIRES_IN_S: Final = {"30d": 30 * _DAY_S, "60d": 60 * _DAY_S, "90d": 90 * _DAY_S}
EXPIRES_IN_S["1y"] = 365 * _DAY_S
NEVER: Final = "never"
EXPIRES_IN_DEFAULT_S = EXPIRES_IN_S["90d"]
EXPIRES_IN_MAX_S = 10 * 365 * _DAY_S

GRACE_DEFAULT_S = _DAY_S
GRACE_MAX_S = 7 * _DAY_S

REQUESTS_MAX = 1_000_000
WINDOW_MAX_S = _DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """What a client asks for. `allowed_ips` None: nothing was said (an empty one says: from
    anywhere). `expires_in_s` None: never; the default unless `is_end_given`."""

    name: str
    scopes: frozenset[Scope]
    project_ids: frozenset[ProjectId] | None
    allowed_ips: tuple[Network, ...] | None
    expires_in_s: int | None
    is_end_given: bool
    rate_limit: RateLimit | None


def parse_key(body: Json) -> KeyRequest:
    """`POST /keys`. Errors: BAD_REQUEST, all faults."""
    fields = Fields(body)
    name = fields.text("name", max_bytes=NAME_MAX_BYTES, required=True)
    request = KeyRequest(
        name=name or "",
        scopes=_scopes(fields),
        project_ids=_project_ids(fields),
        allowed_ips=_allowed_ips(fields),
        expires_in_s=_expires_in_s(fields),
        is_end_given=body.get("expires_in") is not None,
        rate_limit=_rate_limit(fields),
    )
    fields.finish()
    return request


def parse_rotation(body: Json) -> int:
    """`POST /keys/{id}/rotate`: the grace in seconds. Errors: BAD_REQUEST, all faults."""
    fields = Fields(body)
    about = f"how long the old secret is good; default {GRACE_DEFAULT_S}"
    grace_s = fields.integer("grace_s", least=0, most=GRACE_MAX_S, about=about)
    fields.finish()
    return GRACE_DEFAULT_S if grace_s is None else grace_s


def _scopes(fields: Fields) -> frozenset[Scope]:
    found = fields.texts(
        "scopes", min_items=1, max_items=100, max_bytes=100, choices=[*Scope], required=True
    )
    return frozenset(Scope(text) for text in found or ())


def _project_ids(fields: Fields) -> frozenset[ProjectId] | None:
    found = fields.texts(
        "project_ids",
        min_items=1,
        max_items=PROJECTS_MAX,
        max_bytes=PROJECT_MAX_BYTES,
        pattern=PROJECT_PATTERN,
        mismatch="is no project id",
        about="null: all projects",
    )
    return None if found is None else frozenset(ProjectId(text) for text in found)


def _allowed_ips(fields: Fields) -> tuple[Network, ...] | None:
    about = "CIDRs or addresses, IPv4 and IPv6; empty: from anywhere"
    found = fields.texts(
        "allowed_ips", max_items=ADDRESSES_MAX, max_bytes=_ADDRESS_MAX_BYTES, about=about
    )
    if found is None:
        return None
    networks = []
    for index, text in enumerate(found):
        try:
            networks.append(parse_network(text))
        except ValueError as error:
            fields.fault("allowed_ips", str(error), within=str(index))
    return joined(networks)


def _expires_in_s(fields: Fields) -> int | None:
    names = ", ".join([*EXPIRES_IN_S, NEVER])
    rule = f"one of {names}, or seconds from 1 to {EXPIRES_IN_MAX_S}"
    value = fields.other(
        "expires_in",
        about=f"{rule}; default 90d",
        choices=[*EXPIRES_IN_S, NEVER],
        least=1,
        most=EXPIRES_IN_MAX_S,
    )
    if value is None:
        return EXPIRES_IN_DEFAULT_S
    if isinstance(value, str):
        if value == NEVER:
            return None
        if value in EXPIRES_IN_S:
            return EXPIRES_IN_S[value]
    elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= EXPIRES_IN_MAX_S:
        return value
    fields.fault("expires_in", f"must be {rule}")
    return None


def _rate_limit(fields: Fields) -> RateLimit | None:
    inner = fields.inner("rate_limit", about="null: the server's own")
    if inner is None:
        return None
    requests = inner.integer("requests", least=1, most=REQUESTS_MAX, required=True)
    window_s = inner.integer("window_s", least=1, most=WINDOW_MAX_S, required=True)
    return RateLimit(requests=requests or 1, window_s=window_s or 1)
