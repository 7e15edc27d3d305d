"""Routes of sessions and stream tokens: what browsers have instead of headers."""

from collections.abc import Sequence
from datetime import datetime
from math import ceil

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.access import require_command
from rdev.adapters.http.cookies import forgotten, session_cookie
from rdev.adapters.http.describe import Answer, Described, Description
from rdev.adapters.http.envelope import created, no_content, read_json
from rdev.adapters.http.exchange import exchange, principal
from rdev.adapters.http.origin import origin_of
from rdev.domain.addresses import Network
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.fields import Fields, Json
from rdev.domain.ids import CommandId, is_command_id
from rdev.ports.authentication import ProjectOf
from rdev.services.tickets import Tickets

_UNSTORED = {"Cache-Control": "no-store"}


def _read_stream(body: Json) -> CommandId:
    """`{stream_id}`. Errors: BAD_REQUEST, all faults; NOT_FOUND for what is no command's id."""
    fields = Fields(body)
    text = fields.text("stream_id", max_bytes=100, required=True) or ""
    fields.finish()
    if not is_command_id(text):
        raise RdevError(ErrorCode.NOT_FOUND, f"there is no command {text!r}")
    return CommandId(text)


DESCRIBED: Described = {
    ("POST", "/session"): Description(
        summary="Open a session for a browser",
        tag="sessions",
        about="With a key, not with a session. The cookie is HttpOnly and SameSite=Strict.",
        answers={
            201: Answer(
                about="the cookie is in the answer",
                schema=schemas.SESSION,
                headers=("Location", "Set-Cookie"),
            )
        },
    ),
    ("DELETE", "/session"): Description(
        summary="Close the session",
        tag="sessions",
        answers={204: Answer(about="the cookie is forgotten", headers=("Set-Cookie",))},
    ),
    ("POST", "/stream-tokens"): Description(
        summary="Make a token for one stream",
        tag="sessions",
        about="For `?token=` of an EventSource.",
        body=_read_stream,
        example={"stream_id": "cmd_019a8f2e4b7c7d1e8f3a5b6c7d8e9f01"},
        answers={201: Answer(about="made", schema=schemas.STREAM_TOKEN, headers=("Location",))},
        errors=(ErrorCode.NOT_FOUND,),
    ),
}


def ticket_routes(
    tickets: Tickets, project_of: ProjectOf, trusted_proxies: Sequence[Network]
) -> Blueprint:
    """`/session` and `/stream-tokens`. A ticket is in the answer that made it and in no other."""
    routes = Blueprint("tickets", __name__)

    @routes.post("/session")
    async def open_session() -> Response:
        this = exchange()
        if this.ticket is not None:
            # Or a session would never end.
            raise RdevError(ErrorCode.FORBIDDEN, "a session is opened with a key, not with another")
        issued = tickets.open_session(principal())
        origin = origin_of(this.scope, trusted_proxies)
        good_for_s = _seconds(issued.ends_at, this.now())
        cookie = session_cookie(issued.text, origin, this.client_ip, good_for_s=good_for_s)
        this.headers.append(cookie)
        data = {"key_id": principal().key_id, "expires_at": issued.ends_at}
        return created(data, location="/session", headers=_UNSTORED)

    @routes.delete("/session")
    async def close_session() -> Response:
        this = exchange()
        this.headers.append(forgotten(origin_of(this.scope, trusted_proxies), this.client_ip))
        return no_content()

    @routes.post("/stream-tokens")
    async def make_stream_token() -> Response:
        stream = _read_stream(await read_json())
        await require_command(principal(), stream, project_of)
        issued = tickets.issue_stream_token(principal(), stream)
        path = f"/commands/{stream}/events"
        data = {
            "token": issued.text,
            "stream_id": stream,
            "url": f"{path}?token={issued.text}",
            "expires_at": issued.ends_at,
        }
        return created(data, location=path, headers=_UNSTORED)

    return routes


def _seconds(until: datetime, now: datetime) -> int:
    """Whole seconds from now, rounded up: the ticket itself knows its end better than a browser."""
    return max(0, ceil((until - now).total_seconds()))
