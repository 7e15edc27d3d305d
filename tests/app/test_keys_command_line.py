"""`rdev keys` against a real server."""

import json

import pytest

from tests.app.server import Server, rdev


def run(server: Server, *argv: str, key: str | None = None) -> tuple[int, str, str]:
    environment = server.client_environment | ({} if key is None else {"RDEV_KEY": key})
    done = rdev("keys", *argv, environment=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.slow
def test_a_key_is_made_listed_rotated_and_revoked(server: Server) -> None:
    status, text, told = run(
        server,
        *("create", "ci", "--scope", "keys:read", "--scope", "projects:read"),
        *("--expires-in", "3600", "--ip", "127.0.0.0/8", "--ip", "::1"),
    )
    assert (status, text.startswith("rdev_sk_")) == (0, True), told
    key_id, name, state, scopes, projects, _ = told.strip().split("\t")
    assert (name, state, projects) == ("ci", "active", "all projects")
    assert scopes == "keys:read,projects:read"
    listed = json.loads(run(server, "list", "--output", "json", key=text.strip())[1])
    assert listed[0]["id"] == key_id
    assert listed[0]["allowed_ips"] == ["127.0.0.0/8", "::1/128"]
    status, fresh, _ = run(server, "rotate", key_id, "--grace-s", "0")
    assert (status, fresh != text) == (0, True)
    status, _, told = run(server, "list", key=text.strip())
    assert (status, "KEY_REVOKED" in told) == (1, True)
    lines = run(server, "list", "--output", "ndjson", key=fresh.strip())[1].splitlines()
    assert json.loads(lines[0])["id"] == key_id
    status, row, _ = run(server, "revoke", key_id)
    assert (status, row.split("\t")[2]) == (0, "revoked")
    assert "revoked" in run(server, "list")[1]


@pytest.mark.slow
def test_a_fault_is_one_line(server: Server) -> None:
    status, out, told = run(server, "create", "x", "--scope", "nope")
    assert (status, out) == (1, "")
    assert told.startswith("rdev: BAD_REQUEST: /scopes/0")
