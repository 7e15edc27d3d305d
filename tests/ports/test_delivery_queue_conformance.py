"""The `DeliveryQueue` port, on the fake and on PostgreSQL."""

from collections import Counter
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import pytest

from rdev.domain.deliveries import (
    DISABLE_AFTER_S,
    QUICK_S,
    DeadReason,
    DeliveryStatus,
    Owed,
    OwnerShares,
    Settled,
    Verdict,
)
from rdev.domain.ids import key_id, key_uuid
from rdev.domain.keys import ADMIN_KEY_ID
from rdev.domain.webhooks import LANE_CAP, DisabledReason, WebhookId
from rdev.ports.deliveries import DeliveryQueue
from tests.fakes.deliveries import FakeDeliveries
from tests.ports.conftest import Pools
from tests.ports.hooks import Hooks, accepted, outcome, postgres_hooks, refused

LEASE_S = 600.0
GONE = Verdict(status=DeliveryStatus.DEAD, reason=DeadReason.GONE)


@dataclass(slots=True, kw_only=True)
class FakeWorld:
    queue: FakeDeliveries

    async def owner(self) -> UUID | None:
        return uuid4()

    async def endpoint(self, *, is_ordered: bool = False, owner: UUID | None = None) -> WebhookId:
        return self.queue.endpoint("https://a.example/", is_ordered=is_ordered, owner=owner)

    async def owe(self, webhook: WebhookId, count: int) -> list[str]:
        return [row.event for row in self.queue.owe(webhook, count)]

    async def age(self, seconds: float) -> None:
        self.queue.age(seconds)

    async def stands(self, owed: Owed) -> tuple[str, int]:
        row = self.queue.rows[owed.lease.delivery]
        return ("pending" if row.status == "sending" else row.status), row.attempt


@dataclass(slots=True, kw_only=True)
class PostgresWorld:
    queue: DeliveryQueue
    hooks: Hooks

    async def owner(self) -> UUID | None:
        return key_uuid(await self.hooks.key(None))

    async def endpoint(self, *, is_ordered: bool = False, owner: UUID | None = None) -> WebhookId:
        return await self.hooks.endpoint(
            projects=frozenset({f"p{next(self.hooks.serial)}"}),
            is_ordered=is_ordered,
            owner=ADMIN_KEY_ID if owner is None else key_id(owner),
        )

    async def owe(self, webhook: WebhookId, count: int) -> list[str]:
        found = await self.hooks.webhooks.get(webhook)
        assert found is not None
        assert found.project_ids is not None
        (project,) = found.project_ids
        ids = await self.hooks.happen(*["command.queued"] * count, project=project)
        return [f"evt_{one.hex}" for one in ids]

    async def age(self, seconds: float) -> None:
        await self.hooks.age(seconds)

    async def stands(self, owed: Owed) -> tuple[str, int]:
        delivery = await self.hooks.delivery(owed)
        return delivery.status.value, delivery.attempts


World = FakeWorld | PostgresWorld


@pytest.fixture
async def real(pools: Pools) -> PostgresWorld:
    hooks = postgres_hooks(pools.requests)
    return PostgresWorld(queue=hooks.queue, hooks=hooks)


