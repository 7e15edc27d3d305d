"""Limits over a real socket: who is refused when, and headers that a strict parser reads."""

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network

import pytest
import trio
from quart import Blueprint, Response

from rdev.adapters.http.envelope import success
from rdev.adapters.http.plain import Asked, PlainRoute
from rdev.adapters.http.rate_limits import Allowance, RateLimits
from rdev.domain.addresses import Network
from rdev.domain.ids import ProjectId
from rdev.domain.keys import Principal
from rdev.domain.limiter import RateLimit
from rdev.services.limiter import AddressLimiter, RateLimiter, StreamLimiter
from tests.adapters.http.conftest import Noted, Reply, Serve, Site
from tests.adapters.http.structured_fields import FieldError, parse_list
from tests.fakes.limiter import FakeRateLimits

HOUR_S = 3_600


def per_hour(requests: int) -> RateLimit:
    return RateLimit(requests=requests, window_s=HOUR_S)


@dataclass(slots=True, kw_only=True)
class Door:
    """The limits of a server, and the store behind them."""

    store: FakeRateLimits
    rate_limits: RateLimits
    telemetry: Noted


def make_door(
    *,
    key: RateLimit | None = None,
    starts: RateLimit | None = None,
    address: RateLimit | None = None,
    failures: RateLimit | None = None,
    streams: int = 2,
    is_exempt: bool = False,
    may_start: Callable[[Principal, ProjectId], bool] = lambda principal, project: True,
) -> Door:
    store, telemetry = FakeRateLimits(), Noted()
    rate_limits = RateLimits(
        addresses=AddressLimiter(requests=address, failures=failures, telemetry=telemetry),
        limiter=RateLimiter(store=store, telemetry=telemetry),
        streams=StreamLimiter(most=streams, telemetry=telemetry),
        starts=starts,
        allowance_of=lambda principal: Allowance(limit=key, is_exempt=is_exempt),
        may_start=may_start,
    )
    return Door(store=store, rate_limits=rate_limits, telemetry=telemetry)


def routes(leave: trio.Event | None = None) -> Blueprint:
    """What the limits know by name, and something else."""
    blueprint = Blueprint("test", __name__)

    @blueprint.get("/things")
    async def read() -> Response:
        return success(1)

    @blueprint.post("/things")
    async def write() -> Response:
        return success(2)

    @blueprint.post("/projects/<project>/shell")
    async def start(project: str) -> Response:
        return success(project)

    @blueprint.get("/commands/<command>/events")
    async def follow(command: str) -> Response:
        if leave is not None:
            await leave.wait()
        return success(command)

    return blueprint


def members(reply: Reply, name: str) -> dict[object, dict[str, object]]:
    """A field as a strict parser reads it: parameters by member."""
    text = reply.header(name)
    assert text is not None, f"no {name}"
    return {value: dict(parameters) for value, parameters in parse_list(text)}


def older(reply: Reply) -> tuple[int, int, int]:
    found = [reply.header(f"x-ratelimit-{name}") for name in ("limit", "remaining", "reset")]
    return tuple(int(text) for text in found)


async def test_every_answer_tells_the_limit_and_what_is_left(serve: Serve) -> None:
    door = make_door(key=per_hour(3))
    site: Site = await serve(routes(), rate_limits=door.rate_limits)

    first = await site.request("GET", "/things")
    second = await site.request("PUT", "/things")
    third = await site.request("POST", "/things")

    assert (first.status, second.status, third.status) == (200, 405, 200)
    assert members(first, "RateLimit-Policy") == {"key": {"q": 3, "w": HOUR_S}}
    told = members(first, "RateLimit")["key"]
    assert told["r"] == 2
    assert 3_598 <= told["t"] <= 3_661
    assert older(first) == (3, 2, told["t"])
    assert older(third)[1] == 1


async def test_the_request_over_the_limit_is_told_when_to_come_again(serve: Serve) -> None:
    door = make_door(key=per_hour(1))
    site = await serve(routes(), rate_limits=door.rate_limits)
    await site.request("GET", "/things")

    refused = await site.request("GET", "/things")

    assert refused.status == 429
    body = refused.json()
    assert body["error"]["code"] == "TOO_MANY_REQUESTS"
    assert body["violated-policies"] == ["key"]
    told = members(refused, "RateLimit")["key"]
    assert told["r"] == 0
    # Not before the quota is there again, and no second later.
    assert int(refused.header("retry-after")) == told["t"] == older(refused)[2]
    assert members(refused, "RateLimit-Policy") == {"key": {"q": 1, "w": HOUR_S}}
    assert site.telemetry.refused == []
    assert door.telemetry.refused == ["rate_limit"]


