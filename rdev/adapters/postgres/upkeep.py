"""The housekeeper's duties in PostgreSQL."""

from rdev.adapters.postgres.pool import Pool, translate_errors


class PostgresUpkeep:
    """The `Upkeep` port."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def ensure_output_partitions(self, *, days_ahead: int) -> None:
        """See `Upkeep.ensure_output_partitions`; the function serialises by an advisory lock."""
        with translate_errors():
            async with self._pool.connection() as connection:
                await connection.execute("select ensure_output_partitions(%s)", (days_ahead,))
