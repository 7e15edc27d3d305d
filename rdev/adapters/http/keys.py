"""Routes of API keys."""

from quart import Blueprint, Response, request

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import Answer, Described, Description
from rdev.adapters.http.envelope import created, read_json, success
from rdev.adapters.http.exchange import actor, principal
from rdev.adapters.http.idempotency import idempotency_of, replay_headers
from rdev.adapters.http.query import PAGE, cursor_of, limit_of
from rdev.domain.errors import ErrorCode
from rdev.domain.ids import KeyId, is_key_id
from rdev.domain.key_requests import parse_key, parse_rotation
from rdev.domain.key_text import PREFIX
from rdev.domain.keys import Key
from rdev.services.keys import Keys, ShownKey

_KEY = schemas.ref("Key")
_SHOWN_ONCE = Answer(
    about="made; `key` is its text, shown here once",
    schema=schemas.ref("ShownKey"),
    headers=("Location", "Idempotent-Replayed"),
)

DESCRIBED: Described = {
    ("POST", "/keys"): Description(
        summary="Make an API key",
        tag="keys",
        about="Nobody grants a scope or a project they do not hold.",
        body=parse_key,
        example={"name": "ci", "scopes": ["projects:execute"], "project_ids": ["demo"]},
        answers={201: _SHOWN_ONCE},
        errors=(ErrorCode.CONFLICT,),
        is_idempotent=True,
    ),
    ("GET", "/keys"): Description(
        summary="The keys that the key sees",
        tag="keys",
        parameters=PAGE,
        answers={200: Answer(about="a page, newest first", schema=_KEY, is_page=True)},
    ),
    ("GET", "/keys/{key}"): Description(
        summary="One key", tag="keys", answers={200: Answer(about="the key", schema=_KEY)}
    ),
    ("DELETE", "/keys/{key}"): Description(
        summary="Revoke a key",
        tag="keys",
        answers={200: Answer(about="the key, revoked", schema=_KEY)},
        errors=(ErrorCode.CONFLICT,),
    ),
    ("POST", "/keys/{key}/rotate"): Description(
        summary="Give a key another secret",
        tag="keys",
        about="Both secrets are good until the grace is over.",
        body=parse_rotation,
        example={"grace_s": 3600},
        answers={201: _SHOWN_ONCE},
        errors=(ErrorCode.CONFLICT,),
        is_idempotent=True,
    ),
}


def key_routes(keys: Keys) -> Blueprint:
    """`/keys`. The text of a key is in the answer that made it and in no other."""
    routes = Blueprint("keys", __name__)

    @routes.post("/keys")
    async def create_key() -> Response:
        body = await read_json()
        made = await keys.create(
            principal(), parse_key(body), actor(), idempotency=idempotency_of(body)
        )
        headers = replay_headers(is_replay=made.is_replay)
        return created(_once(made), location=f"/keys/{made.key.id}", headers=headers)

    @routes.get("/keys")
    async def list_keys() -> Response:
        limit = limit_of()
        cursor = cursor_of(is_key_id)
        before = KeyId(cursor) if cursor else None
        found = await keys.list_all(principal(), before=before, limit=limit + 1)
        more = found[limit - 1].id if len(found) > limit else None
        return success([_shown(key) for key in found[:limit]], next_cursor=more)

    @routes.get("/keys/<key>")
    async def get_key(key: str) -> Response:
        return success(_shown(await keys.get(principal(), key)))

    @routes.delete("/keys/<key>")
    async def revoke_key(key: str) -> Response:
        return success(_shown(await keys.revoke(principal(), key, actor())))

    @routes.post("/keys/<key>/rotate")
    async def rotate_key(key: str) -> Response:
        # Nothing in it is required: so neither is the body.
        body = await read_json() if request.mimetype or request.content_length else {}
        grace_s = parse_rotation(body)
        made = await keys.rotate(
            principal(), key, actor(), grace_s=grace_s, idempotency=idempotency_of(body)
        )
        headers = replay_headers(is_replay=made.is_replay)
        return created(_once(made), location=f"/keys/{made.key.id}", headers=headers)

    return routes


def _once(made: ShownKey) -> dict[str, object]:
    """A key with its text; null in a replay."""
    return _shown(made.key) | {"key": made.text}


def _shown(key: Key) -> dict[str, object]:
    """A key as clients see it."""
    grant, rate = key.grant, key.rate_limit
    return {
        "id": key.id,
        "name": key.name,
        "key_prefix": PREFIX + key.public_id,
        "status": key.status,
        "scopes": sorted(grant.scopes),
        "project_ids": None if grant.project_ids is None else sorted(grant.project_ids),
        "allowed_ips": [str(network) for network in grant.allowed_ips],
        "rate_limit": rate,
        "created_by": key.created_by,
        "created_at": key.created_at,
        "expires_at": grant.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }
