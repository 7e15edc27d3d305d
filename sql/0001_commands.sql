-- migrate:up
create table projects (
    id text primary key,
    executor text not null,
    reach text not null,
    status text not null default 'ready',
    definition jsonb not null,
    created_at timestamptz not null default now()
);

create sequence lease_ids;

-- One row per command, kept for its whole history. The append statement updates it for every batch
-- of output, so its moving columns (offsets, last_seq, lease_until) are in no index: those updates
-- stay HOT.
create table commands (
    id uuid primary key,
    project text not null,
    kind text not null,
    lane_class text not null,
    status text not null,
    level smallint not null,
    reach text not null,
    retry text not null,
    key_id text not null,
    request_id text not null,
    argv jsonb not null,
    -- argv, environment and stdin; secrets, gone when the command ends
    spec bytea,
    -- the partition its events are in
    day date not null default (now() at time zone 'utc')::date,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    cancel_requested_at timestamptz,
    attempt integer not null default 0,
    lease_id bigint,
    lease_until timestamptz,
    holder text,
    instance text,
    last_seq bigint not null,
    out_offset bigint not null default 0,
    err_offset bigint not null default 0,
    dropped_bytes bigint not null default 0,
    late_bytes bigint not null default 0,
    exit_code integer,
    signal integer,
    reason text,
    duration_ms bigint,
    session_id text,
    usage jsonb,
    kill jsonb
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

create index commands_queued on commands (project, lane_class, level, created_at, id)
    where status = 'queued';
create index commands_running on commands (reach, id) where status = 'running';
create index commands_of_project on commands (project, id desc);

-- Events in chunks (not lines: 675,000 against 214,000 lines/s in), by day of the command's
-- creation; retention drops partitions.
create table output (
    day date not null,
    command_id uuid not null,
    first_seq bigint not null,
    last_seq bigint not null,
    source smallint not null,
    raw_bytes integer not null,
    payload bytea not null,
    primary key (day, command_id, first_seq)
) partition by range (day);
-- Kept as it is: compressing cost more than it saved on the way in (the rows are read back often).
alter table output alter payload set storage external;

-- Makes the partitions of today and the days that follow; safe to call from many servers at once.
create function ensure_output_partitions(days integer) returns void
language plpgsql as $$
declare
    first_day date := (now() at time zone 'utc')::date;
    partition_day date;
begin
    perform pg_advisory_xact_lock(hashtext('rdev.output_partitions'));
    for offset_days in 0..days loop
        partition_day := first_day + offset_days;
        execute format(
            'create table if not exists %I partition of output for values from (%L) to (%L)',
            'output_' || to_char(partition_day, 'YYYYMMDD'), partition_day, partition_day + 1);
    end loop;
end
$$;

select ensure_output_partitions(2);

-- migrate:down
drop table output;
drop function ensure_output_partitions;
drop table commands;
drop sequence lease_ids;
drop table projects;
