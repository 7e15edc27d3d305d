"""Idempotency keys in memory."""

from dataclasses import dataclass, field

import trio

from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency, mismatch


@dataclass(slots=True)
class KeptKeys:
    """What each key of each API key stands for."""

    # (API key, key) → digest, id of what was made, `trio.current_time()` then.
    kept: dict[tuple[str, str], tuple[bytes, str, float]] = field(default_factory=dict)

    def find(self, idempotency: Idempotency) -> str | None:
        """What the key stands for. Errors: IDEMPOTENCY_MISMATCH."""
        found = self.kept.get((idempotency.key_id, idempotency.key))
        if found is None or found[2] + IDEMPOTENCY_S <= trio.current_time():
            return None
        if found[0] != idempotency.digest:
            raise mismatch()
        return found[1]

    def keep(self, idempotency: Idempotency, made: str) -> None:
        """From now on the key stands for this."""
        key = (idempotency.key_id, idempotency.key)
        self.kept[key] = (idempotency.digest, made, trio.current_time())

    def age(self, seconds: float) -> None:
        """Make all of them older."""
        for key, (digest, made, made_at_s) in self.kept.items():
            self.kept[key] = (digest, made, made_at_s - seconds)

    def forget(self, older_s: float, limit: int) -> int:
        """Delete up to so many that are older; how many there were."""
        before = trio.current_time() - older_s
        old = [key for key, (_, _, made_at_s) in self.kept.items() if made_at_s < before][:limit]
        for key in old:
            del self.kept[key]
        return len(old)
