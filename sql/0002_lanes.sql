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

-- After the commit of what made it claimable: the lane may be due. Lanes are locked in order of
-- their key; a claim never waits for them. What is lost here the tick repairs, so the commit need
-- not reach the disk.
create function touch_lanes(projects text[], lane_classes text[]) returns void
language plpgsql as $$
begin
    perform set_config('synchronous_commit', 'off', true);
    perform 1
    from lanes l
    where (l.project, l.lane_class) in (select * from unnest(projects, lane_classes))
    order by l.project, l.lane_class
    for update;
    update lanes l
    set due = least(l.due, h.rank)
    from unnest(projects, lane_classes) as t (project, lane_class)
    cross join lateral (
        select c.rank
        from commands c
        where c.project = t.project and c.lane_class = t.lane_class and c.status = 'queued'
        order by c.rank, c.id
        limit 1
    ) h
    where l.project = t.project and l.lane_class = t.lane_class
      and (l.due is null or l.due > h.rank);
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

-- One command of each of up to max_lanes lanes, in the order of `due`. Every statement in here has a
-- snapshot of its own: what is read under a lane's lock is the truth about the lane, because only
-- claims make commands of a lane run. Lock order: lane before command.
create function claim_commands(
    in_reach text, in_holder text, in_instance text, lease_s double precision,
    age_step_s double precision, max_lanes integer, running_event bytea, expired_events bytea
) returns setof commands
language plpgsql as $$
declare
    lane lanes;
    head commands;
    next_head record;
    is_full boolean;
    moment double precision;
begin
    for lane in
        select * from lanes
        where reach = in_reach and due is not null
        order by due
        limit max_lanes
        for update skip locked
    loop
        select count(*) >= lane.cap into is_full
        from commands
        where project = lane.project and lane_class = lane.lane_class and status = 'running';
        if is_full then
            update lanes set due = null
            where project = lane.project and lane_class = lane.lane_class;
            continue;
        end if;
        loop
            select * into head from commands
            where project = lane.project and lane_class = lane.lane_class and status = 'queued'
            order by rank, id
            limit 1
            for update;
            exit when not found or head.expires_at is null or head.expires_at > clock_timestamp();
            perform expire_command(head.id, expired_events);
        end loop;
        moment := extract(epoch from clock_timestamp());
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
            insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
            values (head.day, head.id, head.last_seq, head.last_seq, 0, 0, running_event);
            return next head;
        end if;
        select c.rank, c.level into next_head from commands c
        where c.project = lane.project and c.lane_class = lane.lane_class and c.status = 'queued'
        order by c.rank, c.id
        limit 1;
        update lanes
        set last_start = case when head.id is null then last_start else moment end,
            due = lane_due(next_head.rank,
                           case when head.id is null then last_start else moment end,
                           next_head.level, age_step_s)
        where project = lane.project and lane_class = lane.lane_class;
    end loop;
end
$$;

-- The tick's repair of what was lost between a commit and its touch: lanes that are parked although
-- something is queued and there is room. Walks from lane to lane over `commands_queued`, so its cost
-- is in lanes with queued commands, not in commands.
create function repair_lanes(in_reach text) returns integer
language plpgsql as $$
declare
    repaired integer;
begin
    with recursive waiting as (
        (select c.project, c.lane_class from commands c
         where c.status = 'queued' order by c.project, c.lane_class limit 1)
        union all
        select n.project, n.lane_class
        from waiting w
        cross join lateral (
            select c.project, c.lane_class from commands c
            where c.status = 'queued' and (c.project, c.lane_class) > (w.project, w.lane_class)
            order by c.project, c.lane_class limit 1
        ) n
    ), parked as (
        select l.project, l.lane_class
        from waiting w
        join lanes l using (project, lane_class)
        where l.reach = in_reach and l.due is null
          and l.cap > (select count(*) from commands r
                       where r.project = l.project and r.lane_class = l.lane_class
                         and r.status = 'running')
    )
    select count(*), touch_lanes(array_agg(project), array_agg(lane_class)) into repaired
    from parked
    having count(*) > 0;
    return coalesce(repaired, 0);
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
