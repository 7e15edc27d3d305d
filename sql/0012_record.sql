-- migrate:up
-- Every statement that changes a command says so in the same statement, in `events` (what happened)
-- and in `audit_entries` (who did it). No triggers: claims and appends are batches, and an append that
-- only brings output writes nothing more than before. `xid` of both is the command's `changed_xid`,
-- which the change sets to the greater of its own transaction and what it was: see 0009.

-- The wire form of a command's id.
create function command_name(id uuid) returns text
language sql immutable parallel safe as $$ select 'cmd_' || encode(uuid_send(id), 'hex') $$;

-- What the change to a status is called.
create function event_type(status text) returns text
language sql immutable parallel safe as
$$
    select 'command.' || case status when 'running' then 'started'
                                     when 'succeeded' then 'completed' else status end
$$;

-- What the end of a command says that ended before (or between) its attempts.
create function ended_unstarted(reason text) returns jsonb
language sql stable parallel safe as
$$
    select jsonb_build_object('reason', reason, 'exit_code', null, 'signal', null,
                              'duration_ms', null, 'truncated', false,
                              'stdout_bytes', 0, 'stderr_bytes', 0)
$$;

-- The `xid` of the newest event of the project's own.
alter table projects add column changed_xid xid8 not null default pg_current_xact_id();

drop function expire_command(uuid, bytea);

-- As before (0002), with its record. `in_holder`: the server that does it.
create function expire_command(
    command_id uuid, events bytea, in_holder text default 'unknown'
) returns void
language sql as $$
    with ended as (
        update commands
        set status = 'expired', reason = 'expired', finished_at = clock_timestamp(), spec = null,
            last_seq = last_seq + 2,
            changed_xid = greatest(pg_current_xact_id(), changed_xid)
        where id = command_id and status = 'queued'
        returning day, id, project, kind, status, attempt, last_seq, changed_xid
    ), event as (
        insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
        select day, id, last_seq - 1, last_seq, 0, 0, events from ended
    ), change as (
        insert into events (xid, type, project, command_id, kind, status, attempt, seq, detail)
        select changed_xid, 'command.expired', project, id, kind, status, attempt, last_seq,
               ended_unstarted('expired')
        from ended
    )
    insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
    select changed_xid, 'server', in_holder, 'command.expired', command_name(id), project,
           jsonb_build_object('kind', kind, 'status', status, 'attempt', attempt)
    from ended
$$;

drop function claim_commands(
    text, text, text, double precision, double precision, integer, bytea, bytea, text[], text[]);

-- The heads of lanes in the order of `due`, and the expired ones that were found before them (ended
-- here, at most 100 of a lane at once). What is claimed does not expire any more, and its event says
-- which attempt it is (`running_event` is that of the attempt 0). `touched_*` name the lanes to touch
-- first: where those stand is known when they are compared, the others stand where their hint says.
-- Lanes of `closed_projects` are passed by: they keep their place, and take none of the others'.
--
-- Every statement in here has a snapshot of its own: what is read under a lane's lock is the truth
-- about the lane, because only claims make commands of a lane run. A head is not locked when it is
-- looked at: one that is cancelled meanwhile is not updated, and its lane is looked at again. Lock
-- order: touched lanes in order of their key, then lanes without waiting, then commands.
create function claim_commands(
    in_reach text, in_holder text, in_instance text, lease_s double precision,
    age_step_s double precision, max_commands integer, running_event bytea, expired_events bytea,
    touched_projects text[] default '{}', touched_classes text[] default '{}',
    closed_projects text[] default '{}'
) returns setof commands
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
    touched tid[] := '{}';
    places tid[];
    -- Lanes that stand behind it may not be taken: others may come before them.
    horizon double precision;
    lane record;
    expired commands;
    heads uuid[];
    head_places tid[];
    head_rooms boolean[];
    head_dues double precision[];
    moved_places tid[];
    moved_dues double precision[];
    served_at double precision;
    ended integer := 0;
    taken integer := 0;
    began integer;
    look_again boolean;
