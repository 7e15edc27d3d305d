"""Limits of requests at the HTTP edge: which ones a request meets, and the headers that tell.

Before the authentication: the address, in the shell, before a slot is taken. After it: the key, and
the project where a command is started, in one question; then a place for a stream. The headers are
those of draft-ietf-httpapi-ratelimit-headers-11 (structured fields, RFC 9651) and the older
`X-RateLimit-*`; they go with every answer to an authenticated request, also with refusals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPMethod

from quart import request

from rdev.adapters.http.exchange import Exchange
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.keys import Principal
from rdev.domain.limiter import TICKS_PER_S, Decision, Hit, Policy, RateLimit
from rdev.services.limiter import AddressLimiter, RateLimitedError, RateLimiter, StreamLimiter

# Routes that start a command, and routes that hold a stream, by their templates.
START_ROUTES = frozenset(f"/projects/{{project}}/{kind}" for kind in ("shell", "git", "claude"))
STREAM_ROUTES = frozenset({"/commands/{command}/events", "/projects/{project}/events", "/events"})
_READS = frozenset({HTTPMethod.GET, HTTPMethod.HEAD, HTTPMethod.OPTIONS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a principal may: `limit` None is as much as it likes. One that `is_exempt` is told a
    full quota and never counted."""

    limit: RateLimit | None
    is_exempt: bool = False


class RateLimits:
    """The limits of one server, in the order a request meets them."""

    def __init__(
        self,
        *,
        addresses: AddressLimiter,
        limiter: RateLimiter,
        streams: StreamLimiter,
        starts: RateLimit | None,
        allowance_of: Callable[[Principal], Allowance],
        may_start: Callable[[Principal, ProjectId], bool],
    ) -> None:
        """`starts`: commands of one project, whoever starts them; None for as many as come. A
        start that is not `may_start` is refused later, and counts for the key alone."""
        self._addresses = addresses
        self._limiter = limiter
        self._streams = streams
        self._starts = None if starts is None else Policy(name="starts", limit=starts)
        self._allowance_of = allowance_of
        self._may_start = may_start

    def enter(self, this: Exchange) -> None:
        """Before anybody knows who asks. Errors: TOO_MANY_REQUESTS."""
        try:
            self._addresses.enter(this.client_ip)
        except RateLimitedError as error:
            this.headers += _headers(error.decisions)
            raise

    def failed(self, this: Exchange) -> None:
        """A credential was refused; a request without one tried nothing."""
        if this.has_credential:
            self._addresses.failed(this.client_ip)

    async def admit(self, this: Exchange, principal: Principal) -> None:
        """Right after the authentication, so that a refusal for a missing right counts too.

        Errors: TOO_MANY_REQUESTS; SERVICE_UNAVAILABLE for a write that cannot be counted.
        """
        allowance = self._allowance_of(principal)
        hits = self._hits(this, principal, allowance)
        if allowance.is_exempt:
            this.headers += _headers([_full(hit.policy) for hit in hits])
            return
        try:
            decisions = await self._limiter.take(hits, is_write=this.method not in _READS)
        except RateLimitedError as error:
            this.headers += _headers(error.decisions)
            raise
        streams = self._place(this, principal)
        this.headers += _headers(decisions, unknown=[hit.policy for hit in hits], more=streams)

    def _hits(self, this: Exchange, principal: Principal, allowance: Allowance) -> list[Hit]:
        """What the request is counted as."""
        hits = []
        if allowance.limit is not None:
            policy = Policy(name="key", limit=allowance.limit)
            hits.append(Hit(policy=policy, subject=principal.key_id))
        if self._starts is not None and this.method == "POST" and this.route in START_ROUTES:
            project = (request.view_args or {}).get("project", "")
            if is_project_id(project) and self._may_start(principal, ProjectId(project)):
                hits.append(Hit(policy=self._starts, subject=project))
        return hits

    def _place(self, this: Exchange, principal: Principal) -> tuple[str, str] | None:
        """Take a place for a stream until its end; the members that tell of it."""
        if this.route not in STREAM_ROUTES:
            return None
        this.at_end.append(self._streams.enter(principal.key_id))
        left = self._streams.left(principal.key_id)
        policy = f'"streams";q={self._streams.most};qu="concurrent-requests"'
        return policy, f'"streams";r={left}'


def _headers(
    decisions: Sequence[Decision],
    *,
    unknown: Sequence[Policy] = (),
    more: tuple[str, str] | None = None,
) -> list[tuple[bytes, bytes]]:
    """The fields for what the windows said; of `unknown` ones that said nothing, the policies.

    Seconds are rounded up: who waits that long is not early.
    """
    policies = [one.policy for one in decisions] or unknown
    told = [
        f'"{policy.name}";q={policy.limit.requests};w={policy.limit.window_s}'
        for policy in policies
    ]
    limits = [
        f'"{one.policy.name}";r={one.remaining};t={_seconds(one.reset_ticks, one.retry_ticks)}'
        for one in decisions
    ]
    if more is not None:
        told.append(more[0])
        limits.append(more[1])
    fields = [("ratelimit-policy", ", ".join(told)), ("ratelimit", ", ".join(limits))]
    return [
        (name.encode(), value.encode()) for name, value in [*fields, *_older(decisions)] if value
    ]


def _older(decisions: Sequence[Decision]) -> list[tuple[str, str]]:
    """`X-RateLimit-*` knows one window: the one that refuses for longest, else the first."""
    if not decisions:
        return []
    one = max(decisions, key=lambda decision: decision.retry_ticks)
    return [
        ("x-ratelimit-limit", str(one.policy.limit.requests)),
        ("x-ratelimit-remaining", str(one.remaining)),
        ("x-ratelimit-reset", str(_seconds(one.reset_ticks, one.retry_ticks))),
    ]


def _seconds(reset_ticks: int, retry_ticks: int) -> int:
    """When more is left, at the latest when a retry is admitted."""
    return math.ceil(max(reset_ticks, retry_ticks) / TICKS_PER_S)


def _full(policy: Policy) -> Decision:
    """What an exempt principal is told."""
    return Decision(
        policy=policy,
        is_admitted=True,
        remaining=policy.limit.requests,
        reset_ticks=0,
        retry_ticks=0,
    )
