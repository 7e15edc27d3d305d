-- migrate:up
-- The chain of the audit log, and who may touch what: the role that migrates owns everything, the role
-- that serves (`rdev_app`) may only add to the log.

-- What is sealed next, and where verification finds a seal's entry.
create index audit_entries_order on audit_entries (xid, id);
-- Where a day's seals are.
create index audit_seals_day on audit_seals (day, seq);

-- How long entries are kept at least. Only the owner changes it; a server may keep them longer.
create table audit_policy (
    is_one boolean primary key default true check (is_one),
    retention_days integer not null check (retention_days >= 1)
);
insert into audit_policy (retention_days) values (400);

-- Days that were dropped after their time, each with the entry that says so.
create table audit_drops (
    day date primary key,
    entry_day date not null,
    entry bigint not null
);

-- The bytes of an entry that are hashed: a version byte, then the fields as `record_send` writes them,
-- each with its type and length before it (docs/api/audit.md).
create function audit_bytes(e audit_entries) returns bytea
language sql stable parallel safe as $$
    select '\x01'::bytea || record_send(row(
        e.day, e.id, e.xid, e.at, e.actor, e.actor_name, e.ip, e.request_id, e.action, e.target,
        e.project, e.outcome, e.detail))
$$;

create function audit_link(state bytea, bytes bytea, before bytea) returns bytea
language sql immutable parallel safe as $$ select sha256(coalesce(state, before) || bytes) $$;

create aggregate audit_chain(bytes bytea, before bytea) (sfunc = audit_link, stype = bytea);

-- Seals at most `max_rows` entries in the order (xid, id), below the snapshot's xmin, behind what is
-- sealed; gives how many, how old in seconds the oldest is that is left, and the last seal. Null
-- counts: another server is at it.
--
-- Entries stand in the partition of the day their transaction began, so a day before the last seal's is
-- as far back as an entry can be. An `xid` at or above the snapshot's xmax was given out by another
-- cluster, from which this database was restored: then the order begins anew, which an entry tells.
create function seal_audit(
    max_rows integer, out sealed integer, out lag_s double precision, out last_seq bigint,
    out last_hash bytea
)
language plpgsql as $$
declare
    base_seq bigint := 0;
    base_hash bytea := decode(repeat('00', 32), 'hex');
    base_day date := '-infinity';
    base_xid xid8 := '0';
    base_entry bigint := 0;
    low xid8;
    high xid8;
begin
    if not pg_try_advisory_xact_lock(hashtextextended('rdev.audit_seals', 0)) then
        return;
    end if;
    select s.seq, s.hash, s.day, e.xid, s.entry
    into base_seq, base_hash, base_day, base_xid, base_entry
    from audit_seals s
    left join audit_entries e on e.day = s.day and e.id = s.entry
    order by s.seq desc
    limit 1;
    base_seq := coalesce(base_seq, 0);
    base_hash := coalesce(base_hash, decode(repeat('00', 32), 'hex'));
    base_day := coalesce(base_day, '-infinity');
    base_xid := coalesce(base_xid, '0');
    base_entry := coalesce(base_entry, 0);
    low := pg_snapshot_xmin(pg_current_snapshot());
    high := pg_snapshot_xmax(pg_current_snapshot());
    if base_xid >= low then
        -- Those of the other cluster first, so that the chain goes on from one of this.
        insert into audit_seals (seq, day, entry, hash)
        select base_seq + row_number() over w, day, id, audit_chain(bytes, base_hash) over w
        from (
            select e.day, e.id, e.xid, e.xid < high as is_own, audit_bytes(e) as bytes
            from audit_entries e
            where (e.xid < low or e.xid >= high)
              and not exists (select from audit_seals s where s.entry = e.id)
            order by is_own, e.xid, e.id
            limit max_rows
        ) found
        window w as (order by is_own, xid, id rows unbounded preceding);
        get diagnostics sealed = row_count;
        if sealed < max_rows and not exists (
            select from audit_entries e
            where e.xid < high and not exists (
                select from audit_seals s where s.entry = e.id and s.seq <= base_seq)
        ) then
            insert into audit_entries (actor, actor_name, action, target, detail)
            values ('server', 'server', 'audit.resumed', 'audit',
                    jsonb_build_object('after_seq', base_seq));
        end if;
    else
        insert into audit_seals (seq, day, entry, hash)
        select base_seq + row_number() over w, day, id, audit_chain(bytes, base_hash) over w
        from (
            select e.day, e.id, e.xid, audit_bytes(e) as bytes
            from audit_entries e
            where e.day >= base_day - 1
              and (e.xid, e.id) > (base_xid, base_entry)
              and (e.xid < low
                   or e.xid >= high
                      and not exists (select from audit_seals s where s.entry = e.id))
            order by e.xid, e.id
            limit max_rows
        ) found
        window w as (order by xid, id rows unbounded preceding);
        get diagnostics sealed = row_count;
    end if;
    select s.seq, s.hash, s.day, e.xid, s.entry
    into last_seq, last_hash, base_day, base_xid, base_entry
    from audit_seals s
    join audit_entries e on e.day = s.day and e.id = s.entry
    order by s.seq desc
    limit 1;
    select extract(epoch from clock_timestamp() - e.at)::float8 into lag_s
    from audit_entries e
    where e.day >= coalesce(base_day, '-infinity') - 1
      and (e.xid, e.id) > (coalesce(base_xid, '0'), coalesce(base_entry, 0))
      and e.xid < high
    order by e.xid, e.id
    limit 1;
