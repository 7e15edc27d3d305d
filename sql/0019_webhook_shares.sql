-- migrate:up
-- A claim gives an owner no more than its share of the server's places: `in_share` attempts at once,
-- of them `in_untrusted_share` of endpoints that are not trusted. `in_held` says what each owner has
-- under way there: {"<key's id, '' for the bootstrap key>": [all, untrusted]}. The function with four
-- arguments stays for servers of the version before.

-- How many more an owner may have. (One expression, so that it is inlined.)
create function webhook_places_left(
    owner uuid, held jsonb, begun jsonb, share integer, untrusted_share integer, is_trusted boolean
) returns integer
language sql immutable as $$
    select least(
        share - coalesce((held -> coalesce(owner::text, '') ->> 0)::integer, 0)
              - coalesce((begun ->> coalesce(owner::text, ''))::integer, 0),
        case when is_trusted then share
             else untrusted_share - coalesce((held -> coalesce(owner::text, '') ->> 1)::integer, 0)
        end)
$$;

-- As the one of 0011, whose comments hold; whoever has its share is passed by, and keeps its place
-- among those who wait.
create function claim_deliveries(
    in_holder text, lease_s double precision, max_deliveries integer, max_untrusted integer,
    in_share integer, in_untrusted_share integer, in_held jsonb
) returns table (
    id uuid, lease_id bigint, webhook_id uuid, event_id uuid, attempt integer, failures integer,
    is_ordered boolean, is_trusted boolean, is_allowed boolean, url text, payload text, secret bytea,
    previous_secret bytea, owner uuid
)
language plpgsql rows 20
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off
set enable_mergejoin = off set jit = off as $$
#variable_conflict use_column
declare
    found_lanes uuid[];
    -- of what this claim has taken: the endpoints of this round, all owners, how much of each
    served uuid[];
    owners text[] := '{}';
    begun jsonb := '{}';
    limit_now integer;
    taken integer := 0;
    are_trusted boolean;
    now_at timestamptz;
begin
    foreach are_trusted in array array[true, false] loop
        limit_now := max_deliveries - taken;
        if not are_trusted then
            limit_now := least(limit_now, max_untrusted);
        end if;
        continue when limit_now <= 0;
        now_at := clock_timestamp();
        if taken > 0 then
            select jsonb_object_agg(o.owner, o.number) into begun
            from (select u.owner, count(*) as number from unnest(owners) u (owner) group by u.owner) o;
        end if;
        select coalesce(array_agg(f.webhook_id order by f.waits), '{}') into found_lanes
        from (
            select l.webhook_id, r.waits
            from (
                select q.webhook_id, q.waits, row_number() over (partition by q.owner order by q.waits)
                       <= webhook_places_left(q.owner, in_held, begun, in_share, in_untrusted_share,
                                              are_trusted) as has_place
                from (
                    select l.webhook_id, w.owner, greatest(h.since, l.served_at) as waits
                    from webhook_lanes l
                    cross join lateral (
                        select greatest(d.due, d.created_at) as since
                        from deliveries d
                        where d.webhook_id = l.webhook_id and d.status = 'pending'
                          and d.due <= now_at
                        order by d.due, d.position
                        limit 1
                    ) h
                    join webhooks w on w.id = l.webhook_id and w.is_enabled
                    where l.is_open and l.held_until <= now_at
                      and l.is_trusted = are_trusted
                      and case when are_trusted then l.cap else 1 end
                          > (select count(*) from deliveries r
                             where r.webhook_id = l.webhook_id and r.status = 'sending')
                      and webhook_places_left(w.owner, in_held, begun, in_share, in_untrusted_share,
                                              are_trusted) > 0
                      and is_owner_good(w.owner)
                ) q
            ) r
            join webhook_lanes l on l.webhook_id = r.webhook_id
            -- (Again, of the row that was locked.)
            where r.has_place and l.is_open and l.held_until <= now_at and l.is_trusted = are_trusted
            order by r.waits
            limit limit_now
            for no key update of l skip locked
        ) f;
        continue when cardinality(found_lanes) = 0;
        served := '{}';
        for id, lease_id, webhook_id, event_id, attempt, failures, is_ordered, is_trusted, is_allowed,
            url, payload, secret, previous_secret, owner
        in
            update deliveries d
            set status = 'sending', attempt = d.attempt + 1, holder = in_holder,
                lease_id = nextval('delivery_lease_ids'),
                lease_until = clock_timestamp() + make_interval(secs => lease_s)
            from (
                select r.*, m.payload
                from (
                    select h.id, h.event_id, f.number, w.is_ordered, w.url, w.secret, w.owner,
                           case when w.previous_until > now_at then w.previous_secret end
                               as previous_secret,
                           h.project is null
                           or (w.project_ids is null or h.project = any(w.project_ids))
                              and (k.project_ids is null or h.project = any(k.project_ids))
                               as is_allowed,
                           row_number() over (partition by w.owner order by f.number, h.due, h.position)
                           <= webhook_places_left(w.owner, in_held, begun, in_share,
                                                  in_untrusted_share, are_trusted) as has_place
                    from unnest(found_lanes) with ordinality f (webhook_id, number)
                    join webhook_lanes l on l.webhook_id = f.webhook_id
                    join webhooks w on w.id = f.webhook_id and w.is_enabled
                    left join api_keys k on k.id = w.owner
                    cross join lateral (
                        select d.id, d.event_id, d.project, d.due, d.position
                        from deliveries d
                        where d.webhook_id = f.webhook_id and d.status = 'pending'
                          and d.due <= now_at
                        order by d.due, d.position
                        limit greatest(0, case when are_trusted then l.cap else 1 end
                            - (select count(*) from deliveries r
                               where r.webhook_id = f.webhook_id and r.status = 'sending'))
                    ) h
                    where w.owner is null
                       or k.revoked_at is null
                          and (k.expires_at is null or k.expires_at > now_at)
                ) r
                join webhook_messages m on m.id = r.event_id
                where r.has_place
                order by r.number
                limit limit_now
            ) heads
            where d.id = heads.id and d.status || '' = 'pending'
            returning d.id, d.lease_id, d.webhook_id, d.event_id, d.attempt, d.failures,
                      heads.is_ordered, are_trusted, heads.is_allowed, heads.url, heads.payload,
                      heads.secret, heads.previous_secret, heads.owner
        loop
            owners := owners || coalesce(owner::text, '');
            served := served || webhook_id;
            return next;
        end loop;
        taken := cardinality(owners);
        update webhook_lanes set served_at = clock_timestamp() where webhook_id = any(served);
    end loop;
    if taken = 0 then
        perform set_config('synchronous_commit', 'off', true);
    end if;
end
$$;

-- migrate:down
drop function claim_deliveries(text, double precision, integer, integer, integer, integer, jsonb);
drop function webhook_places_left;
