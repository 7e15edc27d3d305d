"""EventSource in a real Chromium: by session, by token, over restarts, to its end.

Every page is at a real origin: rdev's own (directly, or through nginx with TLS and HTTP/2), or one
that nginx serves elsewhere. Nothing between page and server is intercepted.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.app.server import DEADLINE_S, Json, Server, until
from tests.browser.ledger import Command, check_each_once, say_delays
from tests.browser.nginx import Nginx

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# `retry:` of the contract, and how many of them a finished EventSource is watched.
RETRY_S = 2.0
RETRIES = 3

WATCH = """path => {
    const seen = window.seen = {
        ids: [], lines: [], delays: [], names: [], opens: 0, errors: 0, reasons: []
    };
    const source = window.source = new EventSource(path);
    source.onopen = () => { seen.opens += 1; };
    source.onerror = () => { seen.errors += 1; };
    for (const name of ["connected", "status", "output", "gap", "complete", "disconnecting"]) {
        source.addEventListener(name, event => {
            seen.names.push(name);
            const data = JSON.parse(event.data);
            if (name === "disconnecting") seen.reasons.push(data.reason);
            if (name === "connected" || name === "disconnecting") return;
            seen.ids.push(Number(event.lastEventId));
            if (name === "output") {
                seen.lines.push(data.line);
                seen.delays.push(Date.now() - Number(data.line.split(" ")[1]));
            }
        });
    }
}"""
FETCH = """async ([path, options]) => {
    try {
        const answer = await fetch(path, options);
        return [answer.type, answer.status];
    } catch (error) {
        return ["failed", 0];
    }
}"""
CLOSED = 2


@dataclass(slots=True, kw_only=True)
class Tab:
    """A page at rdev's origin, and how it gets there."""

    page: "Page"
    server: Server
    url: str
    nginx: Nginx | None

    def go(self) -> None:
        """Any answer of the origin is a page of it."""
        self.page.goto(self.url + "/health")

    def fetch(self, path: str, **options: object) -> tuple[str, int]:
        kind, status = self.page.evaluate(FETCH, [path, options])
        return kind, status

    def log_in(self) -> None:
        headers = {"X-API-Key": self.server.key}
        assert self.fetch("/session", method="POST", headers=headers) == ("basic", 201)

    def watch(self, path: str) -> None:
        self.page.evaluate(WATCH, path)

    def seen(self) -> Json:
        found: Json = self.page.evaluate("() => window.seen")
        return found

    def state(self) -> int:
        found: int = self.page.evaluate("() => window.source.readyState")
        return found

    def until_lines(self, count: int) -> None:
        self.until(f"() => window.seen.lines.length >= {count}")

    def until(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=2 * DEADLINE_S * 1000, polling=20)

    def asked(self, path: str) -> list[int]:
        """The statuses of all requests for a path that are over, from the proxy's or rdev's log."""
        if self.nginx is not None:
            return [one.status for one in self.nginx.requests(path)]
        lines = [line for line in self.server.log.splitlines() if f'"path":"{path}"' in line]
        return [int(line.partition('"status":')[2].partition(",")[0]) for line in lines]


@pytest.fixture(params=["direct", "nginx"])
def tab(request: pytest.FixtureRequest, chromium: "Browser", server: Server) -> Iterator[Tab]:
    """A page at rdev itself (plain http on loopback), or at nginx (TLS, HTTP/2)."""
    nginx = request.getfixturevalue("nginx") if request.param == "nginx" else None
    context = chromium.new_context(ignore_https_errors=True)
    url = server.url if nginx is None else nginx.url
    tab = Tab(page=context.new_page(), server=server, url=url, nginx=nginx)
    tab.go()
    yield tab
    context.close()


@pytest.fixture
def behind(chromium: "Browser", server: Server, nginx: Nginx) -> Iterator[Tab]:
    """A page at nginx."""
    context = chromium.new_context(ignore_https_errors=True)
    tab = Tab(page=context.new_page(), server=server, url=nginx.url, nginx=nginx)
    tab.go()
    yield tab
    context.close()


