"""deploy/k8s as an operator applies it, and the server under its own account with RBAC enforced.

The cluster is 1.20: two kinds are applied by the name that they had then (the same fields), fields
that it does not know yet are named here, and what it does not enforce (policies of the network, the
namespace's profile) is proven nowhere here.
"""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import yaml

from tests.app.server import Api, open_api
from tests.cluster.real import (
    DEADLINE_S,
    IMAGES,
    NAMESPACE,
    RealCluster,
    admin,
    given,
    kubectl,
    serving,
    stands,
)
from tests.deploy.conftest import DEPLOY, Object, build, read_yaml
from tests.deploy.test_role import granted

ACCESS = DEPLOY / "k8s" / "base" / "access.yaml"
EXAMPLE = DEPLOY / "k8s" / "base" / "secrets.example.yaml"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:rdev-api"
OLDER = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
# Before 1.35 an exec over WebSocket is a `get` and nothing else.
NOT_ASKED_YET = {("pods/exec", "create")}


async def as_known(objects: tuple[Object, ...]) -> list[Object]:
    """The objects by the names that the cluster knows."""
    known = (await kubectl("api-versions")).split()
    return [
        o if o["apiVersion"] in known else {**o, "apiVersion": OLDER[o["apiVersion"]]}
        for o in objects
    ]


def lacking(sent: object, kept: object, path: str = "") -> list[str]:
    """What was sent and is not there: an older API server drops what it does not know."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        return [
            found
            for name, value in sent.items()
            for found in lacking(value, kept.get(name), f"{path}.{name}")
        ]
    if isinstance(sent, list) and isinstance(kept, list) and len(sent) == len(kept):
        return [
            found
            for one, other in zip(sent, kept, strict=True)
            for found in lacking(one, other, f"{path}[]")
        ]
    # An empty selector or map is not kept as such; `0440` is 288.
    return [] if sent == kept or (not sent and kept is None) else [f"{path}: {sent!r} is {kept!r}"]


@asynccontextmanager
async def applied(objects: list[Object]) -> AsyncIterator[None]:
    """The objects in the cluster; all but the namespace go with the block."""
    text = yaml.safe_dump_all(objects).encode()
    await kubectl("apply", "--validate=false", "-f", "-", stdin=text)
    try:
        yield
    finally:
        ours = yaml.safe_dump_all([o for o in objects if o["kind"] != "Namespace"]).encode()
        with trio.CancelScope(shield=True):  # shielded: the next test finds it as this one did
            await kubectl(
                *("delete", "--ignore-not-found", "--grace-period=0", "--force", "-f", "-"),
                stdin=ours,
            )


@pytest.mark.parametrize("place", ["base", "overlays/dev", "overlays/production"])
async def test_what_is_built_is_applied_and_kept_whole(place: str) -> None:
    admin()
    objects = await as_known(build(place))
    objects += [
        {**o, "metadata": {**o["metadata"], "namespace": NAMESPACE}} for o in read_example()
    ]
    async with applied(objects):
        dropped = []
        for sent in objects:
            group, _, version = sent["apiVersion"].rpartition("/")
            kind = ".".join([sent["kind"].lower(), *([version, group] if group else [])])
            at = ("-n", NAMESPACE, kind, sent["metadata"]["name"])
            kept = json.loads(await kubectl("get", *at, "--output=json"))
            if sent["kind"] == "Secret":
                assert set(kept["data"]) == set(sent["stringData"])
                continue
            dropped += [f"{sent['kind']}{one}" for one in lacking(sent, kept)]
        assert dropped == []


def read_example() -> list[Object]:
    return read_yaml(EXAMPLE.read_text())


@asynccontextmanager
async def under_its_own_account(cluster: RealCluster) -> AsyncIterator[Path]:
    """The kubeconfig of the server's ServiceAccount, with the Role of the manifests."""
    objects = [
        {**o, "metadata": {**o["metadata"], "namespace": NAMESPACE}}
        for o in read_yaml(ACCESS.read_text())
    ]
    for one in objects:
        for subject in one.get("subjects", ()):
            subject["namespace"] = NAMESPACE
    async with applied(objects):
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/rdev-api/token"
        said = await kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(asked).encode())
        config = yaml.safe_load(given().read_text())
        for user in config["users"]:
            user["user"] = {"token": json.loads(said)["status"]["token"]}
        file = cluster.folder / "own.kubeconfig"
        file.write_text(json.dumps(config))
        yield file


