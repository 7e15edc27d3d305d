"""The state folder, the settings and the database a server starts with."""

import json
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import httpx2
import pytest

from rdev.config import load_settings
from rdev.execution_wiring import base_env
from tests.app.server import Server, open_api, open_server, open_state, probe, rdev, until


@pytest.fixture
def unstarted(quick_place: Path) -> Iterator[Server]:
    with open_state(quick_place) as server:
        yield server


def test_a_second_server_on_the_same_state_folder_is_refused(server: Server) -> None:
    second = rdev("serve", environment=server.environment)
    assert second.returncode == 1
    lines = second.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert f"is in use by process {server.pid}" in lines[0]
    assert probe(server.url + "/ready") == 200


def test_every_fault_of_the_settings_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rdev.toml"
    file.write_text('grace_s = -1\nno_such_setting = 1\nlog_level = "loud"\n')
    (tmp_path / "short").write_text("short\n")
    environment = {
        "PATH": "/usr/bin:/bin",
        "RDEV_BIND": "nowhere",
        "RDEV_ADMIN_KEY": "short",
        "RDEV_ADMIN_KEY_FILE": str(tmp_path / "short"),
        "RDEV_LEASE_S": "0",
        "RDEV_CLAUDE_COMMAND": "claude 'half",
        "RDEV_STATE_DIR": str(tmp_path / "state"),
    }
    refused = rdev("serve", "--config", str(file), environment=environment)
    assert refused.returncode == 2
    lines = refused.stderr.decode().splitlines()
    named = {line.partition(":")[0] for line in lines}
    assert named == {
        "RDEV_BIND", "RDEV_ADMIN_KEY", "RDEV_ADMIN_KEY_FILE", "RDEV_LEASE_S",
        "RDEV_CLAUDE_COMMAND", "RDEV_GRACE_S", "RDEV_NO_SUCH_SETTING", "RDEV_LOG_LEVEL",
    }, lines  # fmt: skip
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["RDEV_TLS_CERT_FILE", "RDEV_TLS_KEY_FILE"])
def test_half_of_tls_is_refused(tmp_path: Path, name: str) -> None:
    environment = {"PATH": "/usr/bin", name: "x.pem", "RDEV_STATE_DIR": str(tmp_path / "state")}
    refused = rdev("serve", environment=environment)
    assert refused.returncode == 2
    assert refused.stderr.decode().count("\n") == 1


def test_tls_files_that_are_missing_are_told_in_one_line(unstarted: Server) -> None:
    missing = str(unstarted.state_dir / "none.pem")
    tls = {"RDEV_TLS_CERT_FILE": missing, "RDEV_TLS_KEY_FILE": missing}
    refused = rdev("serve", environment=unstarted.environment | tls)
    assert refused.returncode == 1
    told = refused.stderr.decode()
    assert told.count("\n") == 1, told
    assert "RDEV_TLS_CERT_FILE" in told


def test_a_settings_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "rdev.toml"
    file.write_bytes(b"\xff\xfe")
    refused = rdev("config", "show", "--config", str(file), environment={"PATH": "/usr/bin"})
    assert refused.returncode == 2
    assert refused.stderr.decode() == f"{file}: is not UTF-8\n"


@pytest.mark.parametrize("empty", [{}, {"RDEV_DATABASE_DSN": ""}])
def test_the_originals_database_variables_go_before_the_file(
    tmp_path: Path, empty: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rdev.toml"
    file.write_text('database_dsn = "host=of-the-file"\n')
    environment = {"DB_HOST": "of-the-environment", **empty}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = load_settings(environment, file).database_dsn
    assert found is not None
    assert found.get_secret_value() == "host='of-the-environment'"


def test_a_user_that_the_system_does_not_know_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number: no HOME and no line in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert base_env()["HOME"] == "/"


def test_a_dsn_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin",
        "RDEV_DATABASE_DSN": "no dsn at all",
        "RDEV_ADMIN_KEY": "k" * 32,
        "RDEV_STATE_DIR": str(tmp_path / "state"),
        "RDEV_BIND": "127.0.0.1:0",
    }
    refused = rdev("serve", environment=environment)
    assert refused.returncode in (1, 2)
    told = refused.stderr.decode()
    assert told.count("\n") == 1, told
    assert "RDEV_DATABASE_DSN" in told


def test_a_port_that_is_taken_is_told_in_one_line(server: Server, unstarted: Server) -> None:
    taken = server.url.removeprefix("http://")
    refused = rdev("serve", environment=unstarted.environment | {"RDEV_BIND": taken})
    assert refused.returncode == 1
    told = [line for line in refused.stderr.decode().splitlines() if line.startswith("rdev:")]
    assert len(told) == 1, refused.stderr.decode()
    assert taken in told[0]
    assert "Traceback" not in refused.stderr.decode()


def test_the_first_start_makes_a_key_and_writes_it_for_its_owner_only(unstarted: Server) -> None:
    unstarted.settings["RDEV_ADMIN_KEY"] = ""
    unstarted.start()
    file = unstarted.state_dir / "admin-key"
    assert file.stat().st_mode & 0o777 == 0o600
    key = file.read_text().strip()
    assert len(key) >= 32
    assert key not in unstarted.log
    assert str(file) in unstarted.log

    def status(key: str | None) -> int:
        headers = {} if key is None else {"X-API-Key": key}
        url = unstarted.url + "/projects"
        return httpx2.get(url, headers=headers, trust_env=False).status_code

    assert (status(key), status(None), status("x" * 40)) == (200, 401, 401)
    unstarted.end(SIGTERM)
    unstarted.start()
    assert file.read_text().strip() == key
    assert status(key) == 200


