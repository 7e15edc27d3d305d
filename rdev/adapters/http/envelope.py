"""What routes read and answer: strict JSON in, the `{data, meta}` envelope out.

Routes name outcomes (`success`, `created`, `accepted`), never statuses, and catch nothing.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from http import HTTPStatus

import msgspec
import trio
from quart import Response, request

from rdev.adapters.http.exchange import exchange, hold
from rdev.adapters.http.limits import given_up
from rdev.adapters.http.wire import plain, stamp
from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request

_JSON = "application/json"


def success(
    data: object, *, next_cursor: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """200 with the data; `next_cursor` is None on the last page and for what is no list."""
    return _enveloped(data, HTTPStatus.OK, next_cursor, headers)


def created(data: object, *, location: str, headers: dict[str, str] | None = None) -> Response:
    """201: the thing exists now, under `location`."""
    return _enveloped(data, HTTPStatus.CREATED, None, {"Location": location, **(headers or {})})


def accepted(data: object, *, headers: dict[str, str] | None = None) -> Response:
    """202: it was asked for and will happen."""
    return _enveloped(data, HTTPStatus.ACCEPTED, None, headers)


def no_content() -> Response:
    """204, which also ends an EventSource."""
    response = Response(b"", status=HTTPStatus.NO_CONTENT)
    del response.headers["Content-Type"]
    return response


def stream(
    body: AsyncGenerator[bytes, None],
    *,
    content_type: str,
    headers: dict[str, str] | None = None,
) -> Response:
    """200 with a body that comes as it comes, for as long as the client stays.

    The head leaves together with the first piece. When the client goes, the generator is cancelled
    where it waits and its `finally` runs. Errors: SERVICE_UNAVAILABLE when too many are held.
    """
    hold()
    response = Response(body, content_type=content_type, headers=headers)
    # Quart cuts every response after RESPONSE_TIMEOUT (60 s), silent or not, unless told so.
    response.timeout = None
    return response


async def read_json() -> dict[str, object]:
    """The JSON object in the body.

    Errors: UNSUPPORTED_MEDIA_TYPE where it is not declared as JSON; BAD_REQUEST where it is not
    UTF-8, not JSON (NaN, lone surrogates and numbers out of range are not), nested too deep, not
    an object, or has a name twice in one object. PAYLOAD_TOO_LARGE comes from the body limit.
    SERVICE_UNAVAILABLE where too many bodies are on their way, most of them this caller's.
    Blocks: until the body is there; 408 after the body timeout.
    """
    kind = request.mimetype
    if kind != _JSON and not kind.endswith("+json"):
        message = f"the body must be {_JSON}, not {kind or 'undeclared'}"
        raise RdevError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, message)
    body = await _body()
    try:
        # msgspec is strict about bytes and numbers but lets the last of two equal names win; the
        # standard library sees both.
        msgspec.json.decode(body)
        value = json.loads(body, object_pairs_hook=_object)
    except msgspec.DecodeError as error:
        raise _malformed(f"the body is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise _malformed("the body is not UTF-8") from error
    except ValueError as error:
        raise _malformed("a number in the body has too many digits") from error
    except RecursionError as error:
        raise _malformed("the body is nested too deep") from error
    if not isinstance(value, dict):
        raise _malformed("the body must be a JSON object")
    return value


async def _body() -> bytes:
    """The body. While it is on its way, the request takes no place among those in work."""
    this = exchange()
    with trio.CancelScope() as wait:
        if this.is_body_pending:
            this.slot.read(give_up=wait.cancel)
        body = await request.get_data(cache=True, as_text=False, parse_form_data=False)
        this.slot.enter()
        return body
    raise given_up()


def _object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object whose names are all different. Errors: BAD_REQUEST."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise _malformed(f"a name stands more than once in one object: {', '.join(twice)}")
    return value


def _malformed(message: str) -> RdevError:
    """One fault of the body as a whole."""
    return bad_request([Fault(pointer="", message=message)])


def _enveloped(
    data: object,
    status: HTTPStatus,
    next_cursor: str | None,
    headers: dict[str, str] | None,
) -> Response:
    """The envelope of the running exchange around the data."""
    this = exchange()
    meta = {"request_id": this.request_id, "timestamp": stamp(this.now())}
    if next_cursor is not None:
        meta["next_cursor"] = next_cursor
    body = msgspec.json.encode({"data": plain(data), "meta": meta}, enc_hook=str)
    return Response(body, status=status, headers=headers, content_type=_JSON)
