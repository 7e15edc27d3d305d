"""What happens to every request, whatever it asks for."""

import logging
from ipaddress import ip_network

import pytest
import trio
from quart import Blueprint, request

from rdev.adapters.http.app import HttpLimits
from rdev.adapters.http.envelope import accepted, created, no_content, read_json, success
from rdev.adapters.http.exchange import exchange, hold, offered_trace, principal
from rdev.domain.errors import ErrorCode, Fault, RdevError
from rdev.ports.telemetry import AuthFailure, log_context

things = Blueprint("things", __name__)


@things.get("/things/<string:thing_id>")
async def get_thing(thing_id: str):
    return success({"id": thing_id, "key_id": principal().key_id, "ip": exchange().client_ip})


@things.post("/things")
async def post_thing():
    return created(await read_json(), location="/things/1")


@things.delete("/things/<thing_id>")
async def delete_thing(thing_id: str):
    return accepted(None) if thing_id == "slow" else no_content()


@things.get("/context")
async def get_context():
    return success(dict(log_context.get() or {}))


@things.get("/gone")
async def get_gone():
    raise RdevError(
        ErrorCode.GONE,
        "events before 7 are pruned",
        faults=[Fault(pointer="/after", message="too old")],
        details={"oldest_seq": 7, "status": "hidden"},
    )


@things.get("/grouped")
async def get_grouped():
    async def fail() -> None:
        raise RdevError(ErrorCode.CONFLICT, "somebody was faster", retry_after_s=1.2)

    async with trio.open_nursery() as outer, trio.open_nursery() as inner:
        inner.start_soon(fail)
        outer.start_soon(trio.sleep_forever)


@things.get("/broken")
async def get_broken():
    raise ValueError("password=hunter2")


@things.get("/boom-group")
async def get_boom_group():
    raise ExceptionGroup("two", [ValueError("a"), KeyError("b")])


async def test_a_success_is_enveloped_and_names_who_asked(serve):
    site = await serve(things)

    reply = await site.request("GET", "/things/a")

    assert reply.status == 200
    assert reply.header("content-type") == "application/json"
    assert reply.json() == {
        "data": {"id": "a", "key_id": "key_1", "ip": "127.0.0.1"},
        "meta": {"request_id": "req-1", "timestamp": "2026-01-15T12:00:00.123Z"},
    }


async def test_created_names_the_location_and_no_content_has_none(serve):
    site = await serve(things)

    made = await site.request("POST", "/things", body=b'{"a": 1}', content_type="application/json")
    taken = await site.request("DELETE", "/things/slow")
    gone = await site.request("DELETE", "/things/x")

    assert (made.status, made.header("location"), made.json()["data"]) == (
        201,
        "/things/1",
        {"a": 1},
    )
    assert taken.status == 202
    assert (gone.status, gone.body, gone.header("content-type")) == (204, b"", None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/things/a", 200),
        ("GET", "/nowhere", 404),
        ("PATCH", "/things/a", 405),
        ("GET", "/broken", 500),
        ("GET", "/gone", 410),
    ],
)
async def test_a_sane_request_id_is_echoed_on_every_answer(serve, method, path, status):
    site = await serve(things)

    reply = await site.request(method, path, X_Request_Id="My-id_1.0")

    assert (reply.status, reply.header("x-request-id")) == (status, "My-id_1.0")
    assert reply.json()["meta"]["request_id"] == "My-id_1.0"


@pytest.mark.parametrize("offered", ["", "a b", "x" * 65, "ü", 'a"b'])
async def test_another_request_id_is_replaced(serve, offered):
    site = await serve(things)

    reply = await site.request("GET", "/things/a", X_Request_Id=offered)

    assert reply.header("x-request-id") == "req-1"


async def test_a_refusal_is_a_problem_and_the_original_error_at_once(serve):
    site = await serve(things)

    reply = await site.request("GET", "/gone")

    assert reply.header("content-type") == "application/problem+json"
    assert reply.json() == {
        "type": "urn:rdev:error:gone",
        "title": "Gone",
        "status": 410,
        "detail": "events before 7 are pruned",
        "instance": "/gone",
        "oldest_seq": 7,
        "error": {
            "code": "GONE",
            "message": "events before 7 are pruned",
            "details": [{"pointer": "/after", "message": "too old"}],
            "info": {"oldest_seq": 7, "status": "hidden"},
        },
        "meta": {"request_id": "req-1", "timestamp": "2026-01-15T12:00:00.123Z"},
    }


async def test_a_refusal_inside_nurseries_is_found(serve):
    site = await serve(things)

    reply = await site.request("GET", "/grouped")

    assert (reply.status, reply.header("retry-after")) == (409, "2")


