"""The gate before every route: names the route, asks who it is and whether they may.

In order: authentication, the rate limits, the route table, further hooks. Errors are the shell's to
answer.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache

from quart import g, request

from rdev.adapters.http.access import Access, Route, admit
from rdev.adapters.http.credentials import Credentials
from rdev.adapters.http.exchange import Exchange, exchange
from rdev.adapters.http.rate_limits import RateLimits
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.keys import Principal
from rdev.ports.authentication import ProjectOf
from rdev.ports.telemetry import AuthFailure, Telemetry

_FAILURE_OF_CODE = {
    ErrorCode.UNAUTHORIZED: AuthFailure.INVALID,
    ErrorCode.KEY_REVOKED: AuthFailure.REVOKED,
    ErrorCode.KEY_EXPIRED: AuthFailure.EXPIRED,
    ErrorCode.IP_NOT_ALLOWED: AuthFailure.IP_BLOCKED,
}

# Runs after the authentication, in order; may raise RdevError.
Hook = Callable[[], Awaitable[None]]


class Gate:
    """Runs before every route: names the route, asks who it is and whether they may, then the
    further hooks."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        project_of: ProjectOf,
        access: Mapping[Route, Access],
        telemetry: Telemetry,
        public_paths: frozenset[str],
        hooks: Sequence[Hook],
        rate_limits: RateLimits | None,
    ) -> None:
        self._credentials = credentials
        self._project_of = project_of
        self._access = access
        self._telemetry = telemetry
        self._public_paths = public_paths
        self._hooks = hooks
        self._rate_limits = rate_limits

    async def enter(self) -> None:
        """Before each route. (A method: Quart runs objects with `__call__` in a thread.)"""
        rule = request.url_rule
        if rule is not None:  # else no such route or method: Quart answers that, whoever asks
            await self.admit(template_of(rule.rule), fields=request.view_args or {})
            g.principal = exchange().principal

    async def admit(self, route: str, *, fields: Mapping[str, str]) -> None:
        """Let the running exchange in under the route's template; `fields` are the parts of the
        path that it names. Errors: as `access.admit` and the hooks."""
        this = exchange()
        this.route = route
        this.is_counted = True
        self._telemetry.request_started(this.method_label, this.route)
        if this.route in self._public_paths:
            return
        this.principal = principal = await self._checked(this, fields)
        if self._rate_limits is not None:
            await self._rate_limits.admit(this, principal)
        this.slot.belong_to(principal.key_id)
        if this.method != "OPTIONS":
            method = "GET" if this.method == "HEAD" else this.method
            await admit(principal, self._access[method, route], fields, self._project_of)
        for hook in self._hooks:
            await hook()

    async def _checked(self, this: Exchange, fields: Mapping[str, str]) -> Principal:
        """The principal; every check is counted, whatever came out."""
        try:
            principal = await self._credentials.identify(this, fields)
        except RdevError as error:
            failure = _FAILURE_OF_CODE.get(error.code)
            if failure is not None:
                self._telemetry.authenticated(failure)
                if self._rate_limits is not None:
                    self._rate_limits.failed(this)
            raise
        self._telemetry.authenticated(None)
        return principal


def credential_of(headers: dict[bytes, str]) -> str | None:
    """The key that the request carries: `X-API-Key`, else a bearer token."""
    key = headers.get(b"x-api-key")
    if not key:
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else ""
    # Clients send UTF-8, as the setting is; a key may be any string.
    return key.encode("latin-1").decode("utf-8", "replace") or None


@cache
def template_of(rule: str) -> str:
    """`/projects/<string:id>` as clients write it: `/projects/{id}`."""
    return re.sub(r"<(?:[^<>]*:)?([^<>:]+)>", r"{\1}", rule)
