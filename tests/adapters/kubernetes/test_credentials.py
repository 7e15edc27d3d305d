"""Who rdev says it is to the API server."""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
import trio
import trio.testing
from lightkube.config.models import NameValue, User, UserExec
from lightkube.resources.core_v1 import Pod

from rdev.adapters.kubernetes.connection import ApiServer, connect, read_config
from rdev.adapters.kubernetes.credentials import Fixed, Plugin, TokenFile, credentials_of
from rdev.adapters.kubernetes.websocket import open_websocket
from rdev.domain.errors import ErrorCode, RdevError
from tests.adapters.execution.observing import until
from tests.adapters.execution.pods import POD, pod
from tests.adapters.kubernetes.conftest import config_of
from tests.fakes.api_server import FakeApiServer

PLUGIN = """
import json, os, sys
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
with open(sys.argv[1], "a") as file:
    file.write(info["apiVersion"] + " " + str(info["spec"]["interactive"]) + "\\n")
count = len(open(sys.argv[1]).readlines())
status = {"token": os.environ["WHO"] + str(count)}
if len(sys.argv) > 2:
    status["expirationTimestamp"] = sys.argv[2]
print(json.dumps({"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": status}))
"""


def plugin(tmp_path: Path, *words: str, version: str = "v1") -> User:
    script = tmp_path / "plugin.py"
    script.write_text(PLUGIN)
    return User(
        exec=UserExec(
            apiVersion=f"client.authentication.k8s.io/{version}",
            command=sys.executable,
            args=[str(script), str(tmp_path / "asked"), *words],
            env=[NameValue(name="WHO", value="me-")],
        )
    )


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
async def test_a_plugin_is_asked_once_for_a_token_without_an_end(
    tmp_path: Path, version: str
) -> None:
    credentials = credentials_of(plugin(tmp_path, version=version))
    assert [await credentials.header() for _ in range(3)] == ["Bearer me-1"] * 3
    said = (tmp_path / "asked").read_text()
    assert said == f"client.authentication.k8s.io/{version} False\n"


async def test_a_plugin_is_asked_again_before_its_token_ends(tmp_path: Path) -> None:
    now = [datetime(2026, 1, 1, 12, tzinfo=UTC)]
    user = plugin(tmp_path, "2026-01-01T13:00:00Z")
    credentials = credentials_of(user, now=lambda: now[0])
    assert await credentials.header() == "Bearer me-1"
    now[0] += timedelta(minutes=58)
    assert await credentials.header() == "Bearer me-1"
    now[0] += timedelta(minutes=1, seconds=1)
    assert await credentials.header() == "Bearer me-2"


async def test_a_plugin_is_asked_again_when_its_token_is_refused(
    fake: FakeApiServer, tmp_path: Path
) -> None:
    fake.token = "me-2"
    config = config_of(fake)._replace(user=plugin(tmp_path))
    async with connect(config) as api:
        response = await api.http.get("/api/v1/namespaces/rdev/pods")
    assert response.status_code == 200


async def test_requests_that_are_refused_together_ask_the_plugin_once(
    fake: FakeApiServer, tmp_path: Path
) -> None:
    """Each threw the token away that another one had fetched meanwhile, and fetched its own."""
    fake.token = "me-2"
    config = config_of(fake)._replace(user=plugin(tmp_path))
    statuses: list[int] = []

    async def ask(api: ApiServer) -> None:
        statuses.append((await api.http.get("/api/v1/namespaces/rdev/pods")).status_code)

    async with connect(config) as api, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, api)
    assert statuses == [200] * 20
    assert len((tmp_path / "asked").read_text().splitlines()) == 2


