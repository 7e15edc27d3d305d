"""Sessions and stream tokens of two servers on one store in memory, in virtual time."""

from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import pytest
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import command_id
from rdev.domain.keys import ADMIN, KeyEnd, Principal, Scope
from rdev.domain.tickets import SESSION_S, STREAM_TOKEN_S, Seals, TicketKind
from rdev.services.cached import TTL_S
from rdev.services.key_watch import TICK_S
from rdev.services.tickets import Tickets
from tests.fakes.keys import FakeKeys
from tests.fakes.store import StoreState
from tests.services.test_keys import ACTOR, ADMIN_KEY, HERE, Server, text_of

SECRET = b"the secret of all servers, 32 bytes and more"
STREAM = command_id(UUID(int=5))


@dataclass(slots=True, kw_only=True)
class Site:
    """One server's keys and tickets."""

    server: Server
    secret: bytes = SECRET
    admin_key: str = ADMIN_KEY
    tickets: Tickets = field(init=False)

    def __post_init__(self) -> None:
        self.tickets = Tickets(
            keys=self.server.keys,
            seals=Seals(self.secret),
            admin_key=self.admin_key,
            now=lambda: self.server.store.state.now,
        )

    async def session(self, **fields: object) -> tuple[str, Principal]:
        """A session of a fresh key, and who opened it."""
        principal = await self.server.enter(text_of(await self.server.made(**fields)))
        return self.tickets.open_session(principal).text, principal

    async def token(self, **fields: object) -> tuple[str, Principal]:
        principal = await self.server.enter(text_of(await self.server.made(**fields)))
        return self.tickets.issue_stream_token(principal, STREAM).text, principal

    async def refusal(
        self, text: str, kind: TicketKind = TicketKind.SESSION, ip: str = HERE
    ) -> ErrorCode | None:
        try:
            await self.tickets.check(text, kind, ip)
        except RdevError as error:
            return error.code
        return None


@pytest.fixture
def site() -> Site:
    return Site(server=Server(store=FakeKeys(StoreState())))


@pytest.fixture
def pair() -> tuple[Site, Site]:
    store = FakeKeys(StoreState())
    one, two = Server(store=store), Server(store=store)
    one.others.append(two)
    return Site(server=one), Site(server=two)


async def test_who_comes_with_a_ticket_is_who_got_it(pair: tuple[Site, Site]) -> None:
    text, principal = await pair[0].session(scopes=["projects:read"], project_ids=["a"])
    for site in pair:
        entry = await site.tickets.check(text, TicketKind.SESSION, HERE)
        found = entry.principal
        assert (found.key_id, found.public_id, found.name, found.grant) == (
            principal.key_id, principal.public_id, principal.name, principal.grant,
        )  # fmt: skip
        assert found.ends_at == site.server.store.state.now + timedelta(seconds=SESSION_S)
        assert entry.ticket.stream is None


async def test_a_token_names_its_stream(site: Site) -> None:
    text, _ = await site.token()
    entry = await site.tickets.check(text, TicketKind.STREAM, HERE)
    assert entry.ticket.stream == STREAM


async def test_neither_is_good_as_the_other(site: Site) -> None:
    session, principal = await site.session()
    token = site.tickets.issue_stream_token(principal, STREAM).text
    assert await site.refusal(session, TicketKind.STREAM) is ErrorCode.UNAUTHORIZED
    assert await site.refusal(token, TicketKind.SESSION) is ErrorCode.UNAUTHORIZED
    assert await site.server.refusal(session) is ErrorCode.UNAUTHORIZED


async def test_a_server_with_another_secret_knows_none(site: Site) -> None:
    stranger = Site(server=site.server, secret=b"x" * 32)
    session, _ = await site.session()
    token, _ = await site.token()
    assert await stranger.refusal(session) is ErrorCode.UNAUTHORIZED
    assert await stranger.refusal(token, TicketKind.STREAM) is ErrorCode.UNAUTHORIZED
    assert await site.refusal(session) is None


async def test_what_nobody_sealed_never_reaches_the_database(site: Site) -> None:
    text, _ = await site.session()
    before = site.server.store.looks
    for forged in ("", "x", text[:-1], text + "A", text.replace("key_", "key_0", 1)):
        assert await site.refusal(forged) is ErrorCode.UNAUTHORIZED
    assert site.server.store.looks == before


@pytest.mark.parametrize(
    ("kind", "good_for_s"),
    [(TicketKind.SESSION, SESSION_S), (TicketKind.STREAM, STREAM_TOKEN_S)],
)
async def test_a_ticket_ends_by_itself(site: Site, kind: TicketKind, good_for_s: int) -> None:
    made = site.session() if kind is TicketKind.SESSION else site.token()
    text, _ = await made
    await trio.sleep(good_for_s - 1)
    assert await site.refusal(text, kind) is None
    await trio.sleep(1)
    assert await site.refusal(text, kind) is ErrorCode.UNAUTHORIZED


async def test_a_ticket_ends_with_its_key(site: Site) -> None:
    text, _ = await site.session(expires_in=60)
    assert await site.refusal(text) is None
    await trio.sleep(60)
    assert await site.refusal(text) is ErrorCode.KEY_EXPIRED


