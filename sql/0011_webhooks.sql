-- migrate:up
-- Who is told of events, and what is owed to them. An event of `events` becomes a message and one
-- delivery for each endpoint it is for, in the statement that writes the event: nothing can happen
-- without being owed. No row of these tables is locked by that (no foreign keys, no counters).

-- An endpoint. It speaks for the key that made it or enabled it last (`owner`; null: the bootstrap
-- key): while that key is good, of projects that the key may see.
create table webhooks (
    id uuid primary key,
    url text not null,
    description text not null default '',
    events text[] not null,
    -- null: all projects of the owner
    project_ids text[],
    is_ordered boolean not null default false,
    owner uuid,
    is_enabled boolean not null default true,
    -- 'requested', 'gone', 'failing', 'key_ended'
    disabled_reason text,
    disabled_at timestamptz,
    -- sealed (adapters/webhooks/sealing.py): the database alone gives no secret away
    secret bytea not null,
    previous_secret bytea,
    previous_until timestamptz,
    -- deliveries that are dead because more than the bound waited
    overflowed bigint not null default 0,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    -- its deliveries are put away with time
    deleted_at timestamptz
);

-- What every statement that writes events asks first.
create index webhooks_enabled on webhooks (id) where is_enabled;

-- What moves of an endpoint. One row each, locked by claims.
create table webhook_lanes (
    webhook_id uuid primary key,
    is_open boolean not null default true,
    -- attempts at once
    cap integer not null,
    served_at timestamptz not null default '-infinity',
    -- nothing is claimed before: its breaker is open, or the head of an ordered lane waits
    held_until timestamptz not null default '-infinity',
    -- its last attempt was accepted
    is_trusted boolean not null default false,
    -- of the first failure since the last success
    failing_since timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);

-- What is sent, byte for byte at each attempt; its id is the event's, and the `webhook-id`.
create table webhook_messages (
    id uuid primary key,
    type text not null,
    payload text not null
);

create sequence delivery_lease_ids;

create table deliveries (
    id uuid primary key default uuid7(),
    -- the order of an ordered endpoint
    position bigint not null generated always as identity,
    webhook_id uuid not null,
    event_id uuid not null,
    type text not null,
    project text,
    -- 'pending', 'sending' (under a lease), 'delivered', 'dead'
    status text not null default 'pending',
    -- attempts that began; failures since it was last asked for
    attempt integer not null default 0,
    failures integer not null default 0,
    -- not before; '-infinity' where only the order counts
    due timestamptz not null default clock_timestamp(),
    -- of a dead one: 'exhausted', 'gone', 'overflow', 'not_allowed', 'expired'
    reason text,
    lease_id bigint,
    lease_until timestamptz,
    holder text,
    created_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz
) with (autovacuum_vacuum_scale_factor = 0.02);

create index deliveries_pending on deliveries (webhook_id, due, position) where status = 'pending';
create index deliveries_sending on deliveries (webhook_id) where status = 'sending';
create index deliveries_of_webhook on deliveries (webhook_id, id);
create index deliveries_dead on deliveries (webhook_id, id) where status = 'dead';

create table delivery_attempts (
    delivery_id uuid not null,
    number integer not null,
    at timestamptz not null default clock_timestamp(),
    status integer,
    fault text,
    detail text not null default '',
    latency_ms integer,
    http_version text,
    request_headers jsonb not null default '{}',
    body bytea not null default '',
    truncated boolean not null default false,
    primary key (delivery_id, number)
);

-- No UUIDv7 that was made then or later is less.
create function first_uuid7(at timestamptz) returns uuid
language sql immutable strict parallel safe as $$
    select (encode(substring(int8send((extract(epoch from at) * 1000)::bigint) from 3), 'hex')
            || repeat('0', 20))::uuid
$$;

