-- migrate:up
-- A project is `failed` while a kill has left processes in it: their slots must not be given to
-- others. Its lanes are closed, in the transaction that stores the kill's report, by making their
-- caps negative: no count of running commands is below that, so a lane is parked wherever its cap is
-- looked at. The report that nothing is left opens them again; the tick finds them.

-- The housekeeper's search for what is to be killed again.
create index commands_unkilled on commands (reach, id) where kill ->> 'confirmed' = 'false';

-- The project's row is locked first, then its lanes in the order in which all lock them: of a kill
-- that fails and one that succeeds at the same time, the second sees what the first has stored.
create function heed_kill() returns trigger
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

create trigger heed_kill after update on commands
for each row when ((old.kill ->> 'confirmed') is distinct from (new.kill ->> 'confirmed')
    and (coalesce(old.kill ->> 'confirmed', '') = 'false'
         or coalesce(new.kill ->> 'confirmed', '') = 'false'))
execute function heed_kill();

-- What kills have left before.
update projects p set status = 'failed'
where p.status = 'ready' and exists (
    select from commands c
    where c.reach = p.reach and c.kill ->> 'confirmed' = 'false' and c.project = p.id);
update lanes l set cap = -l.cap, due = null
from projects p
where p.id = l.project and p.status = 'failed' and l.cap > 0;

-- migrate:down
drop trigger heed_kill on commands;
drop function heed_kill;
update lanes set cap = -cap where cap < 0;
update projects set status = 'ready' where status = 'failed';
drop index commands_unkilled;
