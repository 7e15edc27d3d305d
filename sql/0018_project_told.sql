-- migrate:up
-- What was last told of a project's pod, which becomes ready or fails by itself. Every server sees the
-- pods; who finds here what it saw before tells the next, in one statement with the event, so that
-- each change is told once. It holds for the wish of `told_for`: with another one it begins anew, as
-- `pending`, which that wish's own event has said.
alter table projects
    add column told text,
    add column told_for timestamptz;

-- migrate:down
alter table projects drop column told_for, drop column told;
