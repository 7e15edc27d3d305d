-- migrate:up
-- Endpoints whose requests are signed by scheme v1a: what their receivers verify with. Null with scheme
-- v1. What signs is in `secret` and `previous_secret` as before, sealed together with its scheme.
alter table webhooks add column public_key text;
alter table webhooks add column previous_public_key text;

-- migrate:down
-- Who knows no v1a can open no key of it: such an endpoint is stopped, and what it is owed waits until
-- it is given a secret (rotate-secret) and enabled; a key of v1a signs beside no other.
update webhook_lanes set is_open = false
where webhook_id in (select id from webhooks where public_key is not null and is_enabled);
update webhooks
set is_enabled = false, disabled_reason = 'requested', disabled_at = clock_timestamp(),
    updated_at = clock_timestamp()
where public_key is not null and is_enabled;
update webhooks set previous_secret = null, previous_until = null where previous_public_key is not null;
alter table webhooks drop column previous_public_key;
alter table webhooks drop column public_key;