def audited() -> list[Object]:
    """What the account asked of the API server, by the API server's own log."""
    run = admin().parent / "run"
    if not run.is_dir():
        pytest.skip("not a cluster of tests/cluster/up.sh")
    log = run / "audit.log"  # made with its first line
    text = log.read_text() if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [one for one in lines if one["user"]["username"] == ACCOUNT]


def right(entry: Object) -> tuple[str, str]:
    about = entry["objectRef"]
    parts = [about["resource"], *([about["subresource"]] if "subresource" in about else [])]
    return "/".join(parts), entry["verb"]


async def made_by_template(api: Api) -> None:
    """A project with the template's volume: its files outlive its pod, and nothing outlives it."""
    project = f"made-{uuid.uuid4().hex[:6]}"
    made = await api.post("/projects", {"id": project, "image": IMAGES["busybox"]})
    assert made.status_code == 201, made.text
    await stands(api, project, "ready")
    first = await api.run("id -u; echo kept >/workspace/file", project=project)
    assert (first["status"], await api.output(str(first["id"]))) == ("succeeded", b"10001\n")
    assert (await api.http.post(f"/projects/{project}/stop")).status_code == 202
    await stands(api, project, "stopped")
    assert (await api.http.post(f"/projects/{project}/start")).status_code == 202
    await stands(api, project, "ready")
    second = await api.run("cat /workspace/file", project=project)
    assert await api.output(str(second["id"])) == b"kept\n"
    assert (await api.http.delete(f"/projects/{project}")).status_code == 202
    await stands(api, project, "gone")
    left = await kubectl("get", "pods,persistentvolumeclaims", "-n", NAMESPACE, "-o", "name")
    assert project not in left


async def test_the_server_uses_each_right_of_its_role_and_no_other(
    quick_place: Path, cluster: RealCluster
) -> None:
    before = len(audited())
    await cluster.add_pod()
    async with under_its_own_account(cluster) as kubeconfig:
        settings = {**cluster.settings, "RDEV_KUBECONFIG": str(kubeconfig)}
        async with serving(quick_place, settings) as server, open_api(server) as api:
            await api.project()
            assert (await api.run("echo all well"))["status"] == "succeeded"
            command = await api.submit("sleep 1000")
            await api.running(command)
            assert (await api.http.delete(f"/commands/{command}")).is_success
            assert (await api.ended(command))["status"] == "cancelled"
            await made_by_template(api)
        seen = audited()[before:]
    resources = [entry for entry in seen if "objectRef" in entry]
    refused = [right(one) for one in resources if one["responseStatus"]["code"] in (401, 403)]
    assert refused == []
    assert {right(one) for one in resources} == granted() - NOT_ASKED_YET
    assert {one["objectRef"].get("namespace") for one in resources} <= {NAMESPACE, None}


async def test_without_a_right_the_server_says_which(
    quick_place: Path, cluster: RealCluster
) -> None:
    """The account is there, its role is not."""
    async with under_its_own_account(cluster) as kubeconfig:
        await kubectl("delete", "rolebinding", "-n", NAMESPACE, "rdev-api")
        settings = {**cluster.settings, "RDEV_KUBECONFIG": str(kubeconfig)}
        async with serving(quick_place, settings, ready=False) as server:
            with trio.fail_after(DEADLINE_S):
                while "kubernetes answers 403" not in server.log:
                    await trio.sleep(0.1)
            assert ACCOUNT in server.log