begin
    if cardinality(touched_projects) > 0 then
        select coalesce(array_agg(t.place), '{}') into touched
        from (
            select * from unnest(touched_projects, touched_classes) k (project, lane_class)
            order by k.project, k.lane_class
        ) k
        cross join lateral (
            select l.ctid as place from lanes l
            where l.project = k.project and l.lane_class = k.lane_class
            for update
        ) t;
    end if;
    loop
        select array_agg(t.place) filter (where t.place <> all (touched)),
               case when count(*) = max_commands - taken then max(t.due) else 'infinity' end
        into places, horizon
        from (
            select l.ctid as place, l.due from lanes l
            where l.reach = in_reach and l.due is not null
              and l.project <> all (closed_projects)
            order by l.due
            limit max_commands - taken
            for update skip locked
        ) t;
        exit when places is null and cardinality(touched) = 0;
        heads := '{}'; head_places := '{}'; head_rooms := '{}'; head_dues := '{}';
        moved_places := '{}'; moved_dues := '{}';
        began := 0;
        look_again := false;
        for lane in
            select s.*, case when s.is_touched then s.exact else s.due end as stands_at
            from (
                select l.ctid as place, l.project, l.lane_class, l.reach, l.due, p.is_touched,
                       first.id as head,
                       r.running < l.cap
                           and coalesce(first.expires_at <= clock_timestamp(), false) as is_late,
                       r.running + 1 < l.cap as has_more_room,
                       l.project = any (closed_projects) as is_closed,
                       case when r.running < l.cap
                            then lane_due(first.rank, l.last_start, first.level, age_step_s)
                       end as exact
                from (
                    select unnest(touched) as place, true as is_touched
                    union all
                    select unnest(places), false
                ) p
                join lanes l on l.ctid = p.place
                left join lateral (
                    select c.id, c.rank, c.level, c.expires_at from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1
                ) first on true
                cross join lateral (
                    select count(*) as running from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'running' and first.id is not null
                ) r
            ) s
            order by stands_at
        loop
            if lane.is_late then
                -- What it stands for is over: look again who comes first.
                for number in 1..100 loop
                    select c.* into expired from commands c
                    where c.project = lane.project and c.lane_class = lane.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1
                    for update;
                    exit when not found
                        or expired.expires_at is null or expired.expires_at > clock_timestamp();
                    perform expire_command(expired.id, expired_events, in_holder);
                    expired.status := 'expired';
                    expired.spec := null;
                    return next expired;
                    ended := ended + 1;
                end loop;
            elsif lane.exact <= least(lane.stands_at, horizon) and lane.reach = in_reach
                and not lane.is_closed and taken + cardinality(heads) < max_commands then
                heads := heads || lane.head;
                head_places := head_places || lane.place;
                head_rooms := head_rooms || lane.has_more_room;
                head_dues := head_dues || lane.exact;
                continue;
            end if;
            -- Parked, too early (look again who comes first), or touched and not to be served now;
            -- which may have kept the place of another one among those that were looked at. (A
            -- closed one never does.)
            look_again := look_again or not lane.is_closed and (
                not lane.is_touched or lane.is_late
                or horizon < 'infinity' and coalesce(lane.due <= horizon, false));
            if lane.exact is distinct from lane.due then
                moved_places := moved_places || lane.place;
                moved_dues := moved_dues || lane.exact;
            end if;
        end loop;
        touched := '{}';
        if cardinality(moved_places) > 0 then
            -- By place, which the lock keeps: under a held snapshot the key leads through every
            -- version of the row since.
            update lanes l
            set due = m.due
            from unnest(moved_places, moved_dues) m (place, due)
            where l.ctid = m.place;
        end if;
        if cardinality(heads) > 0 then
            -- By the primary key: `status || ''` keeps the planner from the index of queued commands,
            -- which beside an old snapshot holds all that were ever queued.
            return query
            with begun as (
                update commands c
                set status = 'running',
                    attempt = c.attempt + 1,
                    expires_at = null,
                    last_seq = c.last_seq + 1,
                    started_at = clock_timestamp(),
                    instance = in_instance,
                    lease_id = nextval('lease_ids'),
                    lease_until = clock_timestamp() + make_interval(secs => lease_s),
                    holder = in_holder,
                    changed_xid = greatest(pg_current_xact_id(), c.changed_xid)
                where c.id = any (heads) and c.status || '' = 'queued'
                returning c.*
            ), event as (
                insert into output
                    (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
                select b.day, b.id, b.last_seq, b.last_seq, 0, 0,
                       of_attempt(running_event, b.attempt)
                from begun b
            ), change as (
                insert into events
                    (xid, type, project, command_id, kind, status, attempt, seq)
                select b.changed_xid, 'command.started', b.project, b.id, b.kind, b.status,
                       b.attempt, b.last_seq
                from begun b
            ), entry as (
                insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
                select b.changed_xid, 'server', in_holder, 'command.started', command_name(b.id),
                       b.project, jsonb_build_object('kind', b.kind, 'attempt', b.attempt)
                from begun b
            )
            select * from begun;
            get diagnostics began = row_count;
            taken := taken + began;
            if began < cardinality(heads) then
                -- Their heads were cancelled meanwhile: too early in the order, they are looked at
                -- again. (A touched lane may have stood nowhere in it.)
                update lanes l
                set due = m.due
                from unnest(head_places, head_dues, heads) m (place, due, head)
                where l.ctid = m.place
                  and (select c.status from commands c where c.id = m.head) <> 'running';
            end if;
            -- A microsecond apart, so that they keep their order when they come again.
            served_at := extract(epoch from clock_timestamp());
            update lanes l
            set last_start = served_at + m.number * 1e-6,
                due = case when m.has_more_room then (
                    select lane_due(c.rank, served_at + m.number * 1e-6, c.level, age_step_s)
                    from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1) end
            from unnest(head_places, head_rooms, heads) with ordinality
                 m (place, has_more_room, head, number)
            where l.ctid = m.place
              and (began = cardinality(heads)
                   or (select c.status from commands c where c.id = m.head) = 'running');
        end if;
        exit when taken >= max_commands or ended >= 1000
            or not look_again and began = cardinality(heads);
    end loop;
    if taken + ended = 0 then
        -- Only hints: what is lost the tick repairs, so the commit need not reach the disk.
        perform set_config('synchronous_commit', 'off', true);
    end if;
end
$$;

-- As before (0006), with its record: what the project's status became, and whose command made it so.
-- `rdev.holder` names the server where it is not the command's holder.
create or replace function heed_kill() returns trigger
language plpgsql as $$
declare
    next_status text;
    changed xid8;
begin
    perform from projects where id = new.project for update;
    perform from lanes where project = new.project order by lane_class for update;
    if exists (select from commands c
               where c.reach = new.reach and c.kill ->> 'confirmed' = 'false'
                 and c.project = new.project) then
        next_status := 'failed';
        update lanes set cap = -cap, due = null where project = new.project and cap > 0;
    else
        next_status := 'ready';
        update lanes set cap = -cap where project = new.project and cap < 0;
    end if;
    update projects
    set status = next_status, changed_xid = greatest(pg_current_xact_id(), changed_xid)
    where id = new.project
      and status = case next_status when 'failed' then 'ready' else 'failed' end
    returning changed_xid into changed;
    if found then
        insert into events (xid, type, project, status, detail)
        values (changed, 'project.status', new.project, next_status,
                jsonb_build_object('command_id', command_name(new.id)));
        insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
        values (changed, 'server',
                coalesce(nullif(current_setting('rdev.holder', true), ''), new.holder, 'unknown'),
                'project.status', new.project, new.project,
                jsonb_build_object('status', next_status, 'command_id', command_name(new.id)));
    end if;
    return null;
end
$$;

-- migrate:down
create or replace function heed_kill() returns trigger
language plpgsql as $$
begin
    perform from projects where id = new.project for update;
    perform from lanes where project = new.project order by lane_class for update;
    if exists (select from commands c
               where c.reach = new.reach and c.kill ->> 'confirmed' = 'false'
                 and c.project = new.project) then
        update projects set status = 'failed' where id = new.project and status = 'ready';
        update lanes set cap = -cap, due = null where project = new.project and cap > 0;
    else
        update projects set status = 'ready' where id = new.project and status = 'failed';
        update lanes set cap = -cap where project = new.project and cap < 0;
    end if;
    return null;
end
$$;

drop function claim_commands(
    text, text, text, double precision, double precision, integer, bytea, bytea, text[], text[],
    text[]);

create function claim_commands(
    in_reach text, in_holder text, in_instance text, lease_s double precision,
    age_step_s double precision, max_commands integer, running_event bytea, expired_events bytea,
    touched_projects text[] default '{}', touched_classes text[] default '{}'
) returns setof commands
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
    touched tid[] := '{}';
    places tid[];
    -- Lanes that stand behind it may not be taken: others may come before them.
    horizon double precision;
    lane record;
    expired commands;
    heads uuid[];
    head_places tid[];
    head_rooms boolean[];
    head_dues double precision[];
    moved_places tid[];
    moved_dues double precision[];
    served_at double precision;
    ended integer := 0;
    taken integer := 0;
    began integer;
    look_again boolean;
begin
    if cardinality(touched_projects) > 0 then
        select coalesce(array_agg(t.place), '{}') into touched
        from (
            select * from unnest(touched_projects, touched_classes) k (project, lane_class)
            order by k.project, k.lane_class
        ) k
        cross join lateral (
            select l.ctid as place from lanes l
            where l.project = k.project and l.lane_class = k.lane_class
            for update
        ) t;
    end if;
    loop
        select array_agg(t.place) filter (where t.place <> all (touched)),
               case when count(*) = max_commands - taken then max(t.due) else 'infinity' end
        into places, horizon
        from (
            select l.ctid as place, l.due from lanes l
            where l.reach = in_reach and l.due is not null
            order by l.due
            limit max_commands - taken
            for update skip locked
        ) t;
        exit when places is null and cardinality(touched) = 0;
        heads := '{}'; head_places := '{}'; head_rooms := '{}'; head_dues := '{}';
        moved_places := '{}'; moved_dues := '{}';
        began := 0;
        look_again := false;
        for lane in
            select s.*, case when s.is_touched then s.exact else s.due end as stands_at
            from (
                select l.ctid as place, l.project, l.lane_class, l.reach, l.due, p.is_touched,
                       first.id as head,
                       r.running < l.cap
                           and coalesce(first.expires_at <= clock_timestamp(), false) as is_late,
                       r.running + 1 < l.cap as has_more_room,
                       case when r.running < l.cap
                            then lane_due(first.rank, l.last_start, first.level, age_step_s)
                       end as exact
                from (
                    select unnest(touched) as place, true as is_touched
                    union all
                    select unnest(places), false
                ) p
                join lanes l on l.ctid = p.place
                left join lateral (
                    select c.id, c.rank, c.level, c.expires_at from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1
                ) first on true
                cross join lateral (
                    select count(*) as running from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'running' and first.id is not null
                ) r
            ) s
            order by stands_at
        loop
            if lane.is_late then
                -- What it stands for is over: look again who comes first.
                for number in 1..100 loop
                    select c.* into expired from commands c
                    where c.project = lane.project and c.lane_class = lane.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1
                    for update;
                    exit when not found
                        or expired.expires_at is null or expired.expires_at > clock_timestamp();
                    perform expire_command(expired.id, expired_events);
                    expired.status := 'expired';
                    expired.spec := null;
                    return next expired;
                    ended := ended + 1;
                end loop;
            elsif lane.exact <= least(lane.stands_at, horizon) and lane.reach = in_reach
                and taken + cardinality(heads) < max_commands then
                heads := heads || lane.head;
                head_places := head_places || lane.place;
                head_rooms := head_rooms || lane.has_more_room;
                head_dues := head_dues || lane.exact;
                continue;
            end if;
            -- Parked, too early (look again who comes first), or touched and not to be served now;
            -- which may have kept the place of another one among those that were looked at.
            look_again := look_again or not lane.is_touched or lane.is_late
                or horizon < 'infinity' and coalesce(lane.due <= horizon, false);
            if lane.exact is distinct from lane.due then
                moved_places := moved_places || lane.place;
                moved_dues := moved_dues || lane.exact;
            end if;
        end loop;
        touched := '{}';
        if cardinality(moved_places) > 0 then
            -- By place, which the lock keeps: under a held snapshot the key leads through every
            -- version of the row since.
            update lanes l
            set due = m.due
            from unnest(moved_places, moved_dues) m (place, due)
            where l.ctid = m.place;
        end if;
        if cardinality(heads) > 0 then
            -- By the primary key: `status || ''` keeps the planner from the index of queued commands,
            -- which beside an old snapshot holds all that were ever queued.
            return query
            with begun as (
                update commands c
                set status = 'running',
                    attempt = c.attempt + 1,
                    expires_at = null,
                    last_seq = c.last_seq + 1,
                    started_at = clock_timestamp(),
                    instance = in_instance,
                    lease_id = nextval('lease_ids'),
                    lease_until = clock_timestamp() + make_interval(secs => lease_s),
                    holder = in_holder
                where c.id = any (heads) and c.status || '' = 'queued'
                returning c.*
            ), event as (
                insert into output
                    (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
                select b.day, b.id, b.last_seq, b.last_seq, 0, 0,
                       of_attempt(running_event, b.attempt)
                from begun b
            )
            select * from begun;
            get diagnostics began = row_count;
            taken := taken + began;
            if began < cardinality(heads) then
                -- Their heads were cancelled meanwhile: too early in the order, they are looked at
                -- again. (A touched lane may have stood nowhere in it.)
                update lanes l
                set due = m.due
                from unnest(head_places, head_dues, heads) m (place, due, head)
                where l.ctid = m.place
                  and (select c.status from commands c where c.id = m.head) <> 'running';
            end if;
            -- A microsecond apart, so that they keep their order when they come again.
            served_at := extract(epoch from clock_timestamp());
            update lanes l
            set last_start = served_at + m.number * 1e-6,
                due = case when m.has_more_room then (
                    select lane_due(c.rank, served_at + m.number * 1e-6, c.level, age_step_s)
                    from commands c
                    where c.project = l.project and c.lane_class = l.lane_class
                      and c.status = 'queued'
                    order by c.rank, c.id
                    limit 1) end
            from unnest(head_places, head_rooms, heads) with ordinality
                 m (place, has_more_room, head, number)
            where l.ctid = m.place
              and (began = cardinality(heads)
                   or (select c.status from commands c where c.id = m.head) = 'running');
        end if;
        exit when taken >= max_commands or ended >= 1000
            or not look_again and began = cardinality(heads);
    end loop;
    if taken + ended = 0 then
        -- Only hints: what is lost the tick repairs, so the commit need not reach the disk.
        perform set_config('synchronous_commit', 'off', true);
    end if;
end
$$;

drop function expire_command(uuid, bytea, text);

create function expire_command(command_id uuid, events bytea) returns void
language sql as $$
    with ended as (
        update commands
        set status = 'expired', reason = 'expired', finished_at = clock_timestamp(), spec = null,
            last_seq = last_seq + 2
        where id = command_id and status = 'queued'
        returning day, id, last_seq
    )
    insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
    select day, id, last_seq - 1, last_seq, 0, 0, events from ended
$$;

alter table projects drop column changed_xid;
drop function ended_unstarted;
drop function event_type;
drop function command_name;