end
$$;

-- Drops a day's partition, and with it the seals at the beginning of the chain whose entries are all
-- gone, except the last of them: the chain hangs on that. Refuses a day that is younger than the policy
-- says or of which something is not sealed. False: there is no such day.
create function drop_audit_day(old_day date, keep_days integer) returns boolean
language plpgsql as $$
declare
    place regclass := to_regclass(format('%I', 'audit_entries_' || to_char(old_day, 'YYYYMMDD')));
    entries bigint;
    unsealed bigint;
    anchor audit_seals;
    made audit_entries;
begin
    if place is null then
        return false;
    end if;
    if old_day >= (now() at time zone 'utc')::date
                  - greatest(keep_days, (select retention_days from audit_policy)) then
        raise exception 'audit entries of % are younger than their retention', old_day
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    select count(*), count(*) filter (where s.entry is null) into entries, unsealed
    from audit_entries e
    left join audit_seals s on s.entry = e.id and s.day = e.day
    where e.day = old_day;
    if unsealed > 0 then
        raise exception '% audit entries of % are not sealed', unsealed, old_day
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform pg_advisory_xact_lock(hashtextextended('rdev.audit_seals', 0));
    execute format('drop table %s', place);
    select * into anchor
    from audit_seals
    where seq < (
        select s.seq from audit_seals s
        where exists (select from audit_entries e where e.day = s.day and e.id = s.entry)
        order by s.seq
        limit 1)
    order by seq desc
    limit 1;
    insert into audit_entries (actor, actor_name, action, target, detail)
    values ('server', 'server', 'audit.day_dropped', old_day::text,
            jsonb_build_object('entries', entries, 'anchor_seq', anchor.seq,
                               'anchor_hash', encode(anchor.hash, 'hex')))
    returning * into made;
    insert into audit_drops (day, entry_day, entry) values (old_day, made.day, made.id);
    delete from audit_seals where seq < anchor.seq;
    return true;
end
$$;

-- Output's days are dropped by a function too: only the owner of a table may drop it.
create function drop_output_day(old_day date) returns void
language plpgsql as $$
begin
    execute format('drop table if exists %I', 'output_' || to_char(old_day, 'YYYYMMDD'));
end
$$;

-- A partition is reached through its table; nobody but the owner needs it by its own name.
create or replace function ensure_audit_partitions(days integer) returns void
language plpgsql as $$
declare
    first_day date := (now() at time zone 'utc')::date;
    partition_day date;
    place text;
    grantee regrole;
begin
    perform pg_advisory_xact_lock(hashtext('rdev.audit_partitions'));
    for offset_days in 0..days loop
        partition_day := first_day + offset_days;
        place := format('%I', 'audit_entries_' || to_char(partition_day, 'YYYYMMDD'));
        if to_regclass(place) is null then
            execute format(
                'create table %s partition of audit_entries for values from (%L) to (%L)',
                place, partition_day, partition_day + 1);
            for grantee in
                select distinct a.grantee::regrole
                from pg_class c, aclexplode(c.relacl) a
                where c.oid = place::regclass and a.grantee not in (c.relowner, 0)
            loop
                execute format('revoke all on table %s from %s', place, grantee);
            end loop;
        end if;
    end loop;