async def test_an_exec_waits_for_a_plugin_longer_than_for_an_answer(
    fake: FakeApiServer, tmp_path: Path
) -> None:
    """It was ended with the time for a connection, and begun again by the next who needed it."""
    script = 'sleep 1; echo \'{"status": {"token": "the-token"}}\''
    slow = UserExec(apiVersion="client.authentication.k8s.io/v1", command="sh", args=["-c", script])
    fake.put("pods", pod())
    path = f"/api/v1/namespaces/rdev/pods/{POD}/exec"
    params = [("command", "true"), ("container", "project"), ("stdout", "true")]
    async with (
        connect(config_of(fake)._replace(user=User(exec=slow))) as api,
        open_websocket(
            api.http, path, params=params, subprotocols=["v4.channel.k8s.io"], connect_s=0.5
        ) as socket,
    ):
        assert socket.subprotocol == "v4.channel.k8s.io"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/no/such/program"], "No such file"),
        (["false"], "ended with 1"),
        (["echo", "noise"], "not understood"),
        (["printf", r'{"status": {"token": "\377"}}'], "not understood"),
        (["cat", "/dev/zero"], "says more than"),
        (["echo", '{"status": {}}'], "gives no token"),
    ],
)
async def test_a_plugin_that_fails_says_how(argv: list[str], says: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    broken = Plugin(argv=argv, env={}, api_version="v1", now=lambda: now)
    with pytest.raises(RdevError, match=says) as caught:
        await broken.header()
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


async def test_who_waits_for_a_plugin_has_its_failure_too(tmp_path: Path) -> None:
    """Each ran it again: the tenth of those who wait for a plugin that hangs waited ten minutes."""
    asked, go = tmp_path / "asked", tmp_path / "go"
    script = f"echo >> {asked}; while [ ! -e {go} ]; do sleep 0.05; done; exit 3"
    now = datetime(2026, 1, 1, tzinfo=UTC)
    broken = Plugin(argv=["sh", "-c", script], env={}, api_version="v1", now=lambda: now)
    failures: list[str] = []

    async def ask() -> None:
        with pytest.raises(RdevError) as caught:
            await broken.header()
        failures.append(caught.value.message)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            go.touch()
        assert (len(failures), len(set(failures))) == (10, 1)
        assert asked.read_text() == "\n"
        await ask()  # who comes later tries again
    assert asked.read_text() == "\n\n"


async def test_who_waits_for_one_that_was_cancelled_asks_itself(tmp_path: Path) -> None:
    """It was told how an earlier try had failed."""
    asked, go = tmp_path / "asked", tmp_path / "go"
    token = '{"status": {"token": "me"}}'
    script = (
        f"[ -e {asked} ] || {{ echo > {asked}; exit 3; }}; "
        f"while [ ! -e {go} ]; do sleep 0.05; done; echo '{token}'"
    )
    now = datetime(2026, 1, 1, tzinfo=UTC)
    slow = Plugin(argv=["sh", "-c", script], env={}, api_version="v1", now=lambda: now)
    with pytest.raises(RdevError, match="ended with 3"):
        await slow.header()
    told: list[str | None] = []

    async def wait() -> None:
        told.append(await slow.header())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, trio.open_nursery() as first:
            first.start_soon(slow.header)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.05)
            go.touch()
            first.cancel_scope.cancel()
    assert told == ["Bearer me"]


async def test_a_plugin_goes_on_when_who_asked_it_has_gone(tmp_path: Path) -> None:
    """It was ended with them: probes that wait for a second began it again and again."""
    asked, go = tmp_path / "asked", tmp_path / "go"
    script = (
        f"echo >> {asked}; while [ ! -e {go} ]; do sleep 0.05; done; "
        """echo '{"status": {"token": "me"}}'"""
    )
    now = datetime(2026, 1, 1, tzinfo=UTC)
    slow = Plugin(argv=["sh", "-c", script], env={}, api_version="v1", now=lambda: now)
    with trio.fail_after(60):
        for _ in range(3):
            with trio.move_on_after(0.2) as probe:
                await slow.header()
            assert probe.cancelled_caught
        await until(asked.exists, "it runs")
        go.touch()
        assert await slow.header() == "Bearer me"
    assert asked.read_text() == "\n"


