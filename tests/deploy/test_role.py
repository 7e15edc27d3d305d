"""The role of the server is what its code asks of an API server, no more and no less."""

import re

import trio

from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.exec import PodExecs
from rdev.adapters.kubernetes.namespace import Namespace
from rdev.adapters.kubernetes.places import PodPlaces
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.adapters.kubernetes.template import read_template
from rdev.domain.ids import ProjectId
from tests.adapters.execution.observing import SYSTEM_PATH, until
from tests.adapters.execution.pods import pod
from tests.adapters.kubernetes.conftest import config_of
from tests.adapters.kubernetes.test_places import WHEN, project
from tests.deploy.conftest import DEPLOY, one, read_yaml
from tests.fakes.api_server import NAMESPACE, api_server

# From 1.35 on an exec over WebSocket needs both; before, what its method says.
EXEC = {("pods/exec", "get"), ("pods/exec", "create")}


def granted() -> set[tuple[str, str]]:
    """Every (resource, verb) that the role allows."""
    objects = read_yaml((DEPLOY / "k8s" / "base" / "access.yaml").read_text())
    rules = one(objects, "Role")["rules"]
    named = {name for rule in rules for name in rule.get("resourceNames", ())}
    assert named == {NAMESPACE}
    return {
        (resource, verb)
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if rule["apiGroups"] == [""]
    }


def asked(method: str, path: str) -> set[tuple[str, str]]:
    """What a request of the code needs, as the API server counts it."""
    found = re.fullmatch(r"/api/v1/namespaces/[^/]+/(?P<kind>[a-z]+)(/[^/]+(?P<sub>/.+)?)?", path)
    if path == f"/api/v1/namespaces/{NAMESPACE}":
        return {("namespaces", "get")}
    assert found is not None, path
    if method == "EXEC":
        return EXEC
    if method == "GET" and found[2] is not None:
        return {(found["kind"], "get")}
    if method in ("POST", "DELETE"):
        return {(found["kind"], {"POST": "create", "DELETE": "delete"}[method])}
    assert (method, found[2]) == ("GET", None), (method, path)  # others need a line here
    # One path, told apart by `?watch=`: whoever lists pods watches them.
    return {(found["kind"], "list"), (found["kind"], "watch")}


async def test_the_role_is_what_the_code_asks() -> None:
    async with (
        api_server({"PATH": SYSTEM_PATH}) as fake,
        connect(config_of(fake)) as api,
        trio.open_nursery() as nursery,
    ):
        fake.put("pods", pod())
        watch = PodWatch(api, changed=lambda _: None)
        await nursery.start(watch.run)
        await until(lambda: watch.is_current and fake.watches_open == 1, "the watch hears")
        execs = PodExecs(api, watch.target_of, subprotocols=SUBPROTOCOLS)
        await Namespace(api).check()
        async with execs.open(ProjectId("demo"), ["true"]):
            pass
        fake.drop("pods", pod()["metadata"]["name"])
        places = PodPlaces(api, watch, read_template(None), now=lambda: WHEN)
        for _ in range(2):
            await places.start(project(), patience_s=1)
        await places.stop(project(), patience_s=1)
        await places.delete(project(), patience_s=1)
        requests = list(fake.requests)
        watch.stop()
        nursery.cancel_scope.cancel()

    needed = set().union(*(asked(method, path) for method, path in requests))
    assert needed > EXEC
    assert granted() == needed


def test_the_binding_gives_the_role_to_the_server_alone() -> None:
    objects = read_yaml((DEPLOY / "k8s" / "base" / "access.yaml").read_text())
    binding = one(objects, "RoleBinding")

    assert {o["kind"] for o in objects} == {"ServiceAccount", "Role", "RoleBinding"}
    assert binding["roleRef"]["name"] == "rdev-api"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "rdev-api"}]
    (server, *_) = read_yaml((DEPLOY / "k8s" / "base" / "server.yaml").read_text())
    assert server["spec"]["template"]["spec"]["serviceAccountName"] == "rdev-api"
