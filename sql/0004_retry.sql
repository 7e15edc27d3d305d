-- migrate:up
-- `retry: safe`: a command may be queued again and have another attempt. What is stored of its output
-- (offsets, dropped_bytes) is the present attempt's, which begins behind this event.
alter table commands add column attempt_seq bigint not null default 0;

-- Only what was never started expires; from now on a claim says so (below).
update commands set expires_at = null where status = 'running' and expires_at is not null;

-- Events that were encoded for the attempt 0, as those of another one.
create function of_attempt(events bytea, attempt integer) returns bytea
language sql immutable strict parallel safe as
$$ select convert_to(
       replace(convert_from(events, 'UTF8'), '"attempt":0', '"attempt":' || attempt), 'UTF8') $$;

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

-- migrate:down
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
            where current of lanes_in_order;
            exit when taken >= max_commands;
        end loop;
        exit when taken >= max_commands or not stood_too_early;
    end loop;
end
$$;
drop function of_attempt;
alter table commands drop column attempt_seq;
