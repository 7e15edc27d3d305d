"""Verifying the audit log: the chain is computed anew from the entries themselves.

Memory is that of three batches of `BATCH` seals: while one is hashed, the next is read. Of what is
wrong the first seal is named.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import islice

import trio

from rdev.domain.audit import Action, SealedEntry
from rdev.domain.audit_chain import (
    ORIGIN,
    ChainFault,
    Checkpoint,
    FaultKind,
    Link,
    Place,
    Verdict,
    canonical,
    check_links,
    next_hash,
)
from rdev.domain.errors import RdevError
from rdev.ports.audit import AuditChain

BATCH = 2_500
CHECKPOINTS_AT_ONCE = 500
# An entry that was written a moment ago is sealed within this.
SEALED_WITHIN_S = 3.0
# The shortest that any policy keeps a day (audit_policy), and what an entry may be younger than its
# checkpoint: by then whoever keeps checkpoints is back.
KEPT_AT_LEAST = timedelta(days=1)
KEPT_LATE = timedelta(days=1)


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
            return replace(done, fault=fault)
        anchor = begin.seq if begin.seq > after else 0
        return replace(done, more=done.last.seq < bounds[1], dropped=max(done.dropped, anchor))

    async def compare(
        self,
        checkpoints: Iterable[Checkpoint],
        *,
        dropped: int = 0,
        kept_since: datetime | None = None,
    ) -> ChainFault | None:
        """Whether the chain still has what was kept outside: the first checkpoint that it has not.

        The chain itself is to be verified too: a checkpoint holds for what is before it only as far
        as that hangs together. `dropped` is that verification's; nothing may have been dropped of
        which a checkpoint tells that it was written after `kept_since` (None: that is not asked).
        """
        bounds = await self._chain.bounds()
        first, last = bounds or (1, 0)
        good = 0
        for batch in _batches(iter(checkpoints), CHECKPOINTS_AT_ONCE):
            for checkpoint in batch:
                kept = checkpoint.place
                is_young = kept_since is not None and checkpoint.at - KEPT_LATE > kept_since
                if is_young and kept.seq <= dropped:
                    message = f"seal {kept.seq}: its entry was dropped before its time"
                    return ChainFault(kind=FaultKind.PARTITION_LOST, seq=kept.seq, message=message)
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
        if found is not None and drop is not None and _is_true(drop) and _is_due(drop):
            told = drop.entry.detail
            if told.get("anchor_seq") == first and told.get("anchor_hash") == found.hash.hex():
                return found
        return _missing(1, f"the chain begins with seal {first}, which no dropped day explains")

    async def _walk(self, begin: Place, last_seq: int) -> Verdict:
        """The chain alone, link by link; the database reads while this hashes."""
        found, reads = trio.open_memory_channel[list[Link] | RdevError](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, begin.seq, last_seq, found)
            # Carried past the nursery, which would make a group of it.
            done: Verdict | RdevError
            try:
                done = await self._follow(begin, last_seq, reads)
            except RdevError as error:
                done = error
            nursery.cancel_scope.cancel()
        if isinstance(done, RdevError):
            raise done
        return done

    async def _read(
        self, after: int, last_seq: int, found: trio.MemorySendChannel[list[Link] | RdevError]
    ) -> None:
        """Batch after batch, one of them ahead of who follows; one link more than is asked for."""
        async with found:
            try:
                while left := min(BATCH, last_seq + 1 - after):
                    links = await self._chain.links(after=after, limit=left)
                    if not links:
                        return
                    await found.send(links)
                    after = min(links[-1].seq, last_seq + 1)
            except RdevError as error:
                await found.send(error)

    async def _follow(
        self,
        begin: Place,
        last_seq: int,
        reads: trio.MemoryReceiveChannel[list[Link] | RdevError],
    ) -> Verdict:
        """Check what is read."""
        done = Verdict(checked=0, last=begin)
        links: list[Link] = []
        while True:
            ahead = await anext(reads, None)
            if isinstance(ahead, RdevError):
                raise ahead
            mine = [link for link in links if link.seq <= last_seq]
            verdict = await self._check(done.last, mine, ahead[0] if ahead else None)
            done = replace(
                verdict,
                checked=done.checked + verdict.checked,
                dropped=max(done.dropped, verdict.dropped),
            )
            if ahead is None or done.fault is not None:
                return done
            links = ahead

    async def _check(self, after: Place, links: Sequence[Link], ahead: Link | None) -> Verdict:
        """One batch; entries of days that were dropped after their time may be missing."""
        last, checked, dropped, left = after, 0, 0, list(links)
        while True:
            verdict = check_links(last, left, ahead)
            last, checked = verdict.last, checked + verdict.checked
            fault = verdict.fault
            if fault is not None and fault.kind is FaultKind.DELETED:
                gone = left[verdict.checked]
                fault = await self._is_lost(gone, fault)
                if fault is None:
                    last, dropped = Place(seq=gone.seq, hash=gone.hash), gone.seq
                    left = left[verdict.checked + 1 :]
                    checked += 1
                    continue
            return Verdict(checked=checked, last=last, fault=fault, dropped=dropped)

    async def _is_lost(self, gone: Link, fault: ChainFault) -> ChainFault | None:
        """What a missing entry means; None where its day was dropped after its time."""
        if await self._chain.is_stored(gone.day):
            return fault
        drop = await self._chain.drop_of(gone.day)
        if drop is None:
            await trio.sleep(SEALED_WITHIN_S)
            drop = await self._chain.drop_of(gone.day)
        is_told = drop is not None and drop.entry.target == gone.day.isoformat()
        if drop is not None and is_told and _is_true(drop) and _is_due(drop):
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


def _is_due(drop: SealedEntry) -> bool:
    """Whether the day was as old as the shortest policy lets it become, when it was dropped."""
    try:
        day = date.fromisoformat(drop.entry.target)
    except ValueError:
        return False
    return drop.entry.at.astimezone(UTC).date() - day > KEPT_AT_LEAST


def _missing(seq: int, why: str) -> ChainFault:
    return ChainFault(kind=FaultKind.SEAL_MISSING, seq=seq, message=f"seal {seq}: {why}")


def _batches(kept: Iterator[Checkpoint], size: int) -> Iterator[list[Checkpoint]]:
    while batch := list(islice(kept, size)):
        yield batch
