-- migrate:up
-- What is asked of a project is a row: `wanted` says it, and whoever serves the project's reach brings
-- its place (a pod and a volume) there, as often as it takes, until `settled`. So a server that dies
-- between two steps leaves nothing that a repeat, or the next look, does not finish.
--
-- `uid` stands on everything that is made for the project: what has another one, or none, is never
-- deleted for it. `adopted`: its pod was found by its labels, rdev did not make it.
alter table projects
    add column uid uuid not null default gen_random_uuid(),
    -- 'running', 'stopped', 'deleted'
    add column wanted text not null default 'running',
    add column wanted_at timestamptz not null default now(),
    -- what runs is cancelled first
    add column forced boolean not null default false,
    add column settled boolean not null default true,
    add column adopted boolean not null default false,
    -- why the last look could not bring it there
    add column trouble text;

create index projects_unsettled on projects (reach, id) where not settled;

-- Its lanes are closed (see 0006) while it is not to run, its place is not made, or a kill has left
-- processes in it.
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
        update lanes set cap = -cap
        where project = new.project and cap < 0
          and exists (select from projects p
                      where p.id = new.project and p.wanted = 'running' and p.settled);
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

-- Ask something else of a project, with its event and its audit entry: 'changed', or why not:
-- 'unknown', 'deleting', 'busy', 'adopted', 'unchanged'. `in_status`: what the event calls it.
-- The project's row is locked first, then its lanes: only claims make commands run, under their lane's
-- lock, so what does not run then cannot begin to.
create function want_project(
    in_project text, in_wanted text, in_force boolean, in_status text, in_action text,
    in_actor text, in_name text, in_ip text, in_request text
) returns text
language plpgsql as $$
declare
    known projects;
    is_forced boolean;
    changed xid8;
begin
    select * into known from projects where id = in_project for update;
    if not found then
        return 'unknown';
    elsif known.wanted = 'deleted' and in_wanted <> 'deleted' then
        return 'deleting';
    elsif known.adopted and in_wanted <> 'deleted' then
        return 'adopted';
    elsif in_wanted <> 'running' and known.wanted = in_wanted and (known.forced or not in_force) then
        return 'unchanged';
    end if;
    perform from lanes where project = in_project order by lane_class for update;
    is_forced := in_wanted <> 'running' and (in_force or known.forced);
    if in_wanted <> 'running' and not is_forced and exists (
        select from commands c where c.project = in_project and c.status = 'running') then
        return 'busy';
    end if;
    update projects
    set wanted = in_wanted, wanted_at = clock_timestamp(), forced = is_forced, settled = false,
        trouble = null, changed_xid = greatest(pg_current_xact_id(), changed_xid)
    where id = in_project
    returning changed_xid into changed;
    if in_wanted <> 'running' then
        update lanes set cap = -cap, due = null where project = in_project and cap > 0;
    end if;
    insert into events (xid, type, project, status, detail)
    values (changed, 'project.status', in_project, in_status,
            jsonb_build_object('wanted', in_wanted));
    insert into audit_entries (xid, actor, actor_name, ip, request_id, action, target, project, detail)
    values (changed, in_actor, in_name, in_ip, in_request, in_action, in_project, in_project,
            jsonb_build_object('force', in_force));
    return 'changed';
end
$$;

-- What is wanted of a project is so, if it is what was wanted at `in_wanted_at`; whether it is. Whoever
-- acted for what is no longer wanted may have undone what is: then it is looked at again. The lanes of
-- one that runs are opened; the tick finds what waits in them.
create function settle_project(in_project text, in_uid uuid, in_wanted_at timestamptz) returns boolean
language plpgsql as $$
declare
    known projects;
begin
    select * into known from projects where id = in_project and uid = in_uid for update;
    if not found then
        return false;
    end if;
    perform from lanes where project = in_project order by lane_class for update;
    update projects set settled = known.wanted_at = in_wanted_at, trouble = null
    where id = in_project;
    if known.wanted_at = in_wanted_at and known.wanted = 'running' and known.status <> 'failed' then
        update lanes set cap = -cap where project = in_project and cap < 0;
    end if;
    return known.wanted_at = in_wanted_at;
