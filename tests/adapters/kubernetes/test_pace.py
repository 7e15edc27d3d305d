"""How often an API server is asked that ends each watch in one way or another, by a clock that
stands still while anybody works: no socket, so ten minutes take a moment."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import httpx2
import pytest
import trio
from lightkube import AsyncClient, KubeConfig
from lightkube.config.models import User

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.guard import Contact
from rdev.adapters.kubernetes.pods import PodWatch

LIST = b'{"metadata": {"resourceVersion": "1"}, "items": []}'
BOOKMARK = b'{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "2"}}}\n'

Watch = Callable[[], Awaitable[httpx2.Response]]


@dataclass
class Script(httpx2.AsyncBaseTransport):
    """Lists are answered at once, watches by `watch`; `asked_at_s` has each request."""

    watch: Watch
    asked_at_s: list[float] = field(default_factory=list)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked_at_s.append(trio.current_time())
        if "watch" not in request.url.params:
            await trio.lowlevel.checkpoint()
            return httpx2.Response(200, content=LIST)
        return await self.watch()


class Body(httpx2.AsyncByteStream):
    """What a watch says, until it ends after `lasts_s`, or is cut."""

    def __init__(self, *said: bytes, lasts_s: float = 0, is_cut: bool = False) -> None:
        self._said, self._lasts_s, self._is_cut = said, lasts_s, is_cut

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._said:
            yield piece
        await trio.sleep(self._lasts_s)
        if self._is_cut:
            raise httpx2.ReadError("cut")


def watches(*said: bytes, lasts_s: float = 0, is_cut: bool = False) -> Watch:
    async def answer() -> httpx2.Response:
        await trio.lowlevel.checkpoint()
        return httpx2.Response(200, stream=Body(*said, lasts_s=lasts_s, is_cut=is_cut))

    return answer


def refusals(status: int, after_s: float) -> Watch:
    async def answer() -> httpx2.Response:
        await trio.sleep(after_s)
        return httpx2.Response(status, content=b"{}")

    return answer


async def nothing() -> httpx2.Response:
    await trio.sleep_forever()
    raise AssertionError


def api_of(script: Script) -> ApiServer:
    config = KubeConfig.from_server("http://api.example", namespace="rdev").get()
    assert config is not None
    http = httpx2.AsyncClient(base_url="http://api.example", transport=script)
    known = config._replace(user=User())
    objects = AsyncClient(config=known, transport=script, trust_env=False)
    return ApiServer(namespace="rdev", objects=objects, http=http, signs=http, contact=Contact())


@pytest.mark.parametrize(
    "watch",
    [
        pytest.param(watches(), id="end at once"),
        pytest.param(watches(BOOKMARK), id="end with their first event"),
        pytest.param(watches(is_cut=True), id="are cut at once"),
        pytest.param(watches(lasts_s=1.01), id="end after a second"),
        pytest.param(watches(BOOKMARK, lasts_s=1.01), id="end after a second, and said something"),
        pytest.param(watches(lasts_s=1.01, is_cut=True), id="are cut after a second"),
        pytest.param(watches(lasts_s=3, is_cut=True), id="are cut after three"),
        pytest.param(refusals(503, 0), id="are refused"),
        pytest.param(refusals(503, 1.01), id="are refused after a second"),
        pytest.param(refusals(410, 1.01), id="are too old after a second"),
        pytest.param(nothing, id="are not answered"),
    ],
)
async def test_however_watches_end_the_server_is_asked_thirty_times_a_minute(
    watch: Watch, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """57 lists and as many watches in each minute, where each was cut after a second."""
    script = Script(watch)
    pods = PodWatch(api_of(script))
    await nursery.start(pods.run)
    await trio.sleep(600)
    pods.stop()
    asked = script.asked_at_s
    minutes = [sum(60 * n <= at - asked[0] < 60 * (n + 1) for at in asked) for n in range(10)]
    assert max(minutes) <= 20 + 30 + 1
    assert len(asked) <= 20 + 300 + 1
    assert min(minutes) >= 2  # it is not given up either


async def test_watches_that_are_cut_each_five_seconds_are_followed_at_once(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A proxy that ends what is idle."""
    script = Script(watches(lasts_s=5, is_cut=True))
    pods = PodWatch(api_of(script))
    await nursery.start(pods.run)
    await trio.sleep(600)
    assert pods.statistics().lists >= 600 // 5.2
    pods.stop()


async def test_what_failed_before_a_watch_that_lasted_is_forgotten(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A server that was away for a minute, and well for an hour, was asked again after up to ten
    seconds where its successor refused one watch."""
    script = Script(refusals(503, 0))
    pods = PodWatch(api_of(script))
    await nursery.start(pods.run)
    await trio.sleep(60)
    script.watch = watches(lasts_s=240)
    await trio.sleep(1000)  # one ends in order, and the next begins
    assert pods.is_current
    script.watch = refusals(503, 0)
    while pods.is_current:
        await trio.sleep(0.01)
    script.watch = watches(lasts_s=240)
    began_s = trio.current_time()
    while not pods.is_current:
        await trio.sleep(0.01)
    assert trio.current_time() - began_s < 0.2
    pods.stop()


async def test_a_watch_that_is_not_answered_is_not_taken_for_hearing(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It was, for the four minutes that an answer was waited for."""
    script = Script(nothing)
    pods = PodWatch(api_of(script))
    await nursery.start(pods.run)
    while pods.statistics().failures == 0:
        assert not pods.is_current
        await trio.sleep(0.1)
    assert trio.current_time() - script.asked_at_s[0] < 20
    pods.stop()


async def test_what_a_watch_was_silent_for_counts_where_it_is_given_up_for_that(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    script = Script(watches(BOOKMARK, lasts_s=float("inf")))
    pods = PodWatch(api_of(script))
    await nursery.start(pods.run)
    await trio.sleep(1)
    assert (pods.is_current, pods.silent_s) == (True, 0)
    script.watch = nothing
    while pods.is_current:
        await trio.sleep(0.01)
    assert pods.silent_s >= 240
    await trio.sleep(1)
    assert pods.silent_s < 2  # what was listed was heard
    pods.stop()
