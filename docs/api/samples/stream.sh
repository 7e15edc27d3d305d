#!/bin/sh
# Run a command and follow it with curl. Needs URL, KEY, PROJECT; arguments: the command.
# curl does not resume: for long commands use a client that does (the other samples, `rdev run`).
set -eu
body=$(printf '%s' "$*" | sed 's/\\/\\\\/g; s/"/\\"/g')
made=$(curl -sSf -H "X-API-Key: $KEY" -H 'Content-Type: application/json' \
    -d "{\"command\": \"$body\"}" "$URL/projects/$PROJECT/shell")
id=$(printf '%s' "$made" | sed 's/.*"id":"\(cmd_[0-9a-f]*\)".*/\1/')
curl -sSfN -H "X-API-Key: $KEY" "$URL/commands/$id/events" | sed -n 's/^data: //p'
