"""Checking credentials and managing keys: two servers on one store in memory, in virtual time."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from hashlib import sha512
from ipaddress import ip_network
from itertools import count
from uuid import UUID

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId
from rdev.domain.key_requests import KeyRequest, parse_key
from rdev.domain.key_text import checksum_of
from rdev.domain.keys import ADMIN, Key, KeyEnd, Principal, Scope
from rdev.services.cached import TTL_S
from rdev.services.key_watch import LOOK_S, PAUSE_S, TICK_S, KeyWatch
from rdev.services.keys import Keys, ShownKey
from tests.fakes.key_samples import secret
from tests.fakes.keys import FakeKeys
from tests.fakes.store import ACTOR, StoreState

ADMIN_KEY = "the bootstrap key of the administrator"
HERE = "192.0.2.1"


@dataclass(slots=True, kw_only=True)
class Server:
    """The keys of one process; a notification reaches the others unless they are deaf."""

    store: FakeKeys
    others: list["Server"] = field(default_factory=list)
    is_deaf: bool = False
    serial: count = field(default_factory=lambda: count(1))
    watch: KeyWatch = field(init=False)
    keys: Keys = field(init=False)

    def __post_init__(self) -> None:
        self.watch = KeyWatch(store=self.store, now=lambda: self.store.state.now)
        self.keys = Keys(
            store=self.store,
            admin_key=ADMIN_KEY,
            tell_replicas=self.tell,
            changed=self.watch.wake,
            used=self.watch.used,
            new_uuid=lambda: UUID(int=0x0199_0000_0000_7000 << 64 | next(self.serial)),
            random_bytes=lambda size: sha512(b"%d" % next(self.serial)).digest()[:size],
            now=lambda: self.store.state.now,
        )

    def tell(self, key: KeyId) -> None:
        for other in self.others:
            if not other.is_deaf:
                other.keys.heed([key])

    async def made(self, by: Principal = ADMIN, **fields: object) -> ShownKey:
        """A key that may do nearly everything, unless told."""
        scopes = [scope for scope in Scope if scope is not Scope.ADMIN]
        return await self.keys.create(by, request(**{"scopes": scopes, **fields}), ACTOR)

    async def enter(self, text: str | None, ip: str = HERE) -> Principal:
        return await self.keys.authenticate(text, ip)

    async def refusal(self, text: str | None, ip: str = HERE) -> ErrorCode | None:
        """The code a credential is refused with, None where it is good."""
        try:
            await self.enter(text, ip)
        except RdevError as error:
            return error.code
        return None


def request(**fields: object) -> KeyRequest:
    return parse_key({"name": "k", "scopes": ["projects:read"], "expires_in": "never", **fields})


@pytest.fixture
def server() -> Server:
    return Server(store=FakeKeys(StoreState()))


@pytest.fixture
def pair() -> tuple[Server, Server]:
    store = FakeKeys(StoreState())
    one, two = Server(store=store), Server(store=store)
    one.others.append(two)
    return one, two


def text_of(shown: ShownKey) -> str:
    assert shown.text is not None
    return shown.text


async def test_a_made_key_is_good_for_what_it_was_made_for(server: Server) -> None:
    shown = await server.made(
        scopes=["projects:read"], project_ids=["a"], rate_limit={"requests": 5, "window_s": 60}
    )
    principal = await server.enter(text_of(shown))
    assert (principal.key_id, principal.name) == (shown.key.id, "k")
    assert principal.may(Scope.PROJECTS_READ, ProjectId("a"))
    assert not principal.may(Scope.PROJECTS_READ, ProjectId("b"))
    assert not principal.may(Scope.PROJECTS_WRITE)
    assert principal.rate_limit is not None
    assert shown.key.created_by == "key_admin"


@pytest.mark.parametrize("text", [None, "", "x", "rdev_sk_", "a" * 10_000, "\ud800", "ADMIN"])
async def test_what_is_no_key_is_refused_without_the_database(
    server: Server, text: str | None
) -> None:
    assert await server.refusal(text) is ErrorCode.UNAUTHORIZED
    assert server.store.finds == 0


async def test_an_unknown_key_and_a_wrong_secret_take_the_same_path(server: Server) -> None:
    text = text_of(await server.made())
    # A right checksum under a public id that exists: as a thief of half a key would try.
    body = text[:17] + secret().text[17:-6]
    refusals = []
    for wrong in (body + checksum_of(body), secret().text):
        with pytest.raises(RdevError) as caught:
            await server.enter(wrong)
        refusals.append((caught.value.code, caught.value.message))
    assert refusals[0] == refusals[1]
    assert refusals[0][0] is ErrorCode.UNAUTHORIZED
    assert server.store.finds == 2


async def test_a_refused_key_is_remembered_as_such(server: Server) -> None:
    text = secret().text
    for _ in range(5):
        assert await server.refusal(text) is ErrorCode.UNAUTHORIZED
    assert server.store.finds == 1


async def test_the_bootstrap_key_needs_no_database(server: Server) -> None:
    server.store.state.unavailable = True
    assert await server.enter(ADMIN_KEY) == ADMIN


async def test_without_the_database_a_known_key_lives_its_ttl_and_then_is_unknowable(
    server: Server,
) -> None:
    text = text_of(await server.made())
    assert await server.refusal(text) is None
    server.store.state.unavailable = True
    await trio.sleep(TTL_S - 0.1)
    assert await server.refusal(text) is None
    await trio.sleep(0.2)
    assert await server.refusal(text) is ErrorCode.SERVICE_UNAVAILABLE
    assert await server.refusal(secret().text) is ErrorCode.SERVICE_UNAVAILABLE
    server.store.state.unavailable = False
    assert await server.refusal(text) is None


async def test_a_key_is_good_from_its_addresses_alone(server: Server) -> None:
    text = text_of(await server.made(allowed_ips=["192.0.2.0/24", "2001:db8::/32"]))
    assert await server.refusal(text, "192.0.2.77") is None
    assert await server.refusal(text, "2001:db8::5") is None
    assert await server.refusal(text, "198.51.100.1") is ErrorCode.IP_NOT_ALLOWED
    assert await server.refusal(text, "2001:db9::5") is ErrorCode.IP_NOT_ALLOWED


async def test_a_key_expires_to_the_second_although_it_is_remembered(server: Server) -> None:
    text = text_of(await server.made(expires_in=10))
    await trio.sleep(9)
    assert await server.refusal(text) is None
    await trio.sleep(0.9)
    assert await server.refusal(text) is None
    await trio.sleep(0.2)
    assert await server.refusal(text) is ErrorCode.KEY_EXPIRED
    assert server.store.finds == 1


async def test_a_revocation_is_effective_at_once_here_and_where_it_is_heard(
    pair: tuple[Server, Server],
) -> None:
    one, _ = pair
    shown = await one.made()
    text = text_of(shown)
    for server in pair:
        assert await server.refusal(text) is None
    await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
    for server in pair:
        assert await server.refusal(text) is ErrorCode.KEY_REVOKED


async def test_a_revocation_that_is_not_heard_is_effective_after_the_ttl(
    pair: tuple[Server, Server],
) -> None:
    one, two = pair
    two.is_deaf = True
    shown = await one.made()
    text = text_of(shown)
    assert await two.refusal(text) is None
    await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
    assert await two.refusal(text) is None
    await trio.sleep(TTL_S)
    assert await two.refusal(text) is ErrorCode.KEY_REVOKED


async def test_a_server_that_hears_again_remembers_nothing(pair: tuple[Server, Server]) -> None:
    one, two = pair
    two.is_deaf = True
    shown = await one.made()
    assert await two.refusal(text_of(shown)) is None
    await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
    two.keys.flush()
    assert await two.refusal(text_of(shown)) is ErrorCode.KEY_REVOKED


async def test_a_revocation_whose_reply_was_lost_is_effective_all_the_same(
    server: Server,
) -> None:
    shown = await server.made()
    assert await server.refusal(text_of(shown)) is None
    server.store.state.lost_replies = 1
    with pytest.raises(RdevError):
        await server.keys.revoke(ADMIN, shown.key.id, ACTOR)
    assert await server.refusal(text_of(shown)) is ErrorCode.KEY_REVOKED


async def test_a_rotated_key_has_two_secrets_for_the_grace(server: Server) -> None:
    shown = await server.made()
    fresh = await server.keys.rotate(ADMIN, shown.key.id, ACTOR, grace_s=60)
    assert fresh.key.id == shown.key.id
    assert [await server.refusal(text_of(each)) for each in (shown, fresh)] == [None, None]
    await trio.sleep(61)
    assert await server.refusal(text_of(shown)) is ErrorCode.KEY_REVOKED
    principal = await server.enter(text_of(fresh))
    assert principal.key_id == shown.key.id


async def test_a_rotation_without_grace_ends_the_secret_that_is_remembered(
    server: Server,
) -> None:
    shown = await server.made()
    assert await server.refusal(text_of(shown)) is None
    await server.keys.rotate(ADMIN, shown.key.id, ACTOR, grace_s=0)
    assert await server.refusal(text_of(shown)) is ErrorCode.KEY_REVOKED


async def holder(server: Server, **fields: object) -> Principal:
    return await server.enter(text_of(await server.made(**fields)))


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ({"scopes": ["keys:write"]}, {"scopes": ["keys:read"]}),
        ({"scopes": ["keys:write"]}, {"scopes": ["keys:write", "admin"]}),
        ({"project_ids": ["a"]}, {}),
        ({"project_ids": ["a"]}, {"project_ids": ["a", "b"]}),
        ({"allowed_ips": ["192.0.2.0/24"]}, {"allowed_ips": []}),
        ({"allowed_ips": ["192.0.2.0/24"]}, {"allowed_ips": ["192.0.0.0/16"]}),
        ({"expires_in": 100}, {"expires_in": "never"}),
        ({"expires_in": 100}, {"expires_in": 101}),
    ],
)
async def test_nobody_grants_what_they_do_not_hold(
    server: Server, held: dict[str, object], wanted: dict[str, object]
) -> None:
    by = await holder(server, **held)
    with pytest.raises(RdevError) as caught:
        await server.keys.create(by, request(**{"scopes": ["keys:write"], **wanted}), ACTOR)
    assert caught.value.code is ErrorCode.FORBIDDEN
    assert len(server.store.keys) == 1


async def test_what_is_not_said_is_no_wider_than_the_one_who_asks(server: Server) -> None:
    by = await holder(server, allowed_ips=["192.0.2.0/24"], expires_in=100)
    made = await server.keys.create(
        by, parse_key({"name": "n", "scopes": ["projects:read"]}), ACTOR
    )
    assert made.key.grant.allowed_ips == (ip_network("192.0.2.0/24"),)
    assert made.key.grant.expires_at == by.grant.expires_at
    assert made.key.created_by == by.key_id


async def test_a_key_of_some_projects_sees_and_ends_keys_of_these_alone(server: Server) -> None:
    by = await holder(server, project_ids=["a", "b"])
    own = (await server.made(project_ids=["a"])).key
    foreign = (await server.made(project_ids=["a", "c"])).key
    everywhere = (await server.made()).key
    seen = [key.id for key in await server.keys.list_all(by, before=None, limit=10)]
    assert seen == [own.id, by.key_id]
    for key in (foreign, everywhere):
        for ask in (
            server.keys.get(by, key.id),
            server.keys.revoke(by, key.id, ACTOR),
            server.keys.rotate(by, key.id, ACTOR, grace_s=0),
        ):
            with pytest.raises(RdevError) as caught:
                await ask
            assert caught.value.code is ErrorCode.NOT_FOUND
    assert (await server.keys.revoke(by, own.id, ACTOR)).revoked_at is not None


async def test_nobody_takes_over_a_key_that_may_do_more(server: Server) -> None:
    """To rotate is to learn the secret."""
    by = await holder(server, scopes=["keys:write", "projects:read"], expires_in=1_000)
    for more in (
        {"scopes": ["admin"]},
        {"scopes": ["projects:read"], "expires_in": "never"},
    ):
        victim = await server.made(**more)
        with pytest.raises(RdevError) as caught:
            await server.keys.rotate(by, victim.key.id, ACTOR, grace_s=0)
        assert caught.value.code is ErrorCode.FORBIDDEN
        assert await server.refusal(text_of(victim)) is None


async def test_nobody_revokes_a_key_that_may_do_more(server: Server) -> None:
    by = await holder(server, scopes=["keys:write"])
    victim = await server.made(scopes=["admin"])
    with pytest.raises(RdevError) as caught:
        await server.keys.revoke(by, victim.key.id, ACTOR)
    assert caught.value.code is ErrorCode.FORBIDDEN
    assert caught.value.details == {"scope": "admin"}


@pytest.mark.parametrize("key", ["key_admin", "key_", "nope", "key_" + "0" * 32, "", "a" * 999])
async def test_an_unknown_key_is_not_found(server: Server, key: str) -> None:
    for ask in (
        server.keys.get(ADMIN, key),
        server.keys.revoke(ADMIN, key, ACTOR),
        server.keys.rotate(ADMIN, key, ACTOR, grace_s=0),
    ):
        with pytest.raises(RdevError) as caught:
            await ask
        assert caught.value.code is ErrorCode.NOT_FOUND


async def test_a_replay_shows_the_key_without_its_text(server: Server) -> None:
    same = Idempotency(key_id="key_admin", key="once", digest=b"d")
    first = await server.keys.create(ADMIN, request(), ACTOR, idempotency=same)
    again = await server.keys.create(ADMIN, request(), ACTOR, idempotency=same)
    assert (again.key.id, again.text, again.is_replay) == (first.key.id, None, True)
    assert first.text is not None


async def test_the_text_is_in_no_repr(server: Server) -> None:
    shown = await server.made()
    principal = await server.enter(text_of(shown))
    assert text_of(shown)[17:] not in repr((shown, principal, server.store))


# ----------------------------------------------------------------------------- watching


async def watched(server: Server, **fields: object) -> tuple[ShownKey, Principal]:
    shown = await server.made(**fields)
    return shown, await server.enter(text_of(shown))


async def test_a_revocation_that_is_heard_ends_what_is_watched_at_once(
    pair: tuple[Server, Server], nursery: trio.Nursery
) -> None:
    one, two = pair
    shown, principal = await watched(two)
    await nursery.start(two.watch.run)
    told: list[KeyEnd] = []
    with two.watch.watch(principal, told.append) as watch:
        await trio.sleep(10.5)
        began_s = trio.current_time()
        await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
        await watch.ended.wait()
        assert trio.current_time() - began_s < 0.2
    assert (watch.reason, told) == (KeyEnd.REVOKED, [KeyEnd.REVOKED])
    two.watch.stop()


async def test_a_revocation_that_nobody_heard_ends_what_is_watched_within_5_s(
    pair: tuple[Server, Server], nursery: trio.Nursery
) -> None:
    one, two = pair
    two.is_deaf = True
    shown, principal = await watched(two)
    await nursery.start(two.watch.run)
    with two.watch.watch(principal) as watch:
        await trio.sleep(10.1)
        await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
        with trio.fail_after(TICK_S + 0.1):
            await watch.ended.wait()
    assert watch.reason is KeyEnd.REVOKED
    two.watch.stop()


async def test_an_expired_key_ends_what_is_watched_also_without_the_database(
    server: Server, nursery: trio.Nursery
) -> None:
    _, principal = await watched(server, expires_in=60)
    await nursery.start(server.watch.run)
    with server.watch.watch(principal) as watch:
        await trio.sleep(30)
        server.store.state.unavailable = True
        await trio.sleep(29)
        assert watch.reason is None
        await trio.sleep(1 + TICK_S + 0.1)
        assert watch.reason is KeyEnd.EXPIRED
    server.store.state.unavailable = False
    server.watch.stop()


async def test_a_silent_database_holds_up_no_expiry(server: Server, nursery: trio.Nursery) -> None:
    _, principal = await watched(server, expires_in=60)
    await nursery.start(server.watch.run)
    with server.watch.watch(principal) as watch:
        await trio.sleep(30)
        server.store.stalls_s = 3_600
        await trio.sleep(30 + TICK_S + LOOK_S + 0.1)
        assert watch.reason is KeyEnd.EXPIRED
    server.watch.stop()


async def test_a_silent_database_holds_up_no_expiry_whenever_it_comes(
    server: Server, nursery: trio.Nursery
) -> None:
    """Looks and writes of uses hang one after the other: the 5 s of the contract hold in any."""
    _, principal = await watched(server)
    await nursery.start(server.watch.run)
    late_s: list[float] = []
    began_at, began_s = server.store.state.now, trio.current_time()

    def note(end_s: float) -> None:
        late_s.append(trio.current_time() - began_s - end_s)

    with ExitStack() as stack:
        stack.enter_context(server.watch.watch(principal))
        for end_s in (60 + tenths / 10 for tenths in range(0, 80, 4)):
            session = replace(principal, ends_at=began_at + timedelta(seconds=end_s))
            on_end = partial(lambda end_s, _: note(end_s), end_s)
            stack.enter_context(server.watch.watch(session, on_end))
        await trio.sleep(30)
        server.store.stalls_s = 3_600
        server.watch.used(principal.key_id, trio.current_time() + 3_600)
        await trio.sleep(60)
    assert len(late_s) == 20
    assert max(late_s) <= LOOK_S + PAUSE_S + TICK_S + 0.1
    server.watch.stop()


async def test_the_secret_before_a_rotation_ends_with_its_grace(
    server: Server, nursery: trio.Nursery
) -> None:
    shown, principal = await watched(server)
    await nursery.start(server.watch.run)
    fresh = await server.keys.rotate(ADMIN, shown.key.id, ACTOR, grace_s=30)
    newer = await server.enter(text_of(fresh))
    with server.watch.watch(principal) as old, server.watch.watch(newer) as new:
        await trio.sleep(29)
        assert (old.reason, new.reason) == (None, None)
        await trio.sleep(1 + TICK_S + 0.1)
        assert (old.reason, new.reason) == (KeyEnd.REVOKED, None)
    server.watch.stop()


async def test_a_database_that_is_away_ends_nothing_that_has_no_end(
    server: Server, nursery: trio.Nursery
) -> None:
    _, principal = await watched(server)
    await nursery.start(server.watch.run)
    with server.watch.watch(principal) as watch:
        server.store.state.unavailable = True
        await trio.sleep(600)
        assert watch.reason is None
        assert server.watch.statistics().failures > 100
    server.store.state.unavailable = False
    server.watch.stop()


async def test_who_was_let_in_by_what_is_remembered_is_looked_at_at_once(
    pair: tuple[Server, Server], nursery: trio.Nursery
) -> None:
    one, two = pair
    two.is_deaf = True
    shown, principal = await watched(two)
    await nursery.start(two.watch.run)
    await one.keys.revoke(ADMIN, shown.key.id, ACTOR)
    await trio.sleep(TTL_S - 0.5)
    assert await two.refusal(text_of(shown)) is None
    with two.watch.watch(principal) as watch:
        with trio.fail_after(0.2):
            await watch.ended.wait()
        with two.watch.watch(principal) as later:
            assert later.reason is KeyEnd.REVOKED
    two.watch.stop()


async def test_the_bootstrap_key_is_watched_for_nothing(
    server: Server, nursery: trio.Nursery
) -> None:
    await nursery.start(server.watch.run)
    with server.watch.watch(ADMIN) as watch:
        await trio.sleep(60)
        assert watch.reason is None
    assert server.store.looks == 0
    server.watch.stop()


async def test_a_thousand_streams_of_one_key_cost_one_look_a_tick(
    server: Server, nursery: trio.Nursery
) -> None:
    _, principal = await watched(server)
    await nursery.start(server.watch.run)
    before = server.store.looks
    watches = [server.watch.watch(principal) for _ in range(1_000)]
    for each in watches:
        each.__enter__()
    await trio.sleep(10)
    assert server.store.looks - before <= 10 / TICK_S + 1
    assert server.watch.statistics().watched == 1
    for each in watches:
        each.__exit__(None, None, None)
    assert server.watch.statistics().watched == 0
    server.watch.stop()


async def test_the_last_use_is_written_once_a_minute_and_by_no_request(
    server: Server, nursery: trio.Nursery
) -> None:
    shown, _ = await watched(server)
    writes: list[float] = []
    note_used = server.store.note_used

    class Counting(FakeKeys):
        async def note_used(self, keys: Sequence[KeyId]) -> None:
            writes.append(trio.current_time())
            await note_used(keys)

    server.watch._store = Counting(  # the same tables
        server.store.state, keys=server.store.keys, secrets=server.store.secrets
    )
    await nursery.start(server.watch.run)
    for _ in range(1_300):
        await server.enter(text_of(shown))
        await trio.sleep(0.1)
    assert 2 <= len(writes) <= 3
    found = server.store.keys[shown.key.id].last_used_at
    assert found is not None
    assert (server.store.state.now - found).total_seconds() < 70
    server.watch.stop()


async def test_a_use_that_could_not_be_written_is_written_later(
    server: Server, nursery: trio.Nursery
) -> None:
    shown, _ = await watched(server)
    server.store.state.unavailable = True
    await nursery.start(server.watch.run)
    await trio.sleep(20)
    assert server.store.keys[shown.key.id].last_used_at is None
    server.store.state.unavailable = False
    await trio.sleep(TICK_S + 0.1)
    assert server.store.keys[shown.key.id].last_used_at is not None
    server.watch.stop()


async def test_at_the_stop_what_was_used_is_written(server: Server) -> None:
    shown, _ = await watched(server)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.watch.run)
        server.watch.stop()
    assert server.store.keys[shown.key.id].last_used_at is not None


async def test_a_find_that_is_overtaken_by_a_revocation_is_not_remembered(
    server: Server,
) -> None:
    shown = await server.made()

    async with trio.open_nursery() as nursery:

        def overtake() -> None:
            server.store.on_find = lambda: None
            server.store.keys[shown.key.id] = revoked(server, shown.key.id)
            server.keys.heed([shown.key.id])

        server.store.on_find = overtake
        nursery.start_soon(_enter, server, text_of(shown))
    assert await server.refusal(text_of(shown)) is ErrorCode.KEY_REVOKED


async def _enter(server: Server, text: str) -> None:
    with suppress(RdevError):
        await server.enter(text)


def revoked(server: Server, key: KeyId) -> Key:
    return replace(server.store.keys[key], revoked_at=server.store.state.now)
