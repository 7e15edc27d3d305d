-- migrate:up
-- As before (0013), but for two things. `high` belongs to the statement that compares with it: read
-- before it, what another transaction entered in between counted as another cluster's, was sealed too
-- early, and what still ran below it was never sealed. And where the last sealed entry is gone, what is
-- sealed already is told from what is not by its seal, not by its place.
create or replace function seal_audit(
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
    -- The last sealed entry is not there: its day was dropped, or somebody deleted it.
    is_adrift boolean;
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
    is_adrift := base_seq is not null and base_xid is null;
    base_seq := coalesce(base_seq, 0);
    base_hash := coalesce(base_hash, decode(repeat('00', 32), 'hex'));
    base_day := coalesce(base_day, '-infinity');
    base_xid := coalesce(base_xid, '0');
    base_entry := coalesce(base_entry, 0);
    low := pg_snapshot_xmin(pg_current_snapshot());
    if base_xid >= low then
        -- Those of the other cluster first, so that the chain goes on from one of this.
        insert into audit_seals (seq, day, entry, hash)
        select base_seq + row_number() over w, day, id, audit_chain(bytes, base_hash) over w
        from (
            select e.day, e.id, e.xid, e.xid < (select pg_snapshot_xmax(pg_current_snapshot())) as is_own, audit_bytes(e) as bytes
            from audit_entries e
            where (e.xid < low or e.xid >= (select pg_snapshot_xmax(pg_current_snapshot())))
              and not exists (select from audit_seals s where s.entry = e.id)
            order by is_own, e.xid, e.id
            limit max_rows
        ) found
        window w as (order by is_own, xid, id rows unbounded preceding);
        get diagnostics sealed = row_count;
        if sealed < max_rows and not exists (
            select from audit_entries e
            where e.xid < (select pg_snapshot_xmax(pg_current_snapshot())) and not exists (
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
              and (e.xid < low and not is_adrift
                   or (e.xid < low or e.xid >= (select pg_snapshot_xmax(pg_current_snapshot())))
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
      and e.xid < (select pg_snapshot_xmax(pg_current_snapshot()))
    order by e.xid, e.id
    limit 1;
end
$$;

-- `create or replace` forgets it.
do $$
begin
    execute format('alter function seal_audit set search_path = %I, pg_temp', current_schema());
end
$$;

-- migrate:down
create or replace function seal_audit(
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

do $$
begin
    execute format('alter function seal_audit set search_path = %I, pg_temp', current_schema());
end
$$;
