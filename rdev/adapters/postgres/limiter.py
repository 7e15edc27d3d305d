"""Rate limits in PostgreSQL: one statement for all windows of a request, on the database's clock.

The rule is a function of `sql/0007_rate_limits.sql`, because the rows must be read under their
locks. A refused request writes nothing (but the empty row of a window that was never asked before).
"""

from collections.abc import Sequence

from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.limiter import Decision, Hit

# For a connection: less than the pool's, since the request waits once more for its own work, and
# less than the service's, since a wait that is cancelled tells the pool's breaker nothing.
WAIT_S = 2.0

_TAKE = "select is_admitted, remaining, reset_us, retry_us from take_hits(%s, %s, %s, %s)"


class PostgresRateLimits:
    """The `RateLimits` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def take(self, hits: Sequence[Hit]) -> list[Decision]:
        """See `RateLimits.take`."""
        if not hits:
            return []
        # In the order of the key: two requests lock their rows in the same order.
        order = sorted(range(len(hits)), key=lambda index: _key(hits[index]))
        asked = [hits[index] for index in order]
        values = (
            [hit.policy.name for hit in asked],
            [hit.subject for hit in asked],
            [hit.policy.limit.window_ticks for hit in asked],
            [hit.policy.limit.requests for hit in asked],
        )
        with translate_errors():
            async with self._pool.connection(wait_s=WAIT_S) as connection:
                rows = await (await connection.execute(_TAKE, values)).fetchall()
        decisions = {
            index: Decision(
                policy=hits[index].policy,
                is_admitted=row[0],
                remaining=row[1],
                reset_ticks=row[2],
                retry_ticks=row[3],
            )
            for index, row in zip(order, rows, strict=True)
        }
        return [decisions[index] for index in range(len(hits))]


def _key(hit: Hit) -> tuple[str, str, int]:
    return hit.policy.name, hit.subject, hit.policy.limit.window_ticks