async def test_a_fault_of_ours_says_nothing_and_logs_everything(serve, caplog):
    site = await serve(things)

    with caplog.at_level(logging.INFO, "rdev.http"):
        reply = await site.request("GET", "/broken")
        group = await site.request("GET", "/boom-group")

    assert reply.status == group.status == 500
    assert reply.json()["error"]["code"] == "INTERNAL_ERROR"
    assert b"hunter2" not in reply.body
    assert b"Traceback" not in reply.body
    assert "hunter2" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_wrong_method_names_the_right_ones(serve):
    site = await serve(things)

    reply = await site.request("PUT", "/things")

    assert reply.status == 405
    assert reply.header("allow") == "OPTIONS, POST"
    assert reply.header("content-type") == "application/problem+json"


async def test_every_route_needs_a_credential_in_either_header(serve):
    site = await serve(things)

    without = await site.request("GET", "/things/a", key=None)
    revoked = await site.request("GET", "/things/a", key="revoked")
    bearer = await site.request("GET", "/things/a", key=None, Authorization="bearer rdev_sk_test")
    basic = await site.request("GET", "/things/a", key=None, Authorization="Basic rdev_sk_test")

    assert [r.status for r in (without, revoked, bearer, basic)] == [401, 401, 200, 401]
    assert without.header("www-authenticate") == 'Bearer realm="rdev"'
    assert revoked.json()["error"]["code"] == "KEY_REVOKED"
    assert site.telemetry.auth == [
        AuthFailure.INVALID,
        AuthFailure.REVOKED,
        None,
        AuthFailure.INVALID,
    ]


async def test_the_public_paths_ask_nobody(serve):
    docs = Blueprint("docs", __name__)

    @docs.get("/docs")
    async def get_docs():
        return "docs"

    site = await serve(docs)

    assert (await site.request("GET", "/docs", key=None)).body == b"docs"
    assert site.telemetry.auth == []


