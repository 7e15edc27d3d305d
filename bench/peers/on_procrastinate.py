"""procrastinate, its own API, `lock` = project. Run by its own interpreter: see `installed.py`.

`fill DSN WORK` makes the schema and queues the work, `run DSN WORK` measures and prints a result.
"""

import asyncio
import json
import sys
from importlib.metadata import version

import procrastinate
from counting import Count

_INSERT = """
insert into procrastinate_jobs (queue_name, task_name, lock, args)
select 'default', case when %(backlog)s and n <= %(projects)s then 'hold' else 'noop' end,
       name, json_build_object('project', name)
from generate_series(1, %(count)s) n, concat(%(prefix)s::text, n %% %(projects)s) name
order by n
"""


async def _fill(dsn: str, work: dict[str, int]) -> None:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        sets = [("busy-", work["busy"], work["backlog"]), ("project-", work["projects"], 0)]
        for prefix, projects, backlog in sets:
            count = backlog if prefix == "busy-" else projects * work["each"]
            await app.connector.execute_query_async(
                _INSERT, prefix=prefix, projects=projects, count=count, backlog=backlog > 0
            )
        await app.connector.execute_query_async("analyze")


async def _run(dsn: str, work: dict[str, int]) -> None:
    connector = procrastinate.PsycopgConnector(conninfo=dsn, max_size=work["connections"])
    app = procrastinate.App(connector=connector)
    count = Count()

    @app.task(name="noop")
    async def noop(project: str) -> None:
        await count.run(project)

    @app.task(name="hold")
    async def hold(project: str) -> None:
        await asyncio.sleep(3600)

    async with app.open_async():
        worker = asyncio.create_task(
            app.run_worker_async(
                concurrency=work["concurrency"],
                install_signal_handlers=False,
                shutdown_graceful_timeout=0.1,
            )
        )
        found = await count.window(work)
        print(json.dumps(found | {"version": version("procrastinate")}), flush=True)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


if __name__ == "__main__":
    what = {"fill": _fill, "run": _run}[sys.argv[1]]
    asyncio.run(what(sys.argv[2], json.loads(sys.argv[3])))