def test_a_page_logs_in_and_sees_every_line_in_time(tab: Tab, tmp_path: Path) -> None:
    """10 lines a second for 10 s: 99 of 100 within 200 ms, each once."""
    assert tab.fetch("/projects")[1] == 401
    tab.log_in()
    (cookie,) = tab.page.context.cookies()
    secure = tab.nginx is not None
    assert cookie["name"] == ("__Host-rdev_session" if secure else "rdev_session")
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, secure, "Strict")
    assert 11.9 * 3600 < cookie["expires"] - time.time() <= 12 * 3600 + 1
    assert tab.page.evaluate("() => document.cookie") == ""
    command = Command(tab.server, tmp_path, every_s=0.1)
    tab.watch(command.path)
    tab.until_lines(100)
    command.end()
    tab.until("() => window.source.readyState === 2")
    seen = tab.seen()
    check_each_once(command, seen["ids"], seen["lines"])
    how = "nginx" if secure else "rdev"
    say_delays(f"Chromium at {how}", seen["delays"][:100])
    if tab.nginx is not None:
        protocols = {one.protocol for one in tab.nginx.requests(command.path)}
        assert protocols == {"HTTP/2.0"}


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_an_event_source_resumes_by_itself_over_a_restart(
    tab: Tab, tmp_path: Path, how: str
) -> None:
    """Every line exactly once, without a word of the page's."""
    tab.log_in()
    command = Command(tab.server, tmp_path)
    tab.watch(command.path)
    tab.until_lines(50)
    if how == "kill":
        tab.server.kill()
    else:
        tab.server.end(SIGTERM)
    tab.until("() => window.source.readyState === 0")
    # It comes back while nobody is there, too.
    before = tab.seen()["errors"]
    tab.until(f"() => window.seen.errors > {before}")
    tab.server.start()
    count = len(tab.seen()["lines"])
    tab.until_lines(count + 100)
    command.end()
    tab.until("() => window.source.readyState === 2")
    seen = tab.seen()
    check_each_once(command, seen["ids"], seen["lines"])
    assert seen["opens"] == 2
    assert seen["reasons"] == (["draining"] if how == "restart" else [])


def test_an_event_source_resumes_over_a_reload_of_nginx(behind: Tab, tmp_path: Path) -> None:
    """Not even cut: the old worker stays for it; new requests go to the new ones."""
    behind.log_in()
    command = Command(behind.server, tmp_path)
    behind.watch(command.path)
    behind.until_lines(50)
    assert behind.nginx is not None
    behind.nginx.reload()
    behind.until_lines(150)
    command.end()
    behind.until("() => window.source.readyState === 2")
    seen = behind.seen()
    check_each_once(command, seen["ids"], seen["lines"])


def test_an_event_source_resumes_when_nginx_itself_is_restarted(
    behind: Tab, tmp_path: Path
) -> None:
    behind.log_in()
    command = Command(behind.server, tmp_path)
    behind.watch(command.path)
    behind.until_lines(50)
    assert behind.nginx is not None
    behind.nginx.stop()
    behind.until("() => window.source.readyState === 0")
    behind.nginx.start()
    behind.until_lines(200)
    command.end()
    behind.until("() => window.source.readyState === 2")
    seen = behind.seen()
    check_each_once(command, seen["ids"], seen["lines"])
    assert seen["opens"] == 2


def test_after_complete_it_stops_for_good(tab: Tab, tmp_path: Path) -> None:
    """The stream, then one 204, then nothing more: counted where the requests arrive."""
    tab.log_in()
    command = Command(tab.server, tmp_path)
    tab.watch(command.path)
    tab.until_lines(10)
    command.end()
    tab.until("() => window.source.readyState === 2")
    until(lambda: tab.asked(command.path) == [200, 204], "one stream and its end were asked for")
    # That nothing comes can only be waited for.
    tab.page.wait_for_timeout(RETRIES * RETRY_S * 1000)
    assert tab.asked(command.path) == [200, 204]
    seen = tab.seen()
    check_each_once(command, seen["ids"], seen["lines"])
    assert seen["names"][-1] == "complete"
    assert tab.state() == CLOSED


def test_logging_out_ends_it(tab: Tab) -> None:
    tab.log_in()
    assert tab.fetch("/projects")[1] == 200
    assert tab.fetch("/session", method="DELETE") == ("basic", 204)
    assert tab.page.context.cookies() == []
    assert tab.fetch("/projects")[1] == 401


