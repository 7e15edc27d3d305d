// graphile-worker, its own API, `queue_name` = project. See `installed.py`.
//
// `fill DSN WORK` makes the schema and queues the work, `run DSN WORK` measures and prints a result.
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_PREFIX, "package.json"));
const { Logger, run, runMigrations } = require("graphile-worker");
const { Pool } = require("pg");

const [, , what, dsn, json] = process.argv;
const work = JSON.parse(json);
const given = Object.fromEntries(dsn.split(" ").map((part) => part.split("=")));
const pool = new Pool({
  host: given.host,
  port: Number(given.port),
  user: given.user,
  database: given.dbname,
  max: work.connections,
});
pool.on("error", () => {});
// As with the others: what a worker would log is not written.
const logger = new Logger(() => () => {});
const sleep = (s) => new Promise((resolve) => setTimeout(resolve, s * 1000));

const ADD = `
select count(*) from graphile_worker.add_jobs((
  select array_agg((case when $3 and n <= $2 then 'hold' else 'noop' end, '{}'::json,
                    $1 || n % $2, null, null, null, null, null)::graphile_worker.job_spec order by n)
  from generate_series(1, $4::int) n))`;

async function fill() {
  await runMigrations({ pgPool: pool, logger });
  if (work.backlog) await pool.query(ADD, ["busy-", work.busy, true, work.backlog]);
  await pool.query(ADD, ["project-", work.projects, false, work.projects * work.each]);
  await pool.query("analyze");
  await pool.end();
}

async function measure() {
  const running = new Set();
  let done = 0;
  let overlaps = 0;
  const noop = async (_, helpers) => {
    const project = helpers.job.job_queue_id;
    if (running.has(project)) overlaps += 1;
    running.add(project);
    await new Promise((resolve) => setImmediate(resolve));
    running.delete(project);
    done += 1;
  };
  const hold = () => sleep(3600);
  await run({
    pgPool: pool,
    logger,
    noHandleSignals: true,
    taskList: { noop, hold },
    preset: { worker: { concurrentJobs: work.concurrency, ...work.graphile } },
  });
  const deadline = Date.now() + work.patience_s * 1000;
  while (!done && Date.now() < deadline) await sleep(0.01);
  await sleep(work.warm_s);
  const before = done;
  const began = process.hrtime.bigint();
  await sleep(work.window_s);
  const took_s = Number(process.hrtime.bigint() - began) / 1e9;
  const version = require("graphile-worker/package.json").version;
  process.stdout.write(
    JSON.stringify({ per_s: (done - before) / took_s, overlaps, version }) + "\n",
    () => process.exit(0),
  );
}

await (what === "fill" ? fill() : measure());
