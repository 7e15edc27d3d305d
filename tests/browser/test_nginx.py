"""Streams through nginx as Debian ships it, and over HTTP/2, followed by curl."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import httpx2
import pytest

from tests.app.server import Server, open_state, until
from tests.browser.curl import CUT, Stream, stream
from tests.browser.ledger import Command, check_each_once, say_delays
from tests.browser.nginx import Nginx, make_certificate, open_nginx

PROTOCOLS = ["--http1.1", "--http2"]
VERSIONS = {"--http1.1": "version 1.1", "--http2": "version 2"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lines_arrive_in_time_through_nginx(
    server: Server, nginx: Nginx, tmp_path: Path, protocol: str
) -> None:
    """10 lines a second for 10 s, buffering and gzip on: 99 of 100 within 200 ms."""
    command = Command(server, tmp_path, every_s=0.1)
    url = nginx.url + command.path
    with stream(url, server.key, nginx.authority, protocol=protocol) as seen:
        seen.until_lines(100)
        command.end()
        assert seen.wait() == 0
    assert seen.said == f"{VERSIONS[protocol]} status 200"
    check_each_once(command, seen.ids, seen.lines)
    say_delays(f"nginx, curl {protocol}", seen.delays_ms[:100])


@pytest.fixture
def tls_server(
    quick_place: Path, tmp_path: Path, needs_nginx: None
) -> Iterator[tuple[Server, Path]]:
    """A server that speaks TLS itself, and the authority that vouches for it."""
    authority = make_certificate(tmp_path)
    settings = {
        "RDEV_TLS_CERT_FILE": str(tmp_path / "cert.pem"),
        "RDEV_TLS_KEY_FILE": str(tmp_path / "key.pem"),
    }
    with open_state(quick_place, **settings) as server:
        server.start(ready=False)
        yield server, authority


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lines_arrive_in_time_over_rdevs_own_tls(
    tls_server: tuple[Server, Path], tmp_path: Path, protocol: str
) -> None:
    server, authority = tls_server
    url = server.url.replace("http://", "https://")

    def ask(method: str, path: str, *more: str) -> str:
        argv = ["curl", "-sS", protocol, "--cacert", str(authority), "-X", method, url + path]
        argv += ["-H", f"X-API-Key: {server.key}", "-H", "Content-Type: application/json", *more]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    until(lambda: '"healthy"' in ask("GET", "/ready"), "the server is ready")
    ask("POST", "/projects", "-d", '{"id": "demo"}')
    script = "for n in $(seq 100); do echo $n $(date +%s%3N); sleep 0.1; done"
    body = json.dumps({"command": script})
    made = json.loads(ask("POST", "/projects/demo/shell", "-d", body))
    path = f"/commands/{made['data']['id']}/events"
    with stream(url + path, server.key, authority, protocol=protocol) as seen:
        assert seen.wait() == 0
    assert seen.said == f"{VERSIONS[protocol]} status 200"
    assert [int(line.split()[0]) for line in seen.lines] == list(range(1, 101))
    assert seen.ids == list(range(1, 105))
    with stream(url + path, server.key, authority, protocol=protocol, after=104) as again:
        assert again.wait() == 0
    assert again.said == f"{VERSIONS[protocol]} status 204"
    say_delays(f"rdev's TLS, curl {protocol}", seen.delays_ms)


def resumed(
    nginx: Nginx, server: Server, command: Command, protocol: str, first: Stream
) -> tuple[list[int], list[str]]:
    """Go on where the first stream was cut, to the end; what both have seen."""
    url = nginx.url + command.path
    after = first.ids[-1]
    with stream(url, server.key, nginx.authority, protocol=protocol, after=after) as second:
        second.until_lines(50)
        command.end()
        assert second.wait() == 0
    assert second.names[0] == "connected"
    return first.ids + second.ids, first.lines + second.lines


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_reload_of_nginx_cuts_no_stream(
    server: Server, nginx: Nginx, tmp_path: Path, protocol: str
) -> None:
    """The old worker stays until its streams have ended."""
    command = Command(server, tmp_path)
    url = nginx.url + command.path
    with stream(url, server.key, nginx.authority, protocol=protocol) as seen:
        seen.until_lines(50)
        old = nginx.workers()
        nginx.reload()
        seen.until_lines(150)
        assert nginx.workers() & old
        command.end()
        assert seen.wait() == 0
    check_each_once(command, seen.ids, seen.lines)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_reload_that_cuts_streams_loses_nothing(
    server: Server, needs_nginx: None, tmp_path: Path, protocol: str
) -> None:
    """`worker_shutdown_timeout`: what operators set who do not wait for old workers."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    upstream = server.url.removeprefix("http://")
    more = "worker_shutdown_timeout 1s;"
    with open_nginx(folder, upstream=upstream, more=more) as nginx:
        command = Command(server, tmp_path)
        url = nginx.url + command.path
        with stream(url, server.key, nginx.authority, protocol=protocol) as first:
            first.until_lines(50)
            nginx.reload()
            assert first.wait() in CUT
        ids, lines = resumed(nginx, server, command, protocol, first)
    check_each_once(command, ids, lines)


