"""pgqueuer on asyncpg, its own API, an entrypoint of concurrency 1 for each project. Run by its own
interpreter: see `installed.py`.

`fill DSN WORK` makes the schema and queues the work, `run DSN WORK` measures and prints a result.
"""

import asyncio
import itertools
import json
import os
import sys
from datetime import timedelta
from importlib.metadata import version

import asyncpg
from counting import Count
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

BATCH = 5_000


async def _connect(dsn: str) -> asyncpg.Connection:
    given = dict(part.split("=", 1) for part in dsn.split())
    return await asyncpg.connect(
        host=given["host"], port=given["port"], user=given["user"], database=given["dbname"]
    )


async def _fill(dsn: str, work: dict[str, int]) -> None:
    connection = await _connect(dsn)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    names = [f"busy-{n % work['busy']}" for n in range(work["backlog"])]
    names += [f"project-{n % work['projects']}" for n in range(work["projects"] * work["each"])]
    each = iter(names)
    while batch := list(itertools.islice(each, BATCH)):
        await queries.enqueue(batch, [None] * len(batch), [0] * len(batch))
    await connection.execute("analyze")
    await connection.close()


async def _run(dsn: str, work: dict[str, int]) -> None:
    pgq = PgQueuer.from_asyncpg_connection(await _connect(dsn))
    count = Count()

    async def noop(job: Job) -> None:
        await count.run(job.entrypoint)

    async def hold(job: Job) -> None:
        await asyncio.sleep(3600)

    for number in range(work["projects"]):
        pgq.entrypoint(f"project-{number}", concurrency_limit=1)(noop)
    for number in range(work["busy"]):
        pgq.entrypoint(f"busy-{number}", concurrency_limit=1)(hold)
    worker = asyncio.create_task(
        pgq.run(batch_size=work["concurrency"], dequeue_timeout=timedelta(seconds=1))
    )
    found = await count.window(work)
    print(json.dumps(found | {"version": version("pgqueuer")}), flush=True)
    # Its shutdown waits for commands that never end.
    worker.cancel()
    os._exit(0)


if __name__ == "__main__":
    what = {"fill": _fill, "run": _run}[sys.argv[1]]
    asyncio.run(what(sys.argv[2], json.loads(sys.argv[3])))