def test_a_revoked_key_ends_the_page_for_good(tab: Tab, tmp_path: Path) -> None:
    """Within 5 s, with its reason; then one 401, which an EventSource takes for the end."""
    admin = {"X-API-Key": tab.server.key}
    url = tab.server.url + "/keys"
    body = {"name": "k", "scopes": ["projects:execute"]}
    key = httpx2.post(url, json=body, headers=admin, trust_env=False).json()["data"]
    headers = {"X-API-Key": key["key"]}
    assert tab.fetch("/session", method="POST", headers=headers)[1] == 201
    command = Command(tab.server, tmp_path)
    tab.watch(command.path)
    tab.until_lines(10)
    began_s = time.monotonic()
    httpx2.delete(f"{url}/{key['id']}", headers=admin, trust_env=False)
    tab.until("() => window.seen.reasons.length > 0")
    assert time.monotonic() - began_s <= 5
    assert tab.seen()["reasons"] == ["key_revoked"]
    tab.until("() => window.source.readyState === 2")
    until(lambda: tab.asked(command.path) == [200, 401], "the second request is refused")
    command.end()


# ----------------------------------------------------------------------- other origins


def test_a_page_of_another_port_cannot_write_by_cookie(behind: Tab) -> None:
    """To SameSite a port is no other site: the cookie goes along, and is not enough."""
    behind.log_in()
    assert behind.nginx is not None
    page = behind.page.context.new_page()
    page.goto(f"https://127.0.0.1:{behind.nginx.elsewhere_port}/")
    assert page.title() == "elsewhere"
    options = {"mode": "no-cors", "credentials": "include", "method": "POST"}
    path = behind.url + "/projects/demo/shell"
    assert page.evaluate(FETCH, [path, options]) == ["opaque", 0]
    assert behind.asked("/projects/demo/shell") == [403]
    # A form needs no script at all.
    page.set_content(f'<form method="post" action="{path}"><button>go</button></form>')
    with page.expect_navigation():
        page.click("button")
    assert behind.asked("/projects/demo/shell") == [403, 403]
    page.goto(f"https://127.0.0.1:{behind.nginx.elsewhere_port}/")
    # What it reads it does not get to see.
    options = {"credentials": "include"}
    assert page.evaluate(FETCH, [behind.url + "/projects", options]) == ["failed", 0]
    assert behind.asked("/projects") == [200]
    # The same from the page of its own origin is fine.
    headers = {"Content-Type": "application/json"}
    own = behind.fetch("/projects", method="POST", headers=headers, body='{"id": "demo"}')
    assert own == ("basic", 201)


def test_a_page_of_another_site_has_no_cookie_at_all(behind: Tab) -> None:
    behind.log_in()
    assert behind.nginx is not None
    page = behind.page.context.new_page()
    page.goto(f"https://localhost:{behind.nginx.elsewhere_port}/")
    options = {"mode": "no-cors", "credentials": "include", "method": "POST"}
    path = behind.url + "/projects/demo/shell"
    assert page.evaluate(FETCH, [path, options]) == ["opaque", 0]
    assert behind.asked("/projects/demo/shell") == [401]


def test_without_cors_a_token_shows_another_origin_nothing(behind: Tab, tmp_path: Path) -> None:
    """The stream is served, and the browser keeps it from the page: rdev promises no CORS."""
    assert behind.nginx is not None
    command = Command(behind.server, tmp_path)
    target = behind.url + command.token()
    behind.page.goto(f"https://localhost:{behind.nginx.elsewhere_port}/")
    behind.watch(target)
    behind.until("() => window.source.readyState === 2")
    seen = behind.seen()
    assert (seen["opens"], seen["names"]) == (0, [])
    command.end()


def test_with_cors_of_the_proxy_a_token_is_enough(behind: Tab, tmp_path: Path) -> None:
    """One header of nginx's; also over a restart (`Last-Event-ID` asks for no preflight)."""
    nginx = behind.nginx
    assert nginx is not None
    origin = f"https://localhost:{nginx.elsewhere_port}"
    nginx.allowed_origin = origin
    nginx.reload()
    command = Command(behind.server, tmp_path)
    target = behind.url + command.token()
    behind.page.goto(origin)
    behind.watch(target)
    behind.until_lines(20)
    behind.server.end(SIGTERM)
    behind.until("() => window.source.readyState === 0")
    behind.server.start()
    behind.until_lines(100)
    command.end()
    behind.until("() => window.source.readyState === 2")
    seen = behind.seen()
    check_each_once(command, seen["ids"], seen["lines"])
    assert {one.method for one in nginx.requests(command.path)} == {"GET"}
    assert behind.page.context.cookies() == []
