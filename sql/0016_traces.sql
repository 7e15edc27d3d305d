-- migrate:up
-- Where a command stands in a trace: `traceparent`, and after a space `tracestate` (docs/adr/0020).
-- Without a default: no row is written, and the lock is held for an instant. Functions that return
-- rows of `commands` give the column from their next call on.
alter table commands add column trace text;

-- The trace of the command that a webhook's message tells of; null where it tells of none, or of one
-- that is no longer stored. Volatile, so that it sees a command that was stored since the statement
-- began that claims its delivery.
create function message_trace(payload text) returns text
language sql volatile strict as $$
    select c.trace from commands c
    where c.id = substr(payload::json #>> '{data,command_id}', 5)::uuid
$$;

-- migrate:down
drop function message_trace(text);
alter table commands drop column trace;
