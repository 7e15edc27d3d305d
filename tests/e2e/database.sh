#!/usr/bin/env bash
# What compose.yaml expects of the image of PostgreSQL: a user and a database out of the environment,
# data that stay in /var/lib/postgresql.
set -euo pipefail
data=/var/lib/postgresql/data
if [[ ! -f $data/PG_VERSION ]]; then
  initdb --encoding UTF8 --locale C.UTF-8 --pgdata "$data.new" --username "$POSTGRES_USER" --pwfile <(echo "$POSTGRES_PASSWORD") \
    --auth-local trust --auth-host scram-sha-256 >/dev/null
  echo 'host all all all scram-sha-256' >>"$data.new/pg_hba.conf"
  pg_ctl --pgdata "$data.new" --wait --silent --options "-c listen_addresses= -c unix_socket_directories=/tmp" start
  createdb --host /tmp --username "$POSTGRES_USER" "$POSTGRES_DB" || [[ $POSTGRES_DB == postgres ]]
  pg_ctl --pgdata "$data.new" --wait --silent stop
  mv "$data.new" "$data"
fi
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
