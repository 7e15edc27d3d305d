-- migrate:up
-- One row per project and class of commands. `due` is a hint that may be too early, never too late:
-- what may be claimable has one, after its commit or after the next tick. It is parked (null) while
-- nothing is queued or the lane is at its cap.
create table lanes (
    project text not null references projects (id) on delete cascade,
    lane_class text not null,
    reach text not null,
    cap integer not null,
    due double precision,
    last_start double precision not null default 0,
    primary key (project, lane_class)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);

create index lanes_due on lanes (reach, due) where due is not null;

-- rank = time of acceptance (epoch seconds) - level * age_step_s: stored once, so ageing needs no
-- rewriting. The smallest is served first.
alter table commands add column rank double precision;
update commands set level = 2 - level;
update commands set rank = extract(epoch from created_at) - level * 30;
alter table commands alter column rank set not null;

drop index commands_queued;
create index commands_queued on commands (project, lane_class, rank, id) where status = 'queued';
drop index commands_running;
create index commands_running on commands (project, lane_class) where status = 'running';
create index commands_expiring on commands (expires_at) where status = 'queued' and expires_at is not null;

insert into lanes (project, lane_class, reach, cap)
select p.id, c.lane_class, p.reach, c.cap
from projects p, (values ('agent', 1), ('work', 4)) as c (lane_class, cap);

-- Where a lane stands in the order of lanes: its head's rank, or, if it was served later than that,
-- its last start aged by the head's level. So a lane that was just served stands behind every
-- command that waits since before.
create function lane_due(head_rank double precision, last_start double precision, head_level integer,
                         age_step_s double precision) returns double precision
language sql immutable strict parallel safe as
$$ select greatest(head_rank, last_start - head_level * age_step_s) $$;

-- After the commit of what may have made them claimable: where these lanes stand now. Read under their
-- locks, so it is exact; whatever commits later is followed by a touch of its own. Lanes are locked
-- in order of their key, and a claim never waits for them. What is lost here the tick repairs, so
-- the commit need not reach the disk. Returns how many lanes it moved.
-- (No sequential scans or sorts here and below: a plan that was made while the tables were small is
-- kept while they grow.)
create function touch_lanes(projects text[], lane_classes text[], age_step_s double precision)
returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    moved integer;
begin
    perform set_config('synchronous_commit', 'off', true);
    perform 1
    from lanes l
    where (l.project, l.lane_class) in (select * from unnest(projects, lane_classes))
    order by l.project, l.lane_class
    for update;
    update lanes l
    set due = n.due
    from (
        select i.project, i.lane_class, (
            select lane_due(c.rank, i.last_start, c.level, age_step_s)
            from commands c
            where c.project = i.project and c.lane_class = i.lane_class and c.status = 'queued'
              and i.cap > (select count(*) from commands r
                           where r.project = i.project and r.lane_class = i.lane_class
                             and r.status = 'running')
            order by c.rank, c.id
            limit 1
        ) as due
        from lanes i
        where (i.project, i.lane_class) in (select * from unnest(projects, lane_classes))
    ) n
    where l.project = n.project and l.lane_class = n.lane_class
      and l.due is distinct from n.due;
    get diagnostics moved = row_count;
    return moved;
end
$$;

-- Ends a queued command that waited too long, with its last events.
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

-- The heads of lanes in the order of `due`, and the expired ones that were found before them (ended
-- here, at most 100 of a lane at once). Every statement in here has a snapshot of
-- its own: what is read under a lane's lock is the truth about the lane, because only claims make
-- commands of a lane run. The cursor locks one lane at a time: a lane that this claim does not need
-- is another's to take. Lock order: lane before command.
create function claim_commands(
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
                update lanes set due = next_due
                where project = lane.project and lane_class = lane.lane_class;
                stood_too_early := true;
                exit;
            end if;
            if head.id is not null then
                update commands
                set status = 'running',
                    attempt = attempt + 1,
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
                values (head.day, head.id, head.last_seq, head.last_seq, 0, 0, running_event);
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
            where project = lane.project and lane_class = lane.lane_class;
            exit when taken >= max_commands;
        end loop;
        exit when taken >= max_commands or not stood_too_early;
    end loop;
end
$$;

-- The tick's repair of what was lost between a commit and its touch: lanes with something queued and
-- room that are parked, or stand later than their head. Walks from lane to lane over
-- `commands_queued`, so its cost is in lanes with queued commands, not in commands.
create function repair_lanes(in_reach text, age_step_s double precision) returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    late_projects text[];
    late_classes text[];
begin
    with recursive waiting as (
        (select c.project, c.lane_class, c.rank, c.level from commands c
         where c.status = 'queued' order by c.project, c.lane_class, c.rank, c.id limit 1)
        union all
        select n.project, n.lane_class, n.rank, n.level
        from waiting w
        cross join lateral (
            select c.project, c.lane_class, c.rank, c.level from commands c
            where c.status = 'queued' and (c.project, c.lane_class) > (w.project, w.lane_class)
            order by c.project, c.lane_class, c.rank, c.id limit 1
        ) n
    )
    select array_agg(l.project), array_agg(l.lane_class) into late_projects, late_classes
    from waiting w
    join lanes l using (project, lane_class)
    where l.reach = in_reach
      and (l.due is null or l.due > lane_due(w.rank, l.last_start, w.level, age_step_s))
      and l.cap > (select count(*) from commands r
                   where r.project = l.project and r.lane_class = l.lane_class
                     and r.status = 'running');
    if late_projects is null then
        return 0;
    end if;
    return touch_lanes(late_projects, late_classes, age_step_s);
end
$$;

-- migrate:down
drop function repair_lanes;
drop function claim_commands;
drop function expire_command;
drop function touch_lanes;
drop function lane_due;
drop table lanes;
drop index commands_expiring;
drop index commands_running;
create index commands_running on commands (reach, id) where status = 'running';
drop index commands_queued;
alter table commands drop column rank;
update commands set level = 2 - level;
create index commands_queued on commands (project, lane_class, level, created_at, id)
    where status = 'queued';