async def test_further_hooks_run_after_the_authentication_and_may_refuse(serve):
    async def limit() -> None:
        exchange().headers.append((b"ratelimit", b"r=0"))
        assert principal().key_id == "key_1"
        raise RdevError(ErrorCode.TOO_MANY_REQUESTS, "too fast")

    site = await serve(things, hooks=[limit])

    reply = await site.request("GET", "/things/a")

    assert (reply.status, reply.header("retry-after")) == (429, "1")
    assert reply.header("ratelimit") == "r=0"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "says"),
    [
        (b"{}", "text/plain", 415, "text/plain"),
        (b"{}", "", 415, "undeclared"),
        (b"", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "must be a JSON object"),
        (b"{", "application/json", 400, "not JSON"),
        (b'{"a": NaN}', "application/json", 400, "not JSON"),
        (b'{"a": 1e999}', "application/json", 400, "not JSON"),
        (b'{"a": "\\ud800"}', "application/json", 400, "not JSON"),
        (b'{"a": "\xff"}', "application/json", 400, "UTF-8"),
        (b"\xff\xfe{\x00}\x00", "application/json", 400, "not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "application/json", 400, "more than once"),
        (b'{"a": ' + b"[" * 200_000, "application/json", 400, "nested too deep"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "application/json", 400, "body"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(serve, body, content_type, status, says):
    site = await serve(things)
    declared = {"content_type": content_type} if content_type else {}

    reply = await site.request("POST", "/things", body=body, **declared)

    assert reply.status == status, reply.body
    assert says in reply.json()["detail"]


async def test_charset_and_json_suffixes_are_json(serve):
    site = await serve(things)

    for kind in ("application/json; charset=utf-8", "application/merge-patch+json"):
        reply = await site.request("POST", "/things", body='{"ü": "€"}'.encode(), content_type=kind)
        assert reply.json()["data"] == {"ü": "€"}


@pytest.mark.slow
async def test_a_stalled_body_is_timed_out(serve):
    site = await serve(things, limits=HttpLimits(body_timeout_s=1))

    async with site.connect() as wire:
        await wire.send(
            b"POST /things HTTP/1.1\r\nHost: x\r\nX-API-Key: rdev_sk_test\r\n"
            b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        reply = await wire.reply()

    assert reply.status == 408
    assert reply.json()["detail"] == "the body did not arrive in time"


@pytest.mark.parametrize("target", ["?a=b", "//", "/%ff%00", "http://x/things/a", "*", "/a" * 4000])
async def test_strange_targets_get_an_answer_with_a_request_id(serve, target):
    site = await serve(things)

    reply = await site.request("GET", target)

    assert reply.status in (200, 308, 400, 404)
    assert reply.header("x-request-id") == "req-1"


@pytest.mark.parametrize("host", ["", "a b", "x:y:z", "[::1", "a" * 300, "ü", "x/y?"])
async def test_strange_hosts_get_an_answer_and_break_nothing(serve, host):
    site = await serve(things)

    async with site.connect() as wire:
        await wire.send(
            f"GET /things/a HTTP/1.1\r\nHost: {host}\r\nX-API-Key: rdev_sk_test\r\n\r\n".encode()
        )
        assert (await wire.head()).status in (200, 400)

    assert (await site.request("GET", "/things/a")).status == 200


async def test_the_trace_of_the_client_is_in_the_context_of_the_logs(serve):
    site = await serve(things)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"

    reply = await site.request("GET", "/context", traceparent=f"00-{trace}-00f067aa0ba902b7-01")

    assert reply.json()["data"] == {"request_id": "req-1", "trace_id": trace}


async def test_two_traceparents_are_none_and_two_tracestates_are_one_list() -> None:
    parent, trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"traceparent"
    states = [(b"tracestate", b"a=1"), (b"x-other", b"c=3"), (b"tracestate", b"b=2")]

    found = offered_trace([(trace, parent), *states])

    assert found is not None
    assert found.state == "a=1,b=2"
    assert offered_trace([(trace, parent), (trace, parent)]) is None
    assert offered_trace(states) is None


async def test_the_address_behind_a_trusted_proxy_is_the_clients(serve):
    site = await serve(
        things, trusted_proxies=[ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8")]
    )

    reply = await site.request("GET", "/things/a", X_Forwarded_For="6.6.6.6, 9.9.9.9, 10.0.0.1")

    assert reply.json()["data"]["ip"] == "9.9.9.9"


async def test_a_client_cannot_invent_its_address(serve):
    site = await serve(things)

    reply = await site.request("GET", "/things/a", X_Forwarded_For="9.9.9.9")

    assert reply.json()["data"]["ip"] == "127.0.0.1"


async def test_each_request_is_counted_once_under_its_template(serve):
    site = await serve(things)

    await site.request("GET", "/things/a")
    await site.request("GET", "/things/b", key=None)
    await site.request("GET", "/no/such/path")
    await site.request("BREW", "/no/such/path")

    assert site.telemetry.finished == [
        ("GET", "/things/{thing_id}", 200),
        ("GET", "/things/{thing_id}", 401),
        ("GET", "unknown", 404),
        ("OTHER", "unknown", 404),
    ]
    assert site.telemetry.started == [pair[:2] for pair in site.telemetry.finished]


async def test_each_request_is_logged_once_without_its_query(serve, caplog):
    site = await serve(things)

    with caplog.at_level(logging.INFO, "rdev.http"):
        await site.request("GET", "/things/a?token=secret")
        await site.request("GET", "/health")

    lines = [r for r in caplog.records if r.message == "request completed"]
    assert [(r.method, r.path, r.status, r.client_ip) for r in lines] == [
        ("GET", "/things/a", 200, "127.0.0.1"),
    ]
    assert lines[0].duration_ms >= 0


async def test_requests_over_the_limit_are_refused_but_never_the_probes(serve, eventually):
    blocking = Blueprint("blocking", __name__)
    release = trio.Event()

    @blocking.get("/block")
    async def block():
        await release.wait()
        return success(None)

    @blocking.get("/health")
    async def health():
        return "alive"

    site = await serve(blocking, limits=HttpLimits(max_in_flight=1))
    async with trio.open_nursery() as clients:
        clients.start_soon(site.request, "GET", "/block")
        await eventually(lambda: site.shell.admission.work.taken == 1)

        over = await site.request("GET", "/block")
        probe = await site.request("GET", "/health", key=None)
        release.set()

    assert (over.status, over.header("retry-after")) == (503, "1")
    assert over.header("x-request-id") == "req-2"
    assert over.json()["error"]["code"] == "SERVICE_UNAVAILABLE"
    assert probe.body == b"alive"
    assert site.telemetry.refused == ["in_flight"]
    await eventually(lambda: site.shell.admission.work.taken == 0)


async def test_held_requests_leave_the_requests_in_work_their_room(serve, eventually):
    holding = Blueprint("holding", __name__)
    release = trio.Event()
    held_at_s: list[float] = []

    @holding.get("/hold")
    async def get_hold():
        hold()
        held_at_s.append(trio.current_time())
        await release.wait()
        return success(request.path)

    site = await serve(holding, things, limits=HttpLimits(max_in_flight=1, max_held=1))
    before_s = trio.current_time()
    async with trio.open_nursery() as clients:
        clients.start_soon(site.request, "GET", "/hold")
        await eventually(lambda: site.shell.admission.held.taken == 1)

        over = await site.request("GET", "/hold")
        work = await site.request("GET", "/things/a")
        release.set()

    assert (over.status, work.status) == (503, 200)
    assert site.telemetry.refused == ["held"]
    await eventually(
        lambda: (site.shell.admission.held.taken, site.shell.admission.work.taken) == (0, 0)
    )
    # The held one is the last to finish; its latency ended where the holding began.
    assert site.telemetry.finished[-1] == ("GET", "/hold", 200)
    assert site.telemetry.latencies_s[-1] <= held_at_s[0] - before_s


async def test_a_websocket_is_refused(serve):
    site = await serve(things)

    async with site.connect() as wire:
        await wire.send(
            b"GET /things/a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert (await wire.head()).status == 403
