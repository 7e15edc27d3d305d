-- migrate:up
-- API keys. `project_ids` null: all projects; `allowed_ips` empty: from anywhere. `created_by` is the
-- id of the key that made it, which may be the bootstrap key's, of which there is no row.
create table api_keys (
    id uuid primary key,
    name text not null,
    scopes text[] not null,
    project_ids text[],
    allowed_ips cidr[] not null default '{}',
    rate_requests integer,
    rate_window_s integer,
    created_by text not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    -- written at most once a minute, by no request
    last_used_at timestamptz
);

-- The secrets of a key: the newest has no end of its own, the one before it is good until then.
-- `digest` is the SHA-256 of the whole key text, which is stored nowhere.
create table api_key_secrets (
    public_id text primary key,
    key_id uuid not null references api_keys (id) on delete cascade,
    -- what a credential is looked up by: an unknown public id and a wrong secret are one and the same
    digest bytea not null unique,
    created_at timestamptz not null default now(),
    good_until timestamptz
);

create index api_key_secrets_of_key on api_key_secrets (key_id);
-- One newest secret for each key: of two rotations that race the second fails rather than leave two.
create unique index api_key_secrets_newest on api_key_secrets (key_id) where good_until is null;

-- migrate:down
drop table api_key_secrets;
drop table api_keys;