end
$$;

-- What makes or drops tables runs as their owner, whoever calls it, with the schema of its own time.
do $$
declare
    one regprocedure;
begin
    for one in
        select p.oid::regprocedure from pg_proc p
        where p.pronamespace = current_schema()::regnamespace
          and (p.proname ~ '^ensure_.*_partitions$'
               or p.proname in ('drop_audit_day', 'drop_output_day', 'seal_audit'))
    loop
        execute format('alter function %s set search_path = %I, pg_temp', one, current_schema());
        if one::text !~ 'seal_audit' then
            execute format('alter function %s security definer', one);
            execute format('revoke execute on function %s from public', one);
        end if;
    end loop;
end
$$;

-- Gives a role what a server needs: everything but the schema's shape, and of the audit log only
-- reading and adding. For the owner to call; again is fine. What later migrations make is granted too,
-- as far as the role that calls this makes it.
create function grant_to_server(server name) returns void
language plpgsql as $$
declare
    place text := quote_ident(current_schema());
    one regclass;
begin
    execute format('grant usage on schema %s to %I', place, server);
    execute format('grant select, insert, update, delete on all tables in schema %s to %I', place, server);
    execute format('grant usage, select on all sequences in schema %s to %I', place, server);
    execute format('grant execute on all functions in schema %s to %I', place, server);
    execute format('revoke all on function grant_to_server from %I', server);
    execute format('alter default privileges in schema %s grant select, insert, update, delete on tables to %I', place, server);
    execute format('alter default privileges in schema %s grant usage, select on sequences to %I', place, server);
    execute format('alter default privileges in schema %s grant execute on functions to %I', place, server);
    for one in
        select c.oid::regclass from pg_class c
        where c.relnamespace = current_schema()::regnamespace and c.relkind in ('r', 'p')
          and c.relname ~ '^(audit_.*|schema_migrations)$'
    loop
        execute format('revoke all on table %s from %I', one, server);
    end loop;
    execute format('grant select, insert on audit_entries, audit_seals to %I', server);
    execute format('grant select on audit_policy, audit_drops, schema_migrations to %I', server);
end
$$;
revoke execute on function grant_to_server from public;

-- The role that serves: made where this role may make roles, granted where it is there. Elsewhere
-- nothing happens, and the server goes on as the owner (docs/operations/audit.md).
do $$
begin
    if to_regrole('rdev_app') is null
       and (select rolsuper or rolcreaterole from pg_roles where rolname = current_user) then
        begin
            create role rdev_app nologin;
        exception when duplicate_object or unique_violation then
            null; -- another database of this cluster was migrated at the same time
        end;
    end if;
    if to_regrole('rdev_app') is not null then
        perform grant_to_server('rdev_app');
    else
        raise notice 'there is no role rdev_app: the server may change the audit log';
    end if;
end
$$;

-- migrate:down
-- The role stays: it is of the whole cluster.
do $$
begin
    if to_regrole('rdev_app') is not null then
        execute format('revoke all on all tables in schema %I from rdev_app', current_schema());
        execute format('revoke all on all sequences in schema %I from rdev_app', current_schema());
        execute format('revoke all on all functions in schema %I from rdev_app', current_schema());
        execute format('revoke all on schema %I from rdev_app', current_schema());
        execute format('alter default privileges in schema %I revoke all on tables from rdev_app', current_schema());
        execute format('alter default privileges in schema %I revoke all on sequences from rdev_app', current_schema());
        execute format('alter default privileges in schema %I revoke all on functions from rdev_app', current_schema());
    end if;
end
$$;
create or replace function ensure_audit_partitions(days integer) returns void
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
alter function ensure_audit_partitions reset search_path;
alter function ensure_output_partitions reset search_path security invoker;
grant execute on function ensure_audit_partitions, ensure_output_partitions to public;
drop function grant_to_server;
drop function drop_output_day;
drop function drop_audit_day;
drop function seal_audit;
drop aggregate audit_chain(bytea, bytea);
drop function audit_link;
drop function audit_bytes;
drop table audit_drops;
drop table audit_policy;
drop index audit_seals_day;
drop index audit_entries_order;
