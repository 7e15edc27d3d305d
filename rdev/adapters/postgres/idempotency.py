"""Idempotency keys in PostgreSQL: they are kept by the statement that makes what they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import errors
from psycopg.rows import TupleRow

from rdev.adapters.postgres.connection import TrioConnection
from rdev.adapters.postgres.pool import Pool, translate_errors
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.idempotency import IDEMPOTENCY_S, Idempotency, mismatch

# How long a request waits for another one with the same key, in seconds (the HTTP contract), and
# when one that waited in vain should come again.
WAIT_S = 2
RETRY_AFTER_S = 1.0

_FIND = """
select digest, made from idempotency_keys
where key_id = %s and key = %s and made_at > now() - make_interval(secs => %s)
"""


# For a transaction of several statements: a row where the key is the request's own.
_KEEP = """
with bounded as materialized (
    select set_config('lock_timeout', %(idempotency_wait)s, true)
)
insert into idempotency_keys as k (key_id, key, digest, made)
select %(idempotency_key_id)s, %(idempotency_key)s, %(idempotency_digest)s, %(idempotency_made)s
from bounded
on conflict (key_id, key) do update
set digest = excluded.digest, made = excluded.made, made_at = now()
where k.made_at <= now() - make_interval(secs => %(idempotency_s)s)
"""


async def keep(
    connection: TrioConnection[TupleRow], idempotency: Idempotency | None, *, made: str
) -> bool:
    """Keep the key in the open transaction; False where it stands for something already. Goes with
    `translate_key_in_use`."""
    if idempotency is None:
        return True
    return (await connection.execute(_KEEP, key_parameters(idempotency, made=made))).rowcount == 1


def key_parameters(idempotency: Idempotency | None, *, made: str) -> dict[str, object]:
    """What the statement that keeps a key is given; without a key it keeps nothing."""
    return {
        "idempotency_key_id": idempotency and idempotency.key_id,
        "idempotency_key": idempotency and idempotency.key,
        "idempotency_digest": idempotency and idempotency.digest,
        "idempotency_made": made,
        "idempotency_s": IDEMPOTENCY_S,
        "idempotency_wait": f"{WAIT_S}s",
    }


async def find_made(pool: Pool, idempotency: Idempotency) -> str | None:
    """The id of what the key stands for. Errors: IDEMPOTENCY_MISMATCH, SERVICE_UNAVAILABLE."""
    values = (idempotency.key_id, idempotency.key, IDEMPOTENCY_S)
    with translate_errors():
        async with pool.connection() as connection:
            row = await (await connection.execute(_FIND, values)).fetchone()
    if row is None:
        return None
    digest, made = row
    if digest != idempotency.digest:
        raise mismatch()
    return str(made)


@contextmanager
def translate_key_in_use() -> Iterator[None]:
    """Around `translate_errors`: a wait for another request with the same key that was too long is
    a CONFLICT. No other lock of these statements is waited for as long."""
    try:
        yield
    except RdevError as error:
        if not isinstance(error.__cause__, errors.LockNotAvailable):
            raise
        message = "another request with this Idempotency-Key is under way"
        raise RdevError(ErrorCode.CONFLICT, message, retry_after_s=RETRY_AFTER_S) from error
