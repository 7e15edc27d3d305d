"""Verifying while reading ahead: in order, bounded, and with a database that goes away."""

from dataclasses import replace
from datetime import date

import pytest
import trio

from rdev.domain.audit import SealedEntry
from rdev.domain.audit_chain import GENESIS, Link, Place, next_hash
from rdev.domain.errors import ErrorCode, RdevError
from rdev.services import audit_verify
from rdev.services.audit_verify import AuditVerifier

DAY = date(2026, 11, 22)
GONE = RdevError(ErrorCode.SERVICE_UNAVAILABLE, "the database is away")


def chain_of(length: int) -> list[Link]:
    links, before = [], GENESIS
    for seq in range(1, length + 1):
        content = seq.to_bytes(64)
        before = next_hash(before, content)
        links.append(Link(seq=seq, hash=before, day=DAY, content=content))
    return links


class Chain:
    """Implements `AuditChain` on a list; `fails_at` the so-manieth batch."""

    def __init__(self, links: list[Link], *, fails_at: int = 0) -> None:
        self._links = links
        self._fails_at = fails_at
        self.asked: list[tuple[int, int]] = []

    async def bounds(self) -> tuple[int, int] | None:
        await trio.lowlevel.checkpoint()
        return (1, self._links[-1].seq) if self._links else None

    async def place(self, seq: int) -> Place | None:
        await trio.lowlevel.checkpoint()
        return Place(seq=seq, hash=self._links[seq - 1].hash)

    async def links(self, *, after: int, limit: int) -> list[Link]:
        await trio.lowlevel.checkpoint()
        self.asked.append((after, limit))
        if len(self.asked) == self._fails_at:
            raise GONE
        return self._links[after : after + limit]

    async def strangers(self, first: Place, last: Place) -> int | None:
        await trio.lowlevel.checkpoint()
        return None

    async def is_stored(self, day: date) -> bool:
        raise GONE

    async def drop_of(self, day: date) -> SealedEntry | None:
        raise GONE

    async def newest_drop(self) -> SealedEntry | None:
        raise GONE


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_verify, "BATCH", 7)


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 14, 40])
async def test_every_link_is_checked_once(length: int):
    verdict = await AuditVerifier(chain=Chain(chain_of(length))).verify()
    assert (verdict.checked, verdict.last.seq, verdict.more) == (length, length, False)
    assert verdict.fault is None


@pytest.mark.parametrize("limit", [1, 6, 7, 8, 20])
async def test_a_part_reads_one_link_more_than_it_checks(limit: int):
    chain = Chain(chain_of(40))
    verdict = await AuditVerifier(chain=chain).verify(after=3, limit=limit)
    assert (verdict.checked, verdict.last.seq, verdict.more) == (limit, 3 + limit, True)
    assert max(after + most for after, most in chain.asked) == 3 + limit + 1


@pytest.mark.parametrize("fails_at", [1, 2, 5])
async def test_a_database_that_goes_away_is_said_so(fails_at: int):
    with pytest.raises(RdevError) as caught:
        await AuditVerifier(chain=Chain(chain_of(40), fails_at=fails_at)).verify()
    assert caught.value is GONE


async def test_a_database_that_goes_away_while_a_loss_is_looked_into_is_said_so():
    links = chain_of(40)
    links[20] = replace(links[20], content=None)
    with pytest.raises(RdevError) as caught:
        await AuditVerifier(chain=Chain(links)).verify()
    assert caught.value is GONE


async def test_what_follows_a_fault_is_not_read():
    links = chain_of(70)
    links[2] = replace(links[2], content=b"x" * 64)
    chain = Chain(links)
    verdict = await AuditVerifier(chain=chain).verify()
    assert verdict.fault is not None
    assert (verdict.fault.seq, verdict.checked) == (3, 2)
    assert len(chain.asked) <= 3
