"""Verifying the audit log: the chain is computed anew from the entries themselves.

Memory is that of one batch of `BATCH` seals. Of what is wrong the first seal is named.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import trio

from rdev.domain.audit import Action, SealedEntry
from rdev.domain.audit_chain import (
    ORIGIN,
    ChainFault,
    FaultKind,
    Link,
    Place,
    Verdict,
    canonical,
    check_links,
    next_hash,
)
from rdev.ports.audit import AuditChain

BATCH = 2_500
CHECKPOINTS_AT_ONCE = 500
# An entry that was written a moment ago is sealed within this.
SEALED_WITHIN_S = 3.0


class AuditVerifier:
    """Reads, changes nothing. Cancellation: harmless."""

    def __init__(self, *, chain: AuditChain) -> None:
        self._chain = chain

    async def verify(self, *, after: int = 0, limit: int | None = None) -> Verdict:
        """Verify the seals above `after` (0: from the first that is stored), at most `limit`.

        What stands at `after` itself is taken as it is. Blocks: for 10 µs a seal, in steps of a few
        ms.
        """
        bounds = await self._chain.bounds()
        if bounds is None:
            return Verdict(checked=0, last=ORIGIN)
        begin = await self._begin(after, bounds[0])
        if isinstance(begin, ChainFault):
            return Verdict(checked=0, last=ORIGIN, fault=begin)
        last_seq = bounds[1] if limit is None else min(bounds[1], begin.seq + limit)
        done = await self._walk(begin, last_seq)
        if done.fault is not None or done.checked == 0:
            return done
        seq = await self._stranger(begin, done.last)
        if seq is not None:
            message = f"seal {seq}: before it stands an entry that was never sealed"
            fault = ChainFault(kind=FaultKind.INSERTED, seq=seq, message=message)
            return Verdict(checked=done.checked, last=done.last, fault=fault)
        return Verdict(checked=done.checked, last=done.last, more=done.last.seq < bounds[1])

    async def compare(self, checkpoints: Iterable[Place]) -> ChainFault | None:
        """Whether the chain still has what was kept outside: the first checkpoint that it has not.

        The chain itself is to be verified too: a checkpoint holds for what is before it only as far
        as that hangs together.
        """
        bounds = await self._chain.bounds()
        first, last = bounds or (1, 0)
        good = 0
        for batch in _batches(iter(checkpoints), CHECKPOINTS_AT_ONCE):
            for kept in batch:
                if kept.seq < first:
                    continue  # dropped after its time
                if kept.seq > last:
                    message = f"seal {last + 1}: cut off; a checkpoint knows {kept.seq}"
                    return ChainFault(kind=FaultKind.TAIL_CUT, seq=last + 1, message=message)
                found = await self._chain.place(kept.seq)
                if found is None or found.hash != kept.hash:
                    message = f"seal {kept.seq}: not what its checkpoint kept (good: {good})"
                    return ChainFault(kind=FaultKind.RECOMPUTED, seq=kept.seq, message=message)
                good = kept.seq
        return None

    async def _begin(self, after: int, first: int) -> Place | ChainFault:
        """The seal from which to go on."""
        if after >= first:
            found = await self._chain.place(after)
            if found is not None:
                return found
            return _missing(after, "there is no such seal to go on from")
        if first == 1:
            return ORIGIN
        found = await self._chain.place(first)
        drop = await self._chain.newest_drop()
        if found is not None and drop is not None and _is_true(drop):
            told = drop.entry.detail
            if told.get("anchor_seq") == first and told.get("anchor_hash") == found.hash.hex():
                return found
        return _missing(1, f"the chain begins with seal {first}, which no dropped day explains")

    async def _walk(self, begin: Place, last_seq: int) -> Verdict:
        """The chain alone, link by link."""
        last, checked = begin, 0
        links = await self._chain.links(after=last.seq, limit=BATCH)
        while links and last.seq < last_seq:
            ahead = await self._chain.links(after=links[-1].seq, limit=BATCH)
            mine = [link for link in links if link.seq <= last_seq]
            verdict = await self._check(last, mine, ahead[0] if ahead else None)
            checked += verdict.checked
            last = verdict.last
            if verdict.fault is not None:
                return Verdict(checked=checked, last=last, fault=verdict.fault)
            links = ahead
            await trio.lowlevel.checkpoint()
        return Verdict(checked=checked, last=last)

    async def _check(self, after: Place, links: Sequence[Link], ahead: Link | None) -> Verdict:
        """One batch; entries of days that were dropped after their time may be missing."""
        last, checked, left = after, 0, list(links)
        while True:
            verdict = check_links(last, left, ahead)
            last, checked = verdict.last, checked + verdict.checked
            fault = verdict.fault
            if fault is None or fault.kind is not FaultKind.DELETED:
                return Verdict(checked=checked, last=last, fault=fault)
            gone = left[verdict.checked]
            fault = await self._is_lost(gone, fault)
            if fault is not None:
                return Verdict(checked=checked, last=last, fault=fault)
            last = Place(seq=gone.seq, hash=gone.hash)
            left = left[verdict.checked + 1 :]
            checked += 1

    async def _is_lost(self, gone: Link, fault: ChainFault) -> ChainFault | None:
        """What a missing entry means; None where its day was dropped after its time."""
        if await self._chain.is_stored(gone.day):
            return fault
        drop = await self._chain.drop_of(gone.day)
        if drop is None:
            await trio.sleep(SEALED_WITHIN_S)
            drop = await self._chain.drop_of(gone.day)
        if drop is not None and _is_true(drop) and drop.entry.target == gone.day.isoformat():
            return None
        message = f"seal {gone.seq}: the entries of {gone.day} are gone, and no entry says why"
        return ChainFault(kind=FaultKind.PARTITION_LOST, seq=gone.seq, message=message)

    async def _stranger(self, begin: Place, last: Place) -> int | None:
        """The seal before which an entry stands that was never sealed."""
        first = await self._chain.place(begin.seq + 1)
        return None if first is None else await self._chain.strangers(first, last)


def _is_true(drop: SealedEntry) -> bool:
    """Whether it is what the chain holds."""
    if drop.prev_hash is None or drop.entry.action != Action.DAY_DROPPED:
        return False
    return next_hash(drop.prev_hash, canonical(drop.entry)) == drop.hash


def _missing(seq: int, why: str) -> ChainFault:
    return ChainFault(kind=FaultKind.SEAL_MISSING, seq=seq, message=f"seal {seq}: {why}")


def _batches(places: Iterator[Place], size: int) -> Iterator[list[Place]]:
    while batch := list(islice(places, size)):
        yield batch
