-- migrate:up
-- What a client's idempotency key stands for: stored in the transaction that makes it. `digest` is
-- the SHA-256 of method, path and body; `made` the id of a command or a project.
create table idempotency_keys (
    key_id text not null,
    key text not null,
    digest bytea not null,
    made text not null,
    made_at timestamptz not null default now(),
    primary key (key_id, key)
);

-- The housekeeper's deletion of old keys.
create index idempotency_keys_made_at on idempotency_keys (made_at);

-- The housekeeper's walks over what has ended: tidied soon after, pruned when it is old. Written once
-- for each command, with its end (which is no HOT update anyway, since it leaves a partial index).
create index commands_finished on commands (reach, finished_at) where finished_at is not null;

-- How far the folders of ended commands are tidied, for each reach.
create table tidied (
    reach text primary key,
    until timestamptz not null,
    command uuid not null
);

-- migrate:down
drop table tidied;
drop index commands_finished;
drop table idempotency_keys;