async def test_what_is_told_of_its_end_is_no_later_than_the_keys(site: Site) -> None:
    now = site.server.store.state.now
    _, short = await site.session(expires_in=60)
    _, long = await site.session()
    assert site.tickets.open_session(short).ends_at == now + timedelta(seconds=60)
    assert site.tickets.open_session(long).ends_at == now + timedelta(seconds=SESSION_S)


async def test_a_revocation_ends_the_tickets_here_and_where_it_is_heard(
    pair: tuple[Site, Site],
) -> None:
    text, principal = await pair[0].session()
    for site in pair:
        assert await site.refusal(text) is None
    await pair[0].server.keys.revoke(ADMIN, principal.key_id, ACTOR)
    for site in pair:
        assert await site.refusal(text) is ErrorCode.KEY_REVOKED


async def test_a_revocation_that_nobody_heard_ends_them_after_the_ttl(
    pair: tuple[Site, Site],
) -> None:
    one, two = pair
    two.server.is_deaf = True
    text, principal = await one.token()
    assert await two.refusal(text, TicketKind.STREAM) is None
    await one.server.keys.revoke(ADMIN, principal.key_id, ACTOR)
    await trio.sleep(TTL_S - 0.1)
    assert await two.refusal(text, TicketKind.STREAM) is None
    await trio.sleep(0.1)
    assert await two.refusal(text, TicketKind.STREAM) is ErrorCode.KEY_REVOKED


async def test_a_ticket_ends_with_the_secret_it_was_got_with(site: Site) -> None:
    text, principal = await site.session()
    fresh = await site.server.keys.rotate(ADMIN, principal.key_id, grace_s=30, actor=ACTOR)
    newer = site.tickets.open_session(await site.server.enter(text_of(fresh))).text
    await trio.sleep(29)
    assert (await site.refusal(text), await site.refusal(newer)) == (None, None)
    await trio.sleep(2)
    assert await site.refusal(text) is ErrorCode.KEY_REVOKED
    assert await site.refusal(newer) is None


async def test_a_ticket_is_good_from_where_its_key_is(site: Site) -> None:
    principal = await site.server.enter(
        text_of(await site.server.made(allowed_ips=["192.0.2.0/24"]))
    )
    text = site.tickets.open_session(principal).text
    assert await site.refusal(text) is None
    assert await site.refusal(text, ip="198.51.100.1") is ErrorCode.IP_NOT_ALLOWED


async def test_the_key_of_a_ticket_is_remembered_like_a_keys_text(site: Site) -> None:
    text, _ = await site.session()
    before = site.server.store.looks
    for _ in range(100):
        assert await site.refusal(text) is None
    assert site.server.store.looks == before + 1


async def test_a_ticket_whose_key_cannot_be_looked_up_is_not_refused_as_wrong(site: Site) -> None:
    text, _ = await site.session()
    site.server.store.state.unavailable = True
    assert await site.refusal(text) is ErrorCode.SERVICE_UNAVAILABLE
    site.server.store.state.unavailable = False
    assert await site.refusal(text) is None


async def test_the_bootstrap_key_has_sessions_until_it_is_another_one(site: Site) -> None:
    text = site.tickets.open_session(ADMIN).text
    entry = await site.tickets.check(text, TicketKind.SESSION, HERE)
    assert entry.principal.key_id == ADMIN.key_id
    assert entry.principal.may(Scope.ADMIN)
    later = Site(server=site.server, admin_key="another bootstrap key of the administrator")
    assert await later.refusal(text) is ErrorCode.UNAUTHORIZED
    assert ADMIN_KEY not in text
    assert (site.server.store.finds, site.server.store.looks) == (0, 0)


async def test_the_text_is_in_no_repr(site: Site) -> None:
    issued = site.tickets.open_session(ADMIN)
    assert issued.text not in repr(issued)


# ----------------------------------------------------------------------------- watching


@pytest.mark.parametrize("is_admin", [True, False])
async def test_what_is_watched_for_a_ticket_ends_with_it(
    site: Site, nursery: trio.Nursery, is_admin: bool
) -> None:
    watch = site.server.watch
    await nursery.start(watch.run)
    by = ADMIN if is_admin else (await site.session())[1]
    text = site.tickets.issue_stream_token(by, STREAM).text
    entry = await site.tickets.check(text, TicketKind.STREAM, HERE)
    told: list[KeyEnd] = []
    with watch.watch(entry.principal, told.append) as seen, watch.watch(by) as keys_own:
        await trio.sleep(STREAM_TOKEN_S - 1)
        assert seen.reason is None
        await trio.sleep(1 + TICK_S + 0.1)
        assert (seen.reason, told, keys_own.reason) == (KeyEnd.EXPIRED, [KeyEnd.EXPIRED], None)
    assert watch.statistics().watched == 0
    watch.stop()


async def test_a_revocation_ends_what_is_watched_for_a_ticket(
    pair: tuple[Site, Site], nursery: trio.Nursery
) -> None:
    one, two = pair
    two.server.is_deaf = True
    await nursery.start(two.server.watch.run)
    text, principal = await one.token()
    entry = await two.tickets.check(text, TicketKind.STREAM, HERE)
    with two.server.watch.watch(entry.principal) as seen:
        await trio.sleep(10.1)
        await one.server.keys.revoke(ADMIN, principal.key_id, ACTOR)
        with trio.fail_after(TICK_S + 0.1):
            await seen.ended.wait()
    assert seen.reason is KeyEnd.REVOKED
    two.server.watch.stop()
