-- migrate:up
-- As before (0004), in fewer statements: what a claim does for each lane it now does for all of them
-- at once, and it touches lanes on the way, so that what was submitted or has ended a moment ago is
-- taken without being written into the order of lanes and out of it again. (Those entries, of which
-- an old snapshot keeps every one, were what made claims slow beside it.)

-- As before, in a form that is inlined (a strict one with `greatest` is not).
create or replace function lane_due(
    head_rank double precision, last_start double precision, head_level integer,
    age_step_s double precision
) returns double precision
language sql immutable parallel safe as
$$
    select case when head_rank is not null
                then greatest(head_rank, last_start - head_level * age_step_s) end
$$;

drop function claim_commands(
    text, text, text, double precision, double precision, integer, bytea, bytea);

-- The heads of lanes in the order of `due`, and the expired ones that were found before them (ended
-- here, at most 100 of a lane at once). What is claimed does not expire any more, and its event says
-- which attempt it is (`running_event` is that of the attempt 0). `touched_*` name the lanes to touch
-- first: where those stand is known when they are compared, the others stand where their hint says.
--
-- Every statement in here has a snapshot of its own: what is read under a lane's lock is the truth
-- about the lane, because only claims make commands of a lane run. A head is not locked when it is
-- looked at: one that is cancelled meanwhile is not updated, and its lane is looked at again. Lock
-- order: touched lanes in order of their key, then lanes without waiting, then commands.
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

-- migrate:down
create or replace function lane_due(
    head_rank double precision, last_start double precision, head_level integer,
    age_step_s double precision
) returns double precision
language sql immutable strict parallel safe as
$$ select greatest(head_rank, last_start - head_level * age_step_s) $$;

drop function claim_commands(
    text, text, text, double precision, double precision, integer, bytea, bytea, text[], text[]);

-- As before, but the event says which attempt it is, and what was claimed does not expire any more.
-- (`running_event` is that of the attempt 0.)
create or replace function claim_commands(
    in_reach text, in_holder text, in_instance text, lease_s double precision,
    age_step_s double precision, max_commands integer, running_event bytea, expired_events bytea
) returns setof commands
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    lanes_in_order cursor for
        select * from lanes
        where reach = in_reach and due is not null
        order by due
        for update skip locked;
    head commands;
    next_due double precision;
    running integer;
    served_at double precision;
    taken integer := 0;
    stood_too_early boolean;
begin
    loop
        stood_too_early := false;
        for lane in lanes_in_order loop
            head := null;
            served_at := lane.last_start;
            select count(*) into running from commands
            where project = lane.project and lane_class = lane.lane_class and status = 'running';
            if running < lane.cap then
                for expired in 1..100 loop
                    select * into head from commands
                    where project = lane.project and lane_class = lane.lane_class
                      and status = 'queued'
                    order by rank, id
                    limit 1
                    for update;
                    exit when not found
                        or head.expires_at is null or head.expires_at > clock_timestamp();
                    perform expire_command(head.id, expired_events);
                    head.status := 'expired';
                    head.spec := null;
                    return next head;
                    head := null;
                end loop;
            end if;
            next_due := lane_due(head.rank, lane.last_start, head.level, age_step_s);
            if next_due > lane.due then
                -- It stood there for a head that is gone: look again who comes first.
                update lanes set due = next_due where current of lanes_in_order;
                stood_too_early := true;
                exit;
            end if;
            if head.id is not null then
                update commands
                set status = 'running',
                    attempt = attempt + 1,
                    expires_at = null,
                    last_seq = last_seq + 1,
                    started_at = clock_timestamp(),
                    instance = in_instance,
                    lease_id = nextval('lease_ids'),
                    lease_until = clock_timestamp() + make_interval(secs => lease_s),
                    holder = in_holder
                where id = head.id
                returning * into head;
                insert into output
                    (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
                values (head.day, head.id, head.last_seq, head.last_seq, 0, 0,
                        of_attempt(running_event, head.attempt));
                return next head;
                running := running + 1;
                taken := taken + 1;
                served_at := extract(epoch from clock_timestamp());
            end if;
            next_due := null;
            if running < lane.cap then
                select lane_due(rank, served_at, level, age_step_s) into next_due from commands
                where project = lane.project and lane_class = lane.lane_class
                  and status = 'queued'
                order by rank, id
                limit 1;
            end if;
            update lanes set last_start = served_at, due = next_due
            where current of lanes_in_order;
            exit when taken >= max_commands;
        end loop;
        exit when taken >= max_commands or not stood_too_early;
    end loop;
end
$$;