async def test_a_start_counts_for_the_project_too_in_one_question(serve: Serve) -> None:
    door = make_door(key=per_hour(9), starts=per_hour(1))
    site = await serve(routes(), rate_limits=door.rate_limits)

    first = await site.request("POST", "/projects/demo/shell")
    refused = await site.request("POST", "/projects/demo/shell")
    other = await site.request("POST", "/projects/other/shell")

    assert (first.status, refused.status, other.status) == (200, 429, 200)
    assert members(first, "RateLimit-Policy").keys() == {"key", "starts"}
    assert refused.json()["violated-policies"] == ["starts"]
    # The refused start consumed nothing of the key's.
    assert members(refused, "RateLimit")["key"]["r"] == 8
    assert members(other, "RateLimit")["key"]["r"] == 7
    assert older(refused)[:2] == (1, 0)
    assert door.store.asked == 3


async def test_what_may_not_be_started_counts_for_the_key_alone(serve: Serve) -> None:
    door = make_door(
        key=per_hour(9), starts=per_hour(1), may_start=lambda principal, project: project == "own"
    )
    site = await serve(routes(), rate_limits=door.rate_limits)

    for path in ("/projects/foreign/shell", "/projects/UPPER/shell"):
        reply = await site.request("POST", path)
        assert members(reply, "RateLimit").keys() == {"key"}
    assert members(await site.request("POST", "/projects/own/shell"), "RateLimit").keys() == {
        "key",
        "starts",
    }


async def test_the_exempt_are_told_a_full_quota_and_never_counted(serve: Serve) -> None:
    door = make_door(key=per_hour(1), starts=per_hour(1), is_exempt=True)
    site = await serve(routes(), rate_limits=door.rate_limits)

    replies = [await site.request("POST", "/projects/demo/shell") for _ in range(3)]

    assert [reply.status for reply in replies] == [200, 200, 200]
    assert members(replies[2], "RateLimit")["key"] == {"r": 1, "t": 0}
    assert older(replies[2]) == (1, 1, 0)
    assert door.store.asked == 0


async def test_without_a_limit_there_is_nothing_to_tell(serve: Serve) -> None:
    site = await serve(routes(), rate_limits=make_door().rate_limits)

    reply = await site.request("GET", "/things")

    assert reply.status == 200
    assert not [name for name, _ in reply.headers if "ratelimit" in name]


async def test_without_the_store_reads_are_open_and_writes_closed(serve: Serve) -> None:
    door = make_door(key=per_hour(1))
    door.store.is_gone = True
    site = await serve(routes(), rate_limits=door.rate_limits)

    read = await site.request("GET", "/things")
    write = await site.request("POST", "/things")

    assert (read.status, write.status) == (200, 503)
    assert members(read, "RateLimit-Policy") == {"key": {"q": 1, "w": HOUR_S}}
    assert read.header("RateLimit") is None
    assert write.json()["error"]["code"] == "SERVICE_UNAVAILABLE"
    assert write.header("retry-after") == "1"


async def test_an_address_is_refused_before_anything_else_is_done(serve: Serve) -> None:
    door = make_door(key=per_hour(9), address=per_hour(2))
    site = await serve(routes(), rate_limits=door.rate_limits)

    replies = [await site.request("GET", "/things") for _ in range(3)]
    nowhere = await site.request("GET", "/nowhere")
    probe = await site.request("GET", "/health", key=None)

    assert [reply.status for reply in replies] == [200, 200, 429]
    assert replies[2].json()["violated-policies"] == ["address"]
    assert int(replies[2].header("retry-after")) >= HOUR_S - 1
    assert members(replies[2], "RateLimit")["address"]["r"] == 0
    assert nowhere.status == 429
    # Probes are outside of every limit; this server has none, so it says so.
    assert probe.status == 404
    assert len(site.telemetry.auth) == 2
    assert door.store.asked == 2