@pytest.mark.parametrize("how", ["answered", "left alone"])
async def test_a_plugin_has_a_time_however_many_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """And what one said that nobody has asked for since is no credential of now."""
    monkeypatch.setattr("rdev.adapters.kubernetes.credentials.PLUGIN_S", 0.5)
    go = tmp_path / "go"
    script = f"[ -e {go} ] || exec sleep 1000; echo '{_ANSWER}'"
    now = datetime(2026, 1, 1, tzinfo=UTC)
    slow = Plugin(argv=["sh", "-c", script], env={}, api_version="v1", now=lambda: now)
    with trio.fail_after(60):
        if how == "answered":
            with pytest.raises(RdevError, match="does not end"):
                await slow.header()
        else:
            with trio.move_on_after(0.1):
                await slow.header()
            await trio.sleep(0.5)  # its time
        monkeypatch.setattr("rdev.adapters.kubernetes.credentials.PLUGIN_S", 30.0)
        go.touch()
        assert await slow.header() == "Bearer the-token"


async def test_a_plugin_ends_with_the_connection(fake: FakeApiServer, tmp_path: Path) -> None:
    mine = tmp_path / "pid"
    script = f"echo $$ > {mine}.new; mv {mine}.new {mine}; exec sleep 1000"
    slow = UserExec(apiVersion="client.authentication.k8s.io/v1", command="sh", args=["-c", script])
    with trio.fail_after(60):
        async with connect(config_of(fake)._replace(user=User(exec=slow))) as api:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(api.http.get, "/api/v1/namespaces/rdev")
                await until(mine.exists, "it runs")
                nursery.cancel_scope.cancel()
            os.kill(int(mine.read_text()), 0)  # it goes on
        with pytest.raises(ProcessLookupError):
            os.kill(int(mine.read_text()), 0)


