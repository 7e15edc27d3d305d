"""Sealing the audit log, and verifying it: rows a second.

Entries as `command.submitted` writes them (some 280 bytes to hash), in transactions of a hundred,
on a PostgreSQL of the scenario's own. Sealing is what the server does each second, in its batches;
verifying is what `rdev audit verify` does.
"""

import tempfile
import time
from pathlib import Path

import trio

from bench.harness import Context, Figure, Measurement, Scenario
from rdev.adapters.postgres.audit import PostgresAudit
from rdev.adapters.postgres.connection import ConnectionSettings
from rdev.adapters.postgres.embedded import open_embedded
from rdev.adapters.postgres.migrate import up
from rdev.adapters.postgres.pool import Pool, open_pool
from rdev.services.audit import BATCH
from rdev.services.audit_verify import AuditVerifier

ROWS = 100_000
PER_TRANSACTION = 100
TARGET_VERIFY_PER_S = 100_000.0

_FILL = """
insert into audit_entries (actor, actor_name, ip, request_id, action, target, project, detail)
select 'key_' || md5('key'), 'deploy', '10.1.2.3', 'req-' || md5(n::text), 'command.submitted',
       'cmd_' || md5(n::text), 'demo',
       jsonb_build_object('kind', 'shell', 'priority', 'normal',
                          'argv', array['sh', '-c', 'make test TARGET=' || n])
from generate_series(1, %s) n
"""


async def _fill(pool: Pool) -> None:
    async with pool.connection() as connection:
        await connection.execute("truncate audit_entries, audit_seals")
        for _ in range(ROWS // PER_TRANSACTION):
            await connection.execute(_FILL, (PER_TRANSACTION,))
        await connection.execute("analyze audit_entries")


async def _repetition(pool: Pool) -> dict[str, float]:
    await _fill(pool)
    audit = PostgresAudit(pool=pool)
    began = time.perf_counter()
    sealed = BATCH
    while sealed == BATCH:
        done = await audit.seal(limit=BATCH)
        sealed = 0 if done is None else done.count
    seal_s = time.perf_counter() - began
    async with pool.connection() as connection:
        await connection.execute("analyze audit_seals")
    began = time.perf_counter()
    verdict = await AuditVerifier(chain=audit).verify()
    verify_s = time.perf_counter() - began
    if verdict.fault is not None or verdict.checked != ROWS:
        raise AssertionError(verdict)
    return {"seal_per_s": ROWS / seal_s, "verify_per_s": ROWS / verify_s}


def _measure(context: Context) -> Measurement:
    """The scenario: a database of its own, in a folder of its own."""

    async def main() -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="rdev-bench-") as folder:
            async with open_embedded(Path(folder)) as dsn:
                await trio.to_thread.run_sync(up, dsn)
                settings = ConnectionSettings(dsn=dsn, statement_timeout_ms=60_000)
                async with open_pool(settings, max_size=2) as pool:
                    for number in range(context.warm_ups + context.repetitions):
                        for name, value in (await _repetition(pool)).items():
                            if number >= context.warm_ups:
                                samples.setdefault(name, []).append(value)
        return samples

    return trio.run(main)


SCENARIO = Scenario(
    name="audit_verify",
    what="Sealing the audit log in batches, and verifying it; rows a second.",
    figures=(
        Figure(name="seal_per_s", unit="1/s"),
        Figure(name="verify_per_s", unit="1/s", at_least=TARGET_VERIFY_PER_S),
    ),
    measure=_measure,
)