async def test_the_address_behind_a_trusted_proxy_is_the_clients(serve: Serve) -> None:
    door = make_door(address=per_hour(1))
    trusted: list[Network] = [ip_network("127.0.0.0/8")]
    site = await serve(routes(), rate_limits=door.rate_limits, trusted_proxies=trusted)

    def ask(client: str) -> object:
        return site.request("GET", "/things", X_Forwarded_For=client)

    assert (await ask("192.0.2.1")).status == 200
    assert (await ask("192.0.2.2")).status == 200
    assert (await ask("192.0.2.1")).status == 429
    assert (await ask("2001:db8::1")).status == 200
    assert (await ask("2001:db8::2")).status == 429


async def test_after_failed_credentials_the_right_one_is_not_looked_at_either(
    serve: Serve,
) -> None:
    door = make_door(failures=per_hour(2))
    site = await serve(routes(), rate_limits=door.rate_limits)

    failed = [await site.request("GET", "/things", key=key) for key in (None, "no", "revoked")]
    right = await site.request("GET", "/things")

    assert [reply.status for reply in failed] == [401, 401, 401]
    assert right.status == 429
    assert right.json()["violated-policies"] == ["failures"]
    assert len(site.telemetry.auth) == 3


async def test_a_request_without_a_credential_is_no_failure(serve: Serve) -> None:
    door = make_door(failures=per_hour(1))
    site = await serve(routes(), rate_limits=door.rate_limits)

    for _ in range(3):
        assert (await site.request("GET", "/things", key=None)).status == 401


async def test_a_key_holds_so_many_streams_and_gives_them_back(
    serve: Serve, nursery: trio.Nursery, eventually: Callable[..., object]
) -> None:
    leave = trio.Event()
    door = make_door(key=per_hour(9), streams=2)
    site = await serve(routes(leave), rate_limits=door.rate_limits)
    ended: list[Reply] = []

    async def follow() -> None:
        ended.append(await site.request("GET", "/commands/cmd_1/events"))

    nursery.start_soon(follow)
    nursery.start_soon(follow)
    await eventually(lambda: door.store.asked == 2)

    refused = await site.request("GET", "/commands/cmd_1/events")
    leave.set()
    await eventually(lambda: len(ended) == 2)
    again = await site.request("GET", "/commands/cmd_1/events")

    assert refused.status == 429
    assert refused.json()["violated-policies"] == ["streams"]
    assert refused.header("retry-after") == "5"
    assert again.status == 200
    assert members(again, "RateLimit-Policy")["streams"] == {
        "q": 2,
        "qu": "concurrent-requests",
    }
    assert members(again, "RateLimit")["streams"] == {"r": 1}


async def test_a_stream_without_the_framework_takes_its_place_too(
    serve: Serve, nursery: trio.Nursery, eventually: Callable[..., object]
) -> None:
    leave, ended = trio.Event(), trio.Event()
    door = make_door(key=per_hour(9), streams=1)

    async def follow(asked: Asked) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": []}
        await asked.send(head)
        await leave.wait()
        await asked.send({"type": "http.response.body", "body": b"end", "more_body": False})

    route = PlainRoute("/commands/{command}/events", follow)
    site = await serve(plain=[route], rate_limits=door.rate_limits)

    async def first() -> None:
        reply = await site.request("GET", "/commands/cmd_1/events")
        assert members(reply, "RateLimit")["streams"] == {"r": 0}
        ended.set()

    nursery.start_soon(first)
    await eventually(lambda: door.store.asked == 1)

    assert (await site.request("GET", "/commands/cmd_1/events")).status == 429
    leave.set()
    await ended.wait()
    assert (await site.request("GET", "/commands/cmd_1/events")).status == 200


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", []),
        ('"a";q=1;w=60, "b";q=2', [("a", {"q": 1, "w": 60}), ("b", {"q": 2})]),
        (' "a\\"b" ;x', None),
        ('"a\\"b";x', [('a"b', {"x": True})]),
        ("tok/en;n=-5;t=?0", [("tok/en", {"n": -5, "t": False})]),
        ('"a",', None),
        ('"a" "b"', None),
        ('"a";Q=1', None),
        ('"a";q=', None),
        ('"a\x7f"', None),
        ('"a', None),
        ("1.5", None),
        ("1234567890123456", None),
    ],
)
def test_the_parser_is_strict(text: str, parsed: object) -> None:
    if parsed is None:
        with pytest.raises(FieldError):
            parse_list(text)
    else:
        assert parse_list(text) == parsed