end
$$;

-- End what waits in a project that is being deleted, at most so many commands at once; their ids.
create function end_queued(
    in_project text, in_reason text, in_events bytea, in_holder text, in_limit integer
) returns setof uuid
language sql as $$
    with chosen as (
        select id from commands
        where project = in_project and status = 'queued'
        order by id
        limit in_limit
        for update skip locked
    ), ended as (
        update commands c
        set status = 'cancelled', reason = in_reason, finished_at = clock_timestamp(), spec = null,
            last_seq = c.last_seq + 2, cancel_requested_at = clock_timestamp(),
            changed_xid = greatest(pg_current_xact_id(), c.changed_xid)
        from chosen
        where c.id = chosen.id and c.status = 'queued'
        returning c.day, c.id, c.project, c.kind, c.status, c.attempt, c.reason, c.last_seq,
                  c.changed_xid
    ), event as (
        insert into output (day, command_id, first_seq, last_seq, source, raw_bytes, payload)
        select day, id, last_seq - 1, last_seq, 0, 0, of_attempt(in_events, attempt) from ended
    ), change as (
        insert into events (xid, type, project, command_id, kind, status, attempt, seq, detail)
        select changed_xid, event_type(status), project, id, kind, status, attempt, last_seq,
               ended_unstarted(reason)
        from ended
    ), entry as (
        insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
        select changed_xid, 'server', in_holder, 'command.cancelled', command_name(id), project,
               jsonb_build_object('kind', kind, 'status', status, 'attempt', attempt,
                                  'reason', reason)
        from ended
    )
    select id from ended
$$;

-- Ask for the end of what runs in a project; the ids of all that does.
create function ask_running_to_end(in_project text, in_holder text) returns setof uuid
language sql as $$
    with running as (
        select id, cancel_requested_at is null as is_first from commands
        where project = in_project and status = 'running'
        order by id
        for update
    ), asked as (
        update commands c
        set cancel_requested_at = clock_timestamp(),
            changed_xid = greatest(pg_current_xact_id(), c.changed_xid)
        from running r
        where c.id = r.id and r.is_first
        returning c.id, c.project, c.kind, c.attempt, c.changed_xid
    ), entry as (
        insert into audit_entries (xid, actor, actor_name, action, target, project, detail)
        select changed_xid, 'server', in_holder, 'command.cancel_requested', command_name(id),
               project, jsonb_build_object('kind', kind, 'attempt', attempt)
        from asked
    )
    select id from running
$$;

-- Remove a project whose place is gone, with its audit entry; false while something waits or runs.
create function remove_project(in_project text, in_uid uuid, in_holder text) returns boolean
language plpgsql as $$
declare
    changed xid8;
begin
    perform from projects
    where id = in_project and uid = in_uid and wanted = 'deleted'
    for update;
    if not found then
        return true;
    end if;
    perform from lanes where project = in_project order by lane_class for update;
    if exists (select from commands c where c.project = in_project and c.status = 'queued')
        or exists (select from commands c where c.project = in_project and c.status = 'running') then
        return false;
    end if;
    delete from projects where id = in_project returning greatest(pg_current_xact_id(), changed_xid)
    into changed;
    -- Nothing is left of what kills had left.
    update commands c set kill = '{"confirmed": true, "survivors": []}'
    where c.project = in_project and c.kill ->> 'confirmed' = 'false';
    insert into events (xid, type, project, status, detail)
    values (changed, 'project.status', in_project, 'stopped', '{"wanted": "deleted"}');
    insert into audit_entries (xid, actor, actor_name, action, target, project)
    values (changed, 'server', in_holder, 'project.removed', in_project, in_project);
    return true;
end
$$;

-- migrate:down
drop function remove_project;
drop function ask_running_to_end;
drop function end_queued;
drop function settle_project;
drop function want_project;
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
update lanes l set cap = -l.cap
from projects p
where p.id = l.project and p.status = 'ready' and l.cap < 0;
drop index projects_unsettled;
alter table projects drop column trouble, drop column adopted, drop column settled,
    drop column forced, drop column wanted_at, drop column wanted, drop column uid;
