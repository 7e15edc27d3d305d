-- migrate:up
-- Who did what: an entry for each change, written in the statement that makes it, and for denials.
-- Entries are sealed a moment later, in the order (xid, id), below the snapshot's xmin: a seal's hash
-- chains the entry's bytes to the seal before it. Both tables are only ever inserted into.
create sequence audit_entry_ids;

create table audit_entries (
    day date not null default (now() at time zone 'utc')::date,
    id bigint not null default nextval('audit_entry_ids'),
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default clock_timestamp(),
    -- a key's id and name, or 'server' and the name of the server that did it by itself
    actor text not null,
    actor_name text not null,
    -- of the request; null where there was none
    ip text,
    request_id text,
    -- 'command.submitted' …
    action text not null,
    -- the id of what was changed
    target text not null,
    project text,
    -- 'ok' or 'denied'
    outcome text not null default 'ok',
    -- redacted
    detail jsonb not null default '{}',
    primary key (day, id)
) partition by range (day);

create table audit_seals (
    seq bigint primary key,
    day date not null,
    entry bigint not null unique,
    hash bytea not null
);

-- Makes the partitions of today and the days that follow; safe to call from many servers at once.
create function ensure_audit_partitions(days integer) returns void
language plpgsql as $$
declare
    first_day date := (now() at time zone 'utc')::date;
    partition_day date;
begin
    perform pg_advisory_xact_lock(hashtext('rdev.audit_partitions'));
    for offset_days in 0..days loop
        partition_day := first_day + offset_days;
        execute format(
            'create table if not exists %I partition of audit_entries for values from (%L) to (%L)',
            'audit_entries_' || to_char(partition_day, 'YYYYMMDD'), partition_day,
            partition_day + 1);
    end loop;
end
$$;

select ensure_audit_partitions(2);

-- migrate:down
drop table audit_seals;
drop table audit_entries;
drop function ensure_audit_partitions;
drop sequence audit_entry_ids;
