"""Every sentence of `ports/keys.py`, in memory and on PostgreSQL."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_network
from uuid import UUID

import pytest
import trio

from rdev.adapters.postgres.keys import PostgresKeys
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import Idempotency
from rdev.domain.ids import KeyId, ProjectId, key_id
from rdev.domain.key_text import Credential
from rdev.domain.keys import (
    Grant,
    Key,
    KeyEnd,
    KeyStatus,
    NewKey,
    Rotation,
    Scope,
)
from rdev.domain.limiter import RateLimit
from rdev.ports.keys import USED_EVERY_S, KeyStore
from tests.fakes.key_samples import new_key, secret
from tests.fakes.keys import FakeKeys
from tests.fakes.store import ACTOR, StoreState
from tests.ports.conftest import Pools

NOWHERE = key_id(UUID(int=7))
_AGE = (
    """
    update api_keys
    set expires_at = expires_at - make_interval(secs => %(seconds)s),
        last_used_at = last_used_at - make_interval(secs => %(seconds)s)
    """,
    "update api_key_secrets set good_until = good_until - make_interval(secs => %(seconds)s)",
)


@dataclass(slots=True, kw_only=True)
class World:
    keys: KeyStore
    # Make all that is stored so many seconds older.
    age: Callable[[float], Awaitable[None]]


@pytest.fixture
async def real(pools: Pools) -> World:
    async def age(seconds: float) -> None:
        async with pools.requests.connection() as connection:
            for statement in _AGE:
                await connection.execute(statement, {"seconds": seconds})

    return World(keys=PostgresKeys(pool=pools.requests), age=age)


@pytest.fixture(params=["fake", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "postgres":
        return request.getfixturevalue("real")
    fake = FakeKeys(StoreState())

    async def age(seconds: float) -> None:
        fake.age(seconds)

    return World(keys=fake, age=age)


async def made(world: World, new: NewKey) -> Key:
    found = await world.keys.insert(new, ACTOR)
    assert not found.is_replay
    return found.key


async def end_of(world: World, credential: Credential) -> KeyEnd | str | None:
    """How the credential stands: None for good, else why not."""
    found = await world.keys.find(credential.digest)
    return "unknown" if found is None else found.standing.ended


async def test_a_key_is_stored_with_everything_it_may_do(world: World) -> None:
    grant = Grant(
        scopes=frozenset({Scope.PROJECTS_READ, Scope.KEYS_WRITE}),
        project_ids=frozenset({ProjectId("a"), ProjectId("b")}),
        allowed_ips=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
    )
    new = new_key(grant=grant, rate_limit=RateLimit(requests=5, window_s=60))
    key = await made(world, new)
    assert (key.id, key.name, key.created_by) == (new.id, new.name, "key_admin")
    assert (key.grant, key.rate_limit) == (grant, new.rate_limit)
    assert key.public_id == new.secret.credential.public_id
    assert (key.status, key.revoked_at, key.last_used_at) == (KeyStatus.ACTIVE, None, None)
    assert await world.keys.get(new.id) == key


async def test_all_projects_and_every_address_are_kept_as_such(world: World) -> None:
    key = await made(world, new_key())
    assert (key.grant.project_ids, key.grant.allowed_ips) == (None, ())
    assert (key.grant.expires_at, key.rate_limit) == (None, None)


async def test_an_unknown_key_is_none(world: World) -> None:
    assert await world.keys.get(NOWHERE) is None
    assert await world.keys.revoke(NOWHERE, ACTOR) is None
    rotation = Rotation(key=NOWHERE, secret=secret(), grace_s=0)
    assert await world.keys.rotate(rotation, ACTOR) is None


async def test_a_key_ends_after_its_seconds_and_at_its_grants_end_at_the_latest(
    world: World,
) -> None:
    long = await made(world, new_key(expires_in_s=3_600))
    ends = long.grant.expires_at
    assert ends is not None
    assert (ends - long.created_at).total_seconds() == pytest.approx(3_600, abs=1)
    held = Grant(scopes=frozenset({Scope.PROJECTS_READ}), expires_at=ends)
    assert (await made(world, new_key(grant=held))).grant.expires_at == ends
    later = await made(world, new_key(grant=held, expires_in_s=36_000))
    assert later.grant.expires_at == ends
    sooner = await made(world, new_key(grant=held, expires_in_s=60))
    assert sooner.grant.expires_at is not None
    assert sooner.grant.expires_at < ends


async def test_a_key_is_found_by_its_whole_credential_alone(world: World) -> None:
    new = new_key()
    key = await made(world, new)
    credential = new.secret.credential
    found = await world.keys.find(credential.digest)
    assert found is not None
    assert (found.key, found.standing.ended, found.standing.good_for_s) == (key, None, None)
    for other in (secret().credential.digest, bytes(32), b"", credential.digest[:-1]):
        assert await world.keys.find(other) is None


async def test_a_revoked_key_stays_revoked_from_the_first_time_on(world: World) -> None:
    new = new_key()
    key = await made(world, new)
    assert await end_of(world, new.secret.credential) is None
    first = await world.keys.revoke(key.id, ACTOR)
    assert first is not None
    assert first.status is KeyStatus.REVOKED
    assert first.revoked_at is not None
    assert await world.keys.revoke(key.id, ACTOR) == first
    assert await world.keys.get(key.id) == first
    assert await end_of(world, new.secret.credential) is KeyEnd.REVOKED


async def test_a_key_expires_by_the_clock_of_the_store(world: World) -> None:
    new = new_key(expires_in_s=100)
    await made(world, new)
    found = await world.keys.find(new.secret.credential.digest)
    assert found is not None
    assert found.standing.good_for_s == pytest.approx(100, abs=20)
    assert found.standing.ends_as is KeyEnd.EXPIRED
    await world.age(101)
    assert await end_of(world, new.secret.credential) is KeyEnd.EXPIRED
    expired = await world.keys.get(new.id)
    assert expired is not None
    assert expired.status is KeyStatus.EXPIRED


async def test_the_secret_before_a_rotation_is_good_for_the_grace(world: World) -> None:
    new, fresh = new_key(), secret()
    await made(world, new)
    turned = await world.keys.rotate(Rotation(key=new.id, secret=fresh, grace_s=100), ACTOR)
    assert turned is not None
    assert (turned.is_replay, turned.key.public_id) == (False, fresh.credential.public_id)
    found = await world.keys.find(new.secret.credential.digest)
    assert found is not None
    assert found.key.id == new.id
    assert (found.standing.ended, found.standing.ends_as) == (None, KeyEnd.REVOKED)
    assert found.standing.good_for_s == pytest.approx(100, abs=20)
    assert await end_of(world, fresh.credential) is None
    await world.age(101)
    assert await end_of(world, new.secret.credential) is KeyEnd.REVOKED
    assert await end_of(world, fresh.credential) is None


async def test_no_more_than_two_secrets_of_a_key_are_good(world: World) -> None:
    new, second, third = new_key(), secret(), secret()
    await made(world, new)
    for fresh in (second, third):
        await world.keys.rotate(Rotation(key=new.id, secret=fresh, grace_s=1_000), ACTOR)
    assert await end_of(world, new.secret.credential) is KeyEnd.REVOKED
    assert await end_of(world, second.credential) is None
    assert await end_of(world, third.credential) is None


async def test_without_grace_the_secret_before_ends_at_once(world: World) -> None:
    new = new_key()
    await made(world, new)
    await world.keys.rotate(Rotation(key=new.id, secret=secret(), grace_s=0), ACTOR)
    assert await end_of(world, new.secret.credential) is KeyEnd.REVOKED


async def test_rotations_at_once_leave_one_newest_secret(world: World) -> None:
    new = new_key()
    await made(world, new)
    fresh = [secret() for _ in range(5)]
    async with trio.open_nursery() as nursery:
        for each in fresh:
            rotation = Rotation(key=new.id, secret=each, grace_s=1_000)
            nursery.start_soon(world.keys.rotate, rotation, ACTOR)
    standings = await world.keys.standings([each.credential.public_id for each in fresh])
    good = [each for each in standings.values() if each.ended is None]
    assert len(standings) == 5
    assert len(good) == 2
    assert [each.good_for_s for each in good].count(None) == 1


@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_what_has_ended_is_not_rotated(world: World, end: str) -> None:
    new, fresh = new_key(expires_in_s=100), secret()
    await made(world, new)
    if end == "revoked":
        await world.keys.revoke(new.id, ACTOR)
    else:
        await world.age(101)
    with pytest.raises(RdevError) as caught:
        await world.keys.rotate(Rotation(key=new.id, secret=fresh, grace_s=0), ACTOR)
    assert caught.value.code is ErrorCode.CONFLICT
    assert await end_of(world, fresh.credential) == "unknown"


async def test_keys_are_listed_newest_first_in_pages(world: World) -> None:
    ids = [(await made(world, new_key())).id for _ in range(5)]

    async def page(before: KeyId | None) -> list[KeyId]:
        found = await world.keys.list_all(within=None, before=before, limit=2)
        return [key.id for key in found]

    first = await page(None)
    second = await page(first[-1])
    third = await page(second[-1])
    assert first + second + third == ids[::-1]


async def test_within_projects_only_keys_of_these_are_listed(world: World) -> None:
    own = await made(world, new_key(projects=("a",)))
    both = await made(world, new_key(projects=("a", "b")))
    await made(world, new_key(projects=("a", "c")))
    await made(world, new_key())
    within = [ProjectId("a"), ProjectId("b")]
    found = await world.keys.list_all(within=within, before=None, limit=10)
    assert [key.id for key in found] == [both.id, own.id]


async def test_the_standings_of_many_are_told_at_once(world: World) -> None:
    good, revoked, ending = new_key(), new_key(), new_key(expires_in_s=50)
    for new in (good, revoked, ending):
        await made(world, new)
    await world.keys.revoke(revoked.id, ACTOR)
    ids = [new.secret.credential.public_id for new in (good, revoked, ending)]
    found = await world.keys.standings([*ids, secret().credential.public_id])
    assert found.keys() == set(ids)
    assert [found[id_].ended for id_ in ids] == [None, KeyEnd.REVOKED, None]
    assert found[ids[2]].good_for_s == pytest.approx(50, abs=20)
    assert await world.keys.standings([]) == {}


async def test_the_last_use_is_written_at_most_once_a_minute(world: World) -> None:
    key = await made(world, new_key())
    untouched = await made(world, new_key())

    async def used_at() -> object:
        found = await world.keys.get(key.id)
        assert found is not None
        return found.last_used_at

    await world.keys.note_used([key.id, NOWHERE])
    first = await used_at()
    assert first is not None
    await world.keys.note_used([key.id])
    assert await used_at() == first
    await world.age(USED_EVERY_S + 1)
    aged = await used_at()
    await world.keys.note_used([key.id])
    assert await used_at() != aged
    assert await world.keys.get(untouched.id) == untouched


def same(key: str = "once", digest: bytes = b"d") -> Idempotency:
    return Idempotency(key_id="key_admin", key=key, digest=digest)


async def test_a_repeated_insert_makes_nothing_and_gives_the_first(world: World) -> None:
    first = await made(world, new_key(idempotency=same()))
    again = new_key(idempotency=same())
    replayed = await world.keys.insert(again, ACTOR)
    assert (replayed.key, replayed.is_replay) == (first, True)
    assert await world.keys.get(again.id) is None
    assert await end_of(world, again.secret.credential) == "unknown"
    with pytest.raises(RdevError) as caught:
        await world.keys.insert(new_key(idempotency=same(digest=b"other")), ACTOR)
    assert caught.value.code is ErrorCode.IDEMPOTENCY_MISMATCH


async def test_inserts_at_once_with_one_idempotency_key_make_one_key(world: World) -> None:
    ids = set()

    async def insert() -> None:
        ids.add((await world.keys.insert(new_key(idempotency=same()), ACTOR)).key.id)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(insert)
    assert len(ids) == 1
    assert len(await world.keys.list_all(within=None, before=None, limit=10)) == 1


async def test_a_repeated_rotation_makes_no_further_secret(world: World) -> None:
    new, fresh, never = new_key(), secret(), secret()
    await made(world, new)
    for each in (fresh, never):
        rotation = Rotation(key=new.id, secret=each, grace_s=0, idempotency=same())
        turned = await world.keys.rotate(rotation, ACTOR)
        assert turned is not None
        assert turned.is_replay is (each is never)
        assert turned.key.public_id == fresh.credential.public_id
    assert await end_of(world, fresh.credential) is None
    assert await end_of(world, never.credential) == "unknown"


async def test_a_refused_rotation_keeps_no_idempotency_key(world: World) -> None:
    new, other = new_key(), new_key()
    await made(world, new)
    await made(world, other)
    await world.keys.revoke(new.id, ACTOR)
    for _ in range(2):
        rotation = Rotation(key=new.id, secret=secret(), grace_s=0, idempotency=same())
        with pytest.raises(RdevError) as caught:
            await world.keys.rotate(rotation, ACTOR)
        assert caught.value.code is ErrorCode.CONFLICT
    free = Rotation(key=other.id, secret=secret(), grace_s=0, idempotency=same())
    turned = await world.keys.rotate(free, ACTOR)
    assert turned is not None
    assert not turned.is_replay


async def test_nothing_of_the_text_is_in_the_database(pools: Pools) -> None:
    keys = PostgresKeys(pool=pools.requests)
    new, fresh = new_key(), secret()
    await keys.insert(new, ACTOR)
    await keys.rotate(Rotation(key=new.id, secret=fresh, grace_s=10), ACTOR)
    for text in (new.secret.text, fresh.text):
        hidden = text.rsplit("_", 1)[1][:43]
        async with pools.requests.connection() as connection:
            for table in ("api_keys", "api_key_secrets"):
                cursor = await connection.execute(
                    f"select count(*) from {table} t where t::text like %s", (f"%{hidden}%",)
                )
                assert await cursor.fetchone() == (0,)