@pytest.fixture(params=["fake", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return FakeWorld(queue=FakeDeliveries(lease_s=LEASE_S))
    return request.getfixturevalue("real")


async def claim(
    world: World,
    limit: int = 100,
    untrusted_limit: int = 100,
    shares: OwnerShares | None = None,
) -> list[Owed]:
    return await world.queue.claim(
        holder="one", limit=limit, untrusted_limit=untrusted_limit, shares=shares
    )


async def test_one_at_a_time_until_something_was_accepted_then_as_many_as_the_cap(
    world: World,
) -> None:
    webhook = await world.endpoint()
    await world.owe(webhook, 10)
    (first,) = await claim(world)
    assert not first.is_trusted
    assert await claim(world) == []
    await world.queue.settle([accepted(first)])
    assert await world.stands(first) == ("delivered", 1)
    several = await claim(world)
    assert len(several) == LANE_CAP
    assert all(owed.is_trusted for owed in several)
    await world.queue.settle([refused(several[0], again_in_s=60)])
    assert await claim(world) == []


async def test_whoever_accepts_slowly_gets_one_at_a_time_and_is_not_failing(world: World) -> None:
    webhook = await world.endpoint()
    await world.owe(webhook, 12)
    (first,) = await claim(world)
    await world.queue.settle([accepted(first)])
    several = await claim(world)
    slow = replace(accepted(several[0]), outcome=replace(outcome(), latency_s=QUICK_S + 1))
    await world.queue.settle([slow, *map(accepted, several[1:])])
    (one,) = await claim(world)
    assert not one.is_trusted
    await world.age(DISABLE_AFTER_S + 60)
    (late,) = await claim(world) or [one]
    assert (await world.queue.settle([refused(late)])).failing_too_long == set()
    await world.age(60)
    (again,) = await claim(world)
    await world.queue.settle([accepted(again)])
    assert len(await claim(world)) == LANE_CAP


async def test_the_limits_of_a_claim_hold(world: World) -> None:
    for _ in range(5):
        await world.owe(await world.endpoint(), 1)
    assert len(await claim(world, untrusted_limit=2)) == 2
    assert len(await claim(world, limit=1)) == 1
    assert await claim(world, untrusted_limit=0) == []
    assert len(await claim(world)) == 2


async def _trusted(world: World, owner: UUID | None, count: int) -> list[WebhookId]:
    """Endpoints of an owner that have accepted something."""
    webhooks = [await world.endpoint(owner=owner) for _ in range(count)]
    for webhook in webhooks:
        await world.owe(webhook, 1)
    await world.queue.settle([accepted(owed) for owed in await claim(world)])
    return webhooks


def _counts(found: list[Owed]) -> dict[tuple[UUID | None, bool], int]:
    return dict(Counter((owed.owner, owed.is_trusted) for owed in found))


async def test_no_owner_gets_more_than_its_share_and_the_others_are_not_kept_by_it(
    world: World,
) -> None:
    greedy, other = await world.owner(), await world.owner()
    first, (behind,) = await _trusted(world, greedy, 5), await _trusted(world, other, 1)
    for webhook in first:
        await world.owe(webhook, LANE_CAP)
    for _ in range(6):
        await world.owe(await world.endpoint(owner=greedy), 1)
    # Behind all of these, one that accepts and new ones.
    await world.owe(behind, LANE_CAP)
    await world.owe(await world.endpoint(owner=other), 1)
    await world.owe(await world.endpoint(), 1)

    shares = OwnerShares(most=10, untrusted_most=3, held={greedy: (2, 1)})
    found = await claim(world, limit=14, untrusted_limit=100, shares=shares)
    assert _counts(found) == {
        (greedy, True): 8,
        (other, True): LANE_CAP,
        (other, False): 1,
        (None, False): 1,
    }


async def test_an_owner_that_has_its_share_of_untrusted_ones_keeps_its_trusted_ones(
    world: World,
) -> None:
    owner = await world.owner()
    for webhook in await _trusted(world, owner, 2):
        await world.owe(webhook, LANE_CAP)
    for _ in range(4):
        await world.owe(await world.endpoint(owner=owner), 1)

    shares = OwnerShares(most=16, untrusted_most=4, held={owner: (4, 2), None: (16, 4)})
    assert _counts(await claim(world, shares=shares)) == {
        (owner, True): 2 * LANE_CAP,
        (owner, False): 2,
    }
    full = OwnerShares(most=16, untrusted_most=4, held={owner: (16, 4)})
    assert await claim(world, shares=full) == []
    assert _counts(await claim(world)) == {(owner, False): 2}


async def test_who_was_passed_by_keeps_its_place_among_those_who_wait(world: World) -> None:
    webhooks = await _trusted(world, None, 3)
    for webhook in webhooks:
        await world.owe(webhook, LANE_CAP)
        await world.owe(webhook, LANE_CAP)
    served = []
    for _ in range(3):
        found = await claim(world, shares=OwnerShares(most=LANE_CAP, untrusted_most=1, held={}))
        assert len({owed.webhook for owed in found}) == 1
        served.append(found[0].webhook)
        await world.queue.settle([accepted(owed) for owed in found])
    assert set(served) == set(webhooks)


async def test_a_refused_one_comes_again_when_it_is_due(world: World) -> None:
    (event,) = await world.owe(await world.endpoint(), 1)
    (owed,) = await claim(world)
    await world.queue.settle([refused(owed, again_in_s=30)])
    assert await claim(world) == []
    await world.age(31)
    (again,) = await claim(world)
    assert (again.event, again.attempt, again.failures) == (event, 2, 1)


async def test_a_stale_lease_changes_nothing(world: World) -> None:
    await world.owe(await world.endpoint(), 1)
    (stale,) = await claim(world)
    await world.age(LEASE_S + 1)
    assert (await world.queue.tick()).interrupted == 1
    (owed,) = await claim(world)
    for settled in (accepted(stale), Settled(owed=stale, verdict=GONE, outcome=outcome(410))):
        result = await world.queue.settle([settled])
        assert (result.stale, result.disabled) == ({stale.lease.delivery}, set())
    await world.queue.release([stale.lease], sent=True)
    assert await world.stands(owed) == ("pending", 2)
    assert (await world.queue.settle([accepted(owed)])).stale == set()


async def test_what_was_not_sent_was_no_attempt_and_what_may_have_been_was_one(
    world: World,
) -> None:
    await world.owe(await world.endpoint(), 1)
    (owed,) = await claim(world)
    await world.queue.release([owed.lease], sent=False)
    assert await world.stands(owed) == ("pending", 0)
    (owed,) = await claim(world)
    await world.queue.release([owed.lease], sent=True)
    assert await world.stands(owed) == ("pending", 1)
    await claim(world)
    assert await world.queue.release_holder("another") == 0
    assert await world.queue.release_holder("one") == 1
    assert len(await claim(world)) == 1


async def test_an_ordered_endpoint_is_held_by_its_head(world: World) -> None:
    events = await world.owe(await world.endpoint(is_ordered=True), 3)
    (owed,) = await claim(world)
    await world.queue.settle([refused(owed, again_in_s=30)])
    assert await claim(world) == []
    await world.age(31)
    sent = []
    while claimed := await claim(world):
        sent += [one.event for one in claimed]
        await world.queue.settle([accepted(one) for one in claimed])
    assert sent == events


async def test_a_held_endpoint_is_passed_by(world: World) -> None:
    held, other = await world.endpoint(), await world.endpoint()
    for webhook in (held, other):
        await world.owe(webhook, 1)
    await world.queue.hold(held, for_s=60)
    assert [owed.webhook for owed in await claim(world)] == [other]
    await world.age(61)
    assert [owed.webhook for owed in await claim(world)] == [held]


async def test_gone_disables_and_a_disabled_endpoint_gets_nothing(world: World) -> None:
    webhook = await world.endpoint()
    await world.owe(webhook, 2)
    (owed,) = await claim(world)
    result = await world.queue.settle([Settled(owed=owed, verdict=GONE, outcome=outcome(410))])
    assert result.disabled == {webhook}
    assert await world.stands(owed) == ("dead", 1)
    assert await claim(world) == []
    assert not await world.queue.disable(webhook, DisabledReason.FAILING)
    assert (await world.queue.tick()).enabled == 0


async def test_days_of_failure_are_told_with_the_next_failure(world: World) -> None:
    webhook = await world.endpoint()
    await world.owe(webhook, 1)
    (owed,) = await claim(world)
    assert (await world.queue.settle([refused(owed)])).failing_too_long == set()
    await world.age(DISABLE_AFTER_S + 60)
    (owed,) = await claim(world)
    assert (await world.queue.settle([refused(owed)])).failing_too_long == {webhook}


async def test_the_oldest_of_too_many_are_buried(world: World) -> None:
    await world.owe(await world.endpoint(), 10)
    assert await world.queue.bury_overflow(pending_max=10) == 0
    assert await world.queue.bury_overflow(pending_max=7) == 3


async def test_the_oldest_that_is_owed_is_told_by_its_age(world: World) -> None:
    assert await world.queue.oldest_undelivered_s() == 0
    await world.owe(await world.endpoint(), 1)
    await world.age(3600)
    await world.owe(await world.endpoint(), 1)
    assert 3600 <= await world.queue.oldest_undelivered_s() < 3700
    (one, other) = await claim(world)  # under a lease it is still owed
    assert 3600 <= await world.queue.oldest_undelivered_s() < 3700
    await world.queue.settle([accepted(one), accepted(other)])
    assert await world.queue.oldest_undelivered_s() == 0


async def test_what_waits_for_an_endpoint_that_is_disabled_is_nobodys_lag(world: World) -> None:
    webhook = await world.endpoint()
    await world.owe(webhook, 1)
    await world.age(3600)
    assert await world.queue.oldest_undelivered_s() >= 3600
    await world.queue.disable(webhook, DisabledReason.FAILING)
    assert await world.queue.oldest_undelivered_s() < 3600