@pytest.mark.parametrize("half", ["", "\n", "short\n"])
def test_half_a_key_file_never_lets_anybody_in(unstarted: Server, half: str) -> None:
    unstarted.settings["RDEV_ADMIN_KEY"] = ""
    (unstarted.state_dir / "admin-key").write_text(half)
    if half.strip():
        refused = rdev("serve", environment=unstarted.environment)
        assert refused.returncode == 1
        assert b"admin-key" in refused.stderr
        return
    unstarted.start()
    assert httpx2.get(unstarted.url + "/projects", trust_env=False).status_code == 401
    assert len((unstarted.state_dir / "admin-key").read_text().strip()) >= 32


def test_a_kept_key_that_is_no_text_is_refused_in_one_line(unstarted: Server) -> None:
    unstarted.settings["RDEV_ADMIN_KEY"] = ""
    (unstarted.state_dir / "admin-key").write_bytes(b"\xff" * 40)
    refused = rdev("serve", environment=unstarted.environment)
    assert (refused.returncode, refused.stderr.count(b"\n")) == (1, 1), refused.stderr


def test_an_admin_key_may_be_any_string(unstarted: Server) -> None:
    unstarted.settings["RDEV_ADMIN_KEY"] = unstarted.key = "schlüssel-" + "k" * 32
    unstarted.start()
    environment = unstarted.client_environment
    listed = rdev("projects", "list", environment=environment)
    assert (listed.returncode, listed.stderr) == (0, b"")


def test_a_url_that_is_none_is_told_in_one_line() -> None:
    environment = {"PATH": "/usr/bin", "RDEV_URL": "http://[::x", "RDEV_KEY": "k"}
    refused = rdev("projects", "list", environment=environment)
    assert refused.returncode == 1
    assert refused.stderr.count(b"\n") == 1, refused.stderr


def test_a_key_from_a_file_is_taken(unstarted: Server, tmp_path: Path) -> None:
    unstarted.settings |= {"RDEV_ADMIN_KEY": "", "RDEV_ADMIN_KEY_FILE": str(tmp_path / "key")}
    (tmp_path / "key").write_text("k" * 32 + "\n")
    unstarted.start()
    headers = {"Authorization": "Bearer " + "k" * 32}
    url = unstarted.url + "/projects"
    assert httpx2.get(url, headers=headers, trust_env=False).status_code == 200
    assert not (unstarted.state_dir / "admin-key").exists()


async def test_an_unmigrated_database_is_told_and_cured_without_a_restart(
    quick_place: Path, database_dsn: str
) -> None:
    with open_state(quick_place, RDEV_DATABASE_DSN=database_dsn, RDEV_DRAIN_DELAY_S="0") as server:
        server.start(ready=False)
        told = httpx2.get(server.url + "/ready", trust_env=False)
        assert told.status_code == 503
        check = told.json()["checks"]["migrations"]
        assert check["status"] == "unhealthy"
        assert "0001_commands.sql" in check["message"]
        assert "rdev migrate up" in check["message"]
        assert probe(server.url + "/health") == 200
        async with open_api(server) as api:
            refused = await api.post("/projects", {"id": "demo"})
            assert refused.status_code == 503, refused.text
            assert refused.headers["Retry-After"]

        done = rdev("migrate", "up", environment=server.environment)
        assert done.returncode == 0, done.stderr
        assert b"applied 0001_commands.sql" in done.stdout
        until(lambda: probe(server.url + "/ready") == 200, "it is ready", server)
        async with open_api(server) as api:
            await api.project()
            assert (await api.run("true"))["status"] == "succeeded"


async def test_a_database_that_is_away_at_the_start_is_waited_for(
    quick_place: Path, tmp_path: Path
) -> None:
    dsn = f"host={tmp_path} dbname=nowhere user=nobody"
    with open_state(quick_place, RDEV_DATABASE_DSN=dsn, RDEV_DRAIN_DELAY_S="0") as server:
        server.start(ready=False)
        told = httpx2.get(server.url + "/ready", trust_env=False)
        assert (told.status_code, told.json()["checks"]["database"]["status"]) == (503, "unhealthy")
        assert probe(server.url + "/health") == 200
        assert server.end(SIGTERM) == 0


async def test_no_secret_is_ever_logged(quick_place: Path) -> None:
    canary = "canary-4f3b2a1908"
    with open_server(quick_place, RDEV_LOG_LEVEL="debug", SOME_SECRET=canary) as server:
        async with open_api(server) as api:
            await api.project()
            secrets = {"env": {"TOKEN": canary}, "stdin": canary}
            command = await api.submit("env; printf %s $TOKEN | wc -c", **secrets)
            await api.ended(command)
            assert canary.encode() in await api.output(command)
            bare = await api.submit("env")
            await api.ended(bare)
            assert canary.encode() not in await api.output(bare)
            await api.get(f"/projects?token={canary}")
            await api.get("/projects", headers={"X-API-Key": canary})
            shown = json.dumps(await api.command(command))
            assert canary not in shown
        assert server.end(SIGTERM) == 0
        assert canary not in server.log
        assert server.key not in server.log