-- What a receiver reads. Source: Standard Webhooks 1.0.0; the HTTP contract.
create function webhook_payload(type text, at timestamptz, data jsonb) returns text
language sql stable parallel safe as $$
    select json_build_object(
        'type', type,
        'event', type,
        'timestamp', to_char(at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        'data', data
    )::text
$$;

-- Whether an endpoint's owner is good: only then is anything owed or sent.
create function is_owner_good(owner uuid) returns boolean
language sql stable parallel safe as $$
    select owner is null or exists (
        select from api_keys k
        where k.id = owner and k.revoked_at is null
          and (k.expires_at is null or k.expires_at > clock_timestamp()))
$$;

-- Deliveries of what was just written to `events`, all rows of the statement at once, in their order.
create function owe_deliveries() returns trigger
language plpgsql as $$
begin
    if not exists (select from webhooks where is_enabled) then
        return null;
    end if;
    with owed as materialized (
        select w.id as webhook_id, w.is_ordered, n.id as event_id, n.type, n.project, n.xid, n.position
        from fresh n
        join webhooks w on w.is_enabled and n.type = any(w.events)
            and (w.project_ids is null or n.project = any(w.project_ids))
        left join api_keys k on k.id = w.owner
        where w.owner is null
           or k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())
              and (k.project_ids is null or n.project = any(k.project_ids))
    ), message as (
        insert into webhook_messages (id, type, payload)
        select n.id, n.type, webhook_payload(
            n.type, n.at,
            case when n.command_id is null then '{}'::jsonb else jsonb_build_object(
                'command_id', 'cmd_' || replace(n.command_id::text, '-', ''),
                'type', n.kind, 'attempt', n.attempt, 'sequence', n.seq) end
            || n.detail || jsonb_build_object('project', n.project, 'status', n.status))
        from fresh n
        where n.id in (select event_id from owed)
    )
    insert into deliveries (webhook_id, event_id, type, project, due)
    select webhook_id, event_id, type, project,
           case when is_ordered then '-infinity' else clock_timestamp() end
    from owed
    order by xid, position;
    return null;
end
$$;

create trigger events_are_owed after insert on events
referencing new table as fresh for each statement execute function owe_deliveries();

-- A message of no project (`ping`, `endpoint.disabled`) to these endpoints; the ids of its deliveries.
create function owe_message(in_type text, data jsonb, webhook_ids uuid[]) returns setof uuid
language sql as $$
    with message as (
        insert into webhook_messages (id, type, payload)
        select uuid7(), in_type, webhook_payload(in_type, clock_timestamp(), data)
        where cardinality(webhook_ids) > 0
        returning id
    )
    insert into deliveries (webhook_id, event_id, type, due)
    select w.id, m.id, in_type, case when w.is_ordered then '-infinity' else clock_timestamp() end
    from message m, webhooks w
    where w.id = any(webhook_ids)
    returning id
$$;

-- Stops an endpoint, and owes `endpoint.disabled` to those that ask for it and may see this one. False:
-- it was stopped already.
create function disable_webhook(in_id uuid, in_reason text) returns boolean
language plpgsql as $$
declare
    stopped webhooks;
begin
    update webhooks
    set is_enabled = false, disabled_reason = in_reason, disabled_at = clock_timestamp()
    where id = in_id and is_enabled
    returning * into stopped;
    if not found then
        return false;
    end if;
    update webhook_lanes set is_open = false where webhook_id = in_id;
    perform owe_message(
        'endpoint.disabled',
        jsonb_build_object('webhook_id', 'whk_' || replace(in_id::text, '-', ''),
                           'url', stopped.url, 'reason', in_reason),
        array(select w.id from webhooks w
              where w.is_enabled and 'endpoint.disabled' = any(w.events) and is_owner_good(w.owner)
                and (w.project_ids is null or w.project_ids @> stopped.project_ids)));
    return true;
end
$$;

-- Takes what is due of endpoints that have room, those first that have waited longest, under fresh
-- leases. An endpoint whose last attempt was not accepted (or that had none) gets one at a time, and
-- all such endpoints together at most `max_untrusted`: the other permits are for those that accept.
-- Every statement in here has a snapshot of its own: what is counted under a lane's lock is the truth,
-- because only claims make deliveries of a lane `sending`. A lane that another claim has is passed by.
-- The lanes are asked one by one: there are at most 1,000, and there is no hint that could be wrong.
create function claim_deliveries(
    in_holder text, lease_s double precision, max_deliveries integer, max_untrusted integer
) returns table (
    id uuid, lease_id bigint, webhook_id uuid, event_id uuid, attempt integer, failures integer,
    is_ordered boolean, is_trusted boolean, is_allowed boolean, url text, payload text, secret bytea,
    previous_secret bytea
)
language plpgsql rows 20
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off
set enable_mergejoin = off set jit = off as $$
#variable_conflict use_column
declare
    found_lanes uuid[];
    limit_now integer;
    began integer;
    taken integer := 0;
    are_trusted boolean;
    -- a value and no call, which no index could be asked for
    now_at timestamptz;