async def test_a_rotated_token_is_used_at_once(fake: FakeApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    async with connect(config_of(fake)._replace(user=User(token_file=str(token)))) as api:
        path = "/api/v1/namespaces/rdev/pods"
        assert (await api.http.get(path)).status_code == 200
        fake.token = "rotated"
        token.write_text("rotated\n")
        assert (await api.http.get(path)).status_code == 200
        assert len(fake.requests) == 2  # none was refused on the way
        assert [pod async for pod in api.objects.list(Pod)] == []  # lightkube is known by it too


async def test_a_missing_token_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(RdevError) as caught:
        await TokenFile(str(tmp_path / "none")).header()
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE


async def header_of(source: str, token: str, tmp_path: Path) -> str | None:
    """What a user is known by whose token comes from there."""
    if source == "kubeconfig":
        return await credentials_of(User(token=token)).header()
    if source == "file":
        (tmp_path / "token").write_text(token)
        return await credentials_of(User(token_file=str(tmp_path / "token"))).header()
    user = plugin(tmp_path)
    assert user.exec is not None
    user.exec.env = [NameValue(name="WHO", value=token)]
    return await credentials_of(user).header()


@pytest.mark.parametrize("source", ["kubeconfig", "file", "plugin"])
async def test_a_token_that_no_header_can_hold_is_refused_without_a_word_of_it(
    tmp_path: Path, source: str
) -> None:
    """What sends it told the whole token in its error, which went to the log."""
    for token in ("hunter2\nhunter3", "hunter2 hunter3\0" if source != "plugin" else "hunter2 x"):
        with pytest.raises(RdevError, match="is no token") as caught:
            await header_of(source, token, tmp_path)
        assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
        assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("source", ["kubeconfig", "file"])
async def test_a_line_break_behind_a_token_is_not_part_of_it(tmp_path: Path, source: str) -> None:
    assert await header_of(source, "hunter2\n", tmp_path) == "Bearer hunter2"


async def test_an_empty_token_file_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(RdevError, match="is empty"):
        await header_of("file", "\n", tmp_path)


async def test_what_a_user_can_be_known_by() -> None:
    assert await credentials_of(None).header() is None
    assert await credentials_of(User()).header() is None
    assert await credentials_of(User(token="t")).header() == "Bearer t"
    basic = credentials_of(User(username="u", password="p"))
    assert await basic.header() == httpx2.BasicAuth("u", "p")._auth_header
    assert not Fixed("x").forget("x")


@pytest.mark.parametrize(
    "user",
    [
        User(auth_provider={"name": "gcp"}),
        User(exec=UserExec(apiVersion="client.authentication.k8s.io/v9", command="x")),
    ],
)
def test_what_is_not_supported_is_told_at_the_start(user: User) -> None:
    with pytest.raises(RdevError, match="not supported"):
        credentials_of(user)


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RdevError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{server}"}}}}]
users: [{{name: u, user: {{{user}}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u, namespace: rdev}}}}]
current-context: x
"""


@pytest.mark.parametrize("field", ["proxy-url", "tls-server-name"])
def test_a_way_that_is_not_known_here_is_told_at_the_start(tmp_path: Path, field: str) -> None:
    """It was dropped without a word, and the API server asked by another way than was meant."""
    file = tmp_path / "kubeconfig"
    text = KUBECONFIG.format(server="https://127.0.0.1:1", user="token: t")
    file.write_text(text.replace("{server:", f"{{{field}: there, server:"))
    with pytest.raises(RdevError, match=f"{field} is not supported") as caught:
        read_config(file)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    file.write_text(text.replace("{server:", f'{{{field}: "", server:'))
    assert read_config(file).cluster.server == "https://127.0.0.1:1"  # it says nothing
    other = f"clusters: [{{name: other, cluster: {{{field}: there, server: a}}}}, "
    file.write_text(text.replace("clusters: [", other))
    assert read_config(file).cluster.server == "https://127.0.0.1:1"  # it is not asked


@pytest.mark.parametrize("field", ["as", "as-groups"])
def test_to_be_somebody_else_is_not_known_here(tmp_path: Path, field: str) -> None:
    """It was dropped without a word, and whoever was meant to have fewer rights had all."""
    file = tmp_path / "kubeconfig"
    file.write_text(KUBECONFIG.format(server="https://127.0.0.1:1", user=f"token: t, {field}: x"))
    with pytest.raises(RdevError, match=f"{field} is not supported"):
        read_config(file)


_ANSWER = '{"status": {"token": "the-token"}}'


@pytest.mark.parametrize(
    "user",
    [
        "tokenFile: token",
        "exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin}",
        "exec: {apiVersion: client.authentication.k8s.io/v1, command: sh,"
        " args: [-c, 'echo \"$A\"'], env: [{name: A, value: '" + _ANSWER + "'}]}",
    ],
)
async def test_relative_paths_are_the_kubeconfigs_neighbours(
    fake: FakeApiServer, tmp_path: Path, user: str
) -> None:
    (tmp_path / "token").write_text("the-token")
    (tmp_path / "plugin").write_text(f"#!/bin/sh\necho '{_ANSWER}'\n")
    (tmp_path / "plugin").chmod(0o755)
    file = tmp_path / "kubeconfig"
    file.write_text(KUBECONFIG.format(server=f"http://127.0.0.1:{fake.port}", user=user))
    async with connect(read_config(file)) as api:
        assert (await api.http.get("/api/v1/namespaces/rdev/pods")).status_code == 200


@pytest.mark.parametrize(
    "user", ["client-certificate: a", 'client-certificate-data: "!!!", client-key-data: "x"']
)
async def test_certificates_that_are_none_are_told(tmp_path: Path, user: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(KUBECONFIG.format(server="https://127.0.0.1:1", user=user))
    with pytest.raises(RdevError, match="certificates of the cluster"):
        async with connect(read_config(file)):
            pass
