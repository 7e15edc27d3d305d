-- What the database itself sees of every change to a command, whatever rdev says. Each server's
-- sessions carry its name (`faults.server`), and `servers` says under which name it holds leases.
create schema witness;
create table witness.servers (name text primary key, holder text not null);
create table witness.faults (at timestamptz default clock_timestamp(), what text, command uuid, by text);
create table witness.take_overs (at timestamptz default clock_timestamp(), command uuid, by text);

create function witness.look() returns trigger language plpgsql as $$
declare
    server text := current_setting('faults.server', true);
    me text := (select holder from witness.servers where name = server);
    what text;
begin
    if server is null then
        return null;
    end if;
    if old.finished_at is not null and (new.status, new.last_seq, new.out_offset, new.err_offset)
            is distinct from (old.status, old.last_seq, old.out_offset, old.err_offset) then
        what := 'changed after its end';
    elsif new.lease_id is distinct from old.lease_id and old.lease_id is not null then
        insert into witness.take_overs (command, by) values (new.id, server);
        if old.lease_until >= clock_timestamp() then
            what := 'taken over early';
        end if;
    elsif old.holder is not null and old.holder is distinct from me
            and (new.last_seq, new.out_offset, new.err_offset, new.lease_until, new.status)
            is distinct from
                (old.last_seq, old.out_offset, old.err_offset, old.lease_until, old.status) then
        what := 'stale write accepted';
    elsif new.status = 'expired' and old.status = 'queued' and new.expires_at > clock_timestamp() then
        what := 'expired early';
    elsif new.attempt > 1 and new.attempt > old.attempt and new.retry = 'never' then
        what := 'run again';
    end if;
    if what is not null then
        insert into witness.faults (what, command, by) values (what, new.id, server);
    end if;
    return null;
end
$$;

create trigger witness after update on commands for each row execute function witness.look();