begin
    foreach are_trusted in array array[true, false] loop
        limit_now := max_deliveries - taken;
        if not are_trusted then
            limit_now := least(limit_now, max_untrusted);
        end if;
        continue when limit_now <= 0;
        now_at := clock_timestamp();
        select coalesce(array_agg(f.webhook_id order by f.waits), '{}') into found_lanes
        from (
            select l.webhook_id, greatest(h.since, l.served_at) as waits
            from webhook_lanes l
            cross join lateral (
                select greatest(d.due, d.created_at) as since
                from deliveries d
                where d.webhook_id = l.webhook_id and d.status = 'pending'
                  and d.due <= now_at
                order by d.due, d.position
                limit 1
            ) h
            where l.is_open and l.held_until <= now_at
              and l.is_trusted = are_trusted
              and case when are_trusted then l.cap else 1 end
                  > (select count(*) from deliveries r
                     where r.webhook_id = l.webhook_id and r.status = 'sending')
            order by 2
            limit limit_now
            for no key update of l skip locked
        ) f;
        continue when cardinality(found_lanes) = 0;
        return query
        update deliveries d
        set status = 'sending', attempt = d.attempt + 1, holder = in_holder,
            lease_id = nextval('delivery_lease_ids'),
            lease_until = clock_timestamp() + make_interval(secs => lease_s)
        from (
            select h.id, w.is_ordered, w.url, m.payload, w.secret,
                   case when w.previous_until > now_at then w.previous_secret end
                       as previous_secret,
                   h.project is null
                   or (w.project_ids is null or h.project = any(w.project_ids))
                      and (k.project_ids is null or h.project = any(k.project_ids)) as is_allowed
            from unnest(found_lanes) with ordinality f (webhook_id, number)
            join webhook_lanes l on l.webhook_id = f.webhook_id
            join webhooks w on w.id = f.webhook_id and w.is_enabled
            left join api_keys k on k.id = w.owner
            cross join lateral (
                select d.id, d.event_id, d.project
                from deliveries d
                where d.webhook_id = f.webhook_id and d.status = 'pending'
                  and d.due <= now_at
                order by d.due, d.position
                limit greatest(0, case when are_trusted then l.cap else 1 end
                    - (select count(*) from deliveries r
                       where r.webhook_id = f.webhook_id and r.status = 'sending'))
            ) h
            join webhook_messages m on m.id = h.event_id
            where w.owner is null
               or k.revoked_at is null
                  and (k.expires_at is null or k.expires_at > now_at)
            order by f.number
            limit limit_now
        ) heads
        -- (By the primary key, whatever the planner thinks of the table.)
        where d.id = heads.id and d.status || '' = 'pending'
        returning d.id, d.lease_id, d.webhook_id, d.event_id, d.attempt, d.failures,
                  heads.is_ordered, are_trusted, heads.is_allowed, heads.url, heads.payload, heads.secret,
                  heads.previous_secret;
        get diagnostics began = row_count;
        taken := taken + began;
        update webhook_lanes set served_at = clock_timestamp() where webhook_id = any(found_lanes);
    end loop;
    if taken = 0 then
        -- Nothing that must survive was written.
        perform set_config('synchronous_commit', 'off', true);
    end if;
end
$$;

-- migrate:down
drop trigger events_are_owed on events;
drop function claim_deliveries;
drop function disable_webhook;
drop function owe_message;
drop function owe_deliveries;
drop function is_owner_good;
drop function webhook_payload;
drop function first_uuid7;
drop table delivery_attempts;
drop table deliveries;
drop sequence delivery_lease_ids;
drop table webhook_messages;
drop table webhook_lanes;
drop table webhooks;
