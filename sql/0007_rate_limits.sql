-- migrate:up
-- The hits of one subject under one policy: cells that have any, ascending, and how many. The rule and
-- its bounds stand in rdev/domain/limiter.py. Logged, so that a failover does not open the door; what
-- the last moment before a crash counted may be lost (`synchronous_commit = off`).
create table rate_windows (
    policy text not null,
    subject text not null,
    -- A window of another length counts apart.
    window_us bigint not null check (window_us > 0),
    cells bigint[] not null default '{}',
    hits integer[] not null default '{}',
    used integer not null default 0,
    primary key (policy, subject, window_us)
-- A hit is a HOT update: no index but the key's, and room for the next version on the page.
) with (fillfactor = 50);

-- One hit in every window, or in none. The arrays are parallel, in the order of the key (so two
-- requests never wait for each other in a ring) and name no window twice. Each row is read under its
-- lock, and the clock after that. `now_us` replaces the clock in tests.
create function take_hits(
    in_policies text[], in_subjects text[], in_windows_us bigint[], in_limits integer[],
    in_now_us bigint default null
) returns table (is_admitted boolean, remaining integer, reset_us bigint, retry_us bigint)
language plpgsql as $$
declare
    -- Windows are cut into so many cells.
    cells_per_window constant integer := 60;
    windows rate_windows[];
    one rate_windows;
    places tid[];
    locked record;
    now_us bigint;
    cell bigint;
    newest bigint;
    gone integer;
    leaving integer;
    are_admitted boolean := true;
    answers bigint[] := '{}';
begin
    perform set_config('synchronous_commit', 'off', true);
    for i in 1 .. cardinality(in_policies) loop
        loop
            select w.ctid as place, w as stored into locked
            from rate_windows w
            where w.policy = in_policies[i] and w.subject = in_subjects[i]
              and w.window_us = in_windows_us[i]
            for no key update;
            exit when found;
            insert into rate_windows (policy, subject, window_us)
            values (in_policies[i], in_subjects[i], in_windows_us[i])
            on conflict do nothing;
        end loop;
        windows[i] := locked.stored;
        places[i] := locked.place;
    end loop;
    now_us := coalesce(in_now_us, (extract(epoch from clock_timestamp()) * 1000000)::bigint);

    for i in 1 .. cardinality(in_policies) loop
        one := windows[i];
        cell := now_us * cells_per_window / one.window_us;
        newest := one.cells[cardinality(one.cells)];
        if newest > cell + cells_per_window then
            -- The clock was far ahead.
            one.cells := '{}';
            one.hits := '{}';
            one.used := 0;
        elsif newest > cell then
            cell := newest;
        end if;
        gone := 0;
        while one.cells[gone + 1] < cell - cells_per_window loop
            gone := gone + 1;
            one.used := one.used - one.hits[gone];
        end loop;
        if gone > 0 then
            one.cells := one.cells[gone + 1 :];
            one.hits := one.hits[gone + 1 :];
        end if;
        is_admitted := one.used < in_limits[i];
        remaining := greatest(0, in_limits[i] - one.used);
        retry_us := 0;
        if not is_admitted then
            are_admitted := false;
            -- The cell with whose end enough hits have left.
            gone := 1;
            leaving := one.hits[1];
            while one.used - leaving >= in_limits[i] loop
                gone := gone + 1;
                leaving := leaving + one.hits[gone];
            end loop;
            retry_us := ((one.cells[gone] + cells_per_window + 1) * one.window_us
                         + cells_per_window - 1) / cells_per_window - now_us;
        end if;
        windows[i] := one;
        answers := answers || array[is_admitted::integer, remaining, cell, retry_us];
    end loop;

    for i in 1 .. cardinality(in_policies) loop
        one := windows[i];
        is_admitted := answers[4 * i - 3] = 1;
        remaining := answers[4 * i - 2];
        cell := answers[4 * i - 1];
        retry_us := answers[4 * i];
        if are_admitted then
            remaining := remaining - 1;
            newest := cardinality(one.cells);
            if one.cells[newest] = cell then
                one.hits[newest] := one.hits[newest] + 1;
            else
                one.cells := one.cells || cell;
                one.hits := one.hits || 1;
            end if;
            -- By place, which the lock keeps: see touch_lanes.
            update rate_windows w set cells = one.cells, hits = one.hits, used = one.used + 1
            where w.ctid = places[i];
        end if;
        reset_us := coalesce(((one.cells[1] + cells_per_window + 1) * one.window_us
                              + cells_per_window - 1) / cells_per_window - now_us, 0);
        return next;
    end loop;
end
$$;

-- migrate:down
drop function take_hits;
drop table rate_windows;