@pytest.mark.parametrize("how", ["restart", "kill"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_restart_behind_nginx_loses_nothing(
    server: Server, nginx: Nginx, tmp_path: Path, protocol: str, how: str
) -> None:
    """While rdev is away its streams end without an answer, all else is 502."""
    command = Command(server, tmp_path)
    url = nginx.url + command.path
    with stream(url, server.key, nginx.authority, protocol=protocol) as first:
        first.until_lines(50)
        if how == "kill":
            server.kill()
        else:
            server.end(SIGTERM)
        status = first.wait()
        assert status in CUT if how == "kill" else status == 0
        assert "complete" not in first.names
        assert (first.names[-1] == "disconnecting") is (how == "restart")
    with stream(url, server.key, nginx.authority, protocol=protocol) as away:
        assert away.wait() in CUT
    assert away.said.endswith("status 000")
    answer = httpx2.get(nginx.url + "/projects", verify=False, trust_env=False)
    assert answer.status_code == 502
    server.start()
    ids, lines = resumed(nginx, server, command, protocol, first)
    check_each_once(command, ids, lines)


def test_nginx_writes_no_token_and_no_cookie(server: Server, nginx: Nginx, tmp_path: Path) -> None:
    """Not in its access log, and not in its error logs when the upstream dies under a stream."""
    command = Command(server, tmp_path)
    target = command.token()
    token = target.partition("token=")[2]
    with httpx2.Client(base_url=nginx.url, verify=False, trust_env=False) as page:
        opened = page.post("/session", headers={"X-API-Key": server.key})
        assert opened.status_code == 201
        cookie = opened.headers["Set-Cookie"]
        assert cookie.startswith("__Host-rdev_session=")
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict; Secure")
        session = cookie.partition("=")[2].partition(";")[0]
        assert page.get("/projects").status_code == 200
        # The origin is the one that the page speaks to, not the one behind nginx.
        body = {"stream_id": command.id}
        for origin, status in ((nginx.url, 201), (server.url, 403)):
            made = page.post("/stream-tokens", json=body, headers={"Origin": origin})
            assert made.status_code == status
    with stream(nginx.url + target, "", nginx.authority, protocol="--http2") as seen:
        seen.until_lines(20)
        server.kill()
        assert seen.wait() in CUT
    with stream(nginx.url + target, "", nginx.authority, protocol="--http2") as away:
        assert away.wait() in CUT
    server.start()
    command.end()
    assert [one.status for one in nginx.requests(command.path)][:1] == [200]
    written = nginx.access + nginx.errors + server.log
    assert nginx.access.count(command.path) == 2
    for secret in (token, session, token.rpartition(".")[2], session.rpartition(".")[2]):
        assert secret not in written
