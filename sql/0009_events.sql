-- migrate:up
-- What happened to commands and projects: one row for each change of status, written in the statement
-- that makes the change. The feeds read it, and webhooks are told from it.
--
-- The order is (xid, position), and only rows below `pg_snapshot_xmin` are read: every transaction
-- below it has ended, so nothing can become visible before what was read. `xid` is the writer's own
-- transaction, or the one of the command's change before where that is the greater (a claim that took
-- its number before the insert it found): so the changes of one command stand in their order.
-- `position` orders the rows of one xid; it was drawn after everything its writer had seen.

-- The database's UUIDv7: the clock's milliseconds, then chance.
create function uuid7() returns uuid
language sql volatile parallel safe as $$
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint)
                                      from 3)
                    from 1 for 6),
            52, 1), 53, 1),
        'hex')::uuid
$$;

create table events (
    xid xid8 not null,
    position bigint generated always as identity,
    id uuid not null default uuid7(),
    at timestamptz not null default clock_timestamp(),
    -- 'command.queued' …, 'project.status'
    type text not null,
    project text not null,
    -- null: the project's own
    command_id uuid,
    kind text,
    status text not null,
    attempt integer,
    -- the number, in the command's own stream, of the event that tells the same
    seq bigint,
    -- what else a command's `status` or `complete` says: `reason`, and of an end `exit_code`, `signal`,
    -- `duration_ms`, `truncated`, `stdout_bytes`, `stderr_bytes`
    detail jsonb not null default '{}',
    primary key (xid, position)
);

-- The feed of one project, and the housekeeper's deletion of old rows.
create index events_of_project on events (project, xid, position);
create index events_at on events using brin (at);

-- The `xid` of the command's newest event.
alter table commands add column changed_xid xid8 not null default pg_current_xact_id();

-- migrate:down
alter table commands drop column changed_xid;
drop table events;
drop function uuid7;
