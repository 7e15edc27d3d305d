"""A client of the HTTP API for the command line: requests, and streams that survive a restart."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import click
import httpx2
import msgspec
import trio

from rdev.domain.errors import ErrorCode, RdevError

CONNECT_TIMEOUT_S = 5.0
# The server says something at least every 15 s; three times that is a dead connection.
SILENCE_S = 45.0
RECONNECT_MAX_S = 5.0
# A proxy's own words for a server behind it that is away.
AWAY = frozenset({502, 503, 504})

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event of a stream, its data decoded."""

    name: str
    data: Json
    id: str = ""


@dataclass(slots=True)
class _Position:
    """How far a stream was read, over all its connections. A feed goes on after a `complete`, which
    says whose it is."""

    last_id: str = ""
    is_complete: bool = False
    failures: int = 0

    def advance(self, event: Event) -> None:
        self.last_id = event.id or self.last_id
        self.is_complete = event.name == "complete" and "command_id" not in event.data
        self.failures = 0


class Client:
    """One server and one key. Made by `open_client`."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def get(self, path: str) -> Json:
        """The `data` of a GET. Errors: the server's, as RdevError."""
        return await self._request("GET", path, None)

    async def pages(self, path: str) -> list[Json]:
        """Every item of a list, over all its pages; `path` has no query. Errors: the server's."""
        items: list[Json] = []
        cursor: str | None = ""
        while cursor is not None:
            query = "?limit=200" + (f"&cursor={cursor}" if cursor else "")
            answer = await self._answer("GET", path + query, None)
            items += msgspec.convert(answer["data"], list[Json])
            cursor = msgspec.convert(answer["meta"], dict[str, str]).get("next_cursor")
        return items

    async def post(self, path: str, body: Mapping[str, object]) -> Json:
        """The `data` of a POST. Errors: the server's, as RdevError."""
        return await self._request("POST", path, body)

    async def delete(self, path: str) -> Json:
        """The `data` of a DELETE. Errors: the server's, as RdevError."""
        return await self._request("DELETE", path, None)

    async def follow(
        self,
        path: str,
        heed: Callable[[Event], None],
        *,
        lost: Callable[[str], None],
        after: str = "",
    ) -> None:
        """Give every event of a stream after the id `after` to `heed`, in order and once: those of
        a command up to `complete`, those of a feed for ever.

        A stream that ends earlier, for whatever reason, is resumed after the last event; `lost` is
        told why. Errors: the server's refusals (RdevError); a server that is away is waited for.
        """
        position = _Position(last_id=after)
        while True:
            try:
                await self._read_stream(path, position, heed)
                reason = "the stream ended"
            except httpx2.TransportError as error:
                reason = str(error) or type(error).__name__
            except RdevError as error:
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE:
                    raise
                reason = error.message
            if position.is_complete:
                return
            position.failures += 1
            lost(reason)
            await trio.sleep(min(RECONNECT_MAX_S, 0.1 * 2 ** min(position.failures, 10)))

    async def _read_stream(
        self, path: str, position: "_Position", heed: Callable[[Event], None]
    ) -> None:
        """One connection, until `complete` or until the server ends it."""
        headers = {"Last-Event-ID": position.last_id} if position.last_id else {}
        timeout = httpx2.Timeout(CONNECT_TIMEOUT_S, read=SILENCE_S)
        async with self._http.sse(path, headers=headers, timeout=timeout) as source:
            response = source.response
            if response.status_code == 204:
                position.is_complete = True  # nothing comes after `after`
                return
            if response.status_code != 200:
                await response.aread()
                raise _refusal(response)
            async for event in source:
                data = msgspec.json.decode(event.data, type=Json)
                told = Event(name=event.event, data=data, id=event.id)
                heed(told)
                position.advance(told)

    async def _request(self, method: str, path: str, body: Mapping[str, object] | None) -> Json:
        return msgspec.convert((await self._answer(method, path, body))["data"], Json)

    async def _answer(self, method: str, path: str, body: Mapping[str, object] | None) -> Json:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            message = f"{self._http.base_url} cannot be reached ({error}); is `rdev serve` running?"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message) from error
        if response.status_code >= 400:
            raise _refusal(response)
        answer: Json = response.json()
        return answer


def _refusal(response: httpx2.Response) -> RdevError:
    """The server's own error, or what can be said of an answer that is not rdev's."""
    try:
        error = response.json()["error"]
        return RdevError(ErrorCode(error["code"]), error["message"])
    except (ValueError, KeyError, TypeError):
        is_away = response.status_code in AWAY
        code = ErrorCode.SERVICE_UNAVAILABLE if is_away else ErrorCode.INTERNAL_ERROR
        return RdevError(code, f"{response.url} answered {response.status_code}")


@asynccontextmanager
async def open_client(url: str, key: str) -> AsyncIterator[Client]:
    """A client for the time of the block. Errors: BAD_REQUEST for what is no URL."""
    headers = {b"Authorization": b"Bearer " + key.strip().encode()}
    timeout = httpx2.Timeout(CONNECT_TIMEOUT_S, read=SILENCE_S)
    try:
        http = httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout, trust_env=False)
    except httpx2.InvalidURL as error:
        raise RdevError(ErrorCode.BAD_REQUEST, f"{url} is no URL: {error}") from error
    async with http:
        yield Client(http)


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--url` and `--key`, from the environment where they are not given."""
    url = click.option(
        "--url", envvar="RDEV_URL", default="http://127.0.0.1:8080", show_default=True
    )
    key = click.option("--key", envvar="RDEV_KEY", required=True, help="An API key.")
    return url(key(command))
