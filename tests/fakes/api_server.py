"""A Kubernetes API server without Kubernetes: objects, list and watch, execs, faults by script.

Passes tests/adapters/kubernetes/test_contract.py, as real clusters do. A pod that is created runs
at once (`kubelet_runs`); everything else about its status is set by the test.
"""

import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, request, websocket
from quart_trio import QuartTrio

from tests.fakes.pod_exec import PodExec

Object = dict[str, Any]
NAMESPACE = "rdev"
NAMESPACE_UID = "5d1c7a52-0000-4000-8000-00000000cafe"
KUBE_SYSTEM_UID = "0b5c1d1e-0000-4000-8000-00000000feed"
_KINDS = {
    "pods": "Pod",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "namespaces": "Namespace",
}
_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "AlreadyExists",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


@dataclass
class Fault:
    """The next `times` requests of this method whose path ends so are answered with `status`, or
    as ever where that is 200 and no `body` is given."""

    status: int
    method: str = "GET"
    path_end: str = "/pods"
    only_watches: bool = False
    times: int = 1
    retry_after_s: int | None = None
    message: str = "by script"
    body: str | bytes | None = None  # instead of a Status object: a proxy's page
    is_late: bool = False  # it is done all the same, and only its answer is this
    held: trio.Event | None = None  # nothing is done or answered before


@dataclass
class Tls:
    """Files: who signs, and a certificate with its key."""

    authority: str
    certificate: str


@dataclass
class FakeApiServer:
    """One namespace's worth of API server on 127.0.0.1:`port`; use within `api_server`."""

    execs: PodExec
    token: str = "the-token"
    kubelet_runs: bool = True
    faults: list[Fault] = field(default_factory=list)
    expired_in_band: bool = True  # 410 as an ERROR event, not as the answer's status
    watch_events: int | None = None  # so many, and each watch ends in order
    is_frozen: bool = False  # watches say nothing more, and stay open
    requests: list[tuple[str, str]] = field(default_factory=list)
    # (verb, resource) of what this account may not do, as access reviews say
    refused_rights: set[tuple[str, str]] = field(default_factory=set)
    page_size: int | None = None  # of lists, whatever they ask for
    watches_open: int = 0
    lingers: bool = False  # what is deleted stays, marked, until `finish`
    port: int = 0
    authority: str | None = None  # a file, where it speaks TLS
    version: int = 100
    _oldest: int = 0  # watches from before this version are told 410
    _objects: dict[tuple[str, str, str], Object] = field(default_factory=dict)
    _events: list[tuple[int, str, str, str, Object]] = field(default_factory=list)
    _changed: trio.Event = field(default_factory=trio.Event)

    def kubeconfig(self, port: int | None = None) -> Object:
        """For KubeConfig.from_dict; `port` is a proxy's."""
        cluster: Object = {"server": f"http://127.0.0.1:{port or self.port}"}
        if self.authority is not None:
            cluster = {
                "server": f"https://127.0.0.1:{port or self.port}",
                "certificate-authority": self.authority,
            }
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": self.token}}],
            "contexts": [
                {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}
            ],
            "current-context": "x",
        }

    # --- what a test does to the cluster ---

    def put(self, plural: str, body: Object, namespace: str = NAMESPACE) -> Object:
        """Create or replace, as if somebody else had."""
        name = body["metadata"]["name"]
        known = self._objects.get((plural, namespace, name))
        made = copy.deepcopy(body)
        made["metadata"].setdefault("namespace", namespace)
        uid = known["metadata"]["uid"] if known else f"uid-of-{name}-{self.version}"
        made["metadata"].setdefault("uid", uid)
        made["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        made["apiVersion"], made["kind"] = "v1", _KINDS[plural]
        self._record("MODIFIED" if known else "ADDED", plural, namespace, name, made)
        self._objects[plural, namespace, name] = made
        return made

    def patch_status(self, pod: str, **status: Any) -> None:
        """Set fields of a pod's status."""
        known = copy.deepcopy(self._objects["pods", NAMESPACE, pod])
        known["status"] = {**known.get("status", {}), **status}
        self.put("pods", known)

    def drop(self, plural: str, name: str, namespace: str = NAMESPACE) -> None:
        """Delete, as if somebody else had."""
        gone = self._objects.pop((plural, namespace, name))
        self._record("DELETED", plural, namespace, name, gone)

    def finish(self) -> None:
        """End what was deleted and lingers."""
        for plural, namespace, name in list(self._objects):
            if "deletionTimestamp" in self._objects[plural, namespace, name]["metadata"]:
                self.drop(plural, name, namespace)

    def names(self, plural: str) -> list[str]:
        """The objects of a kind."""
        places = (plural, NAMESPACE)
        return sorted(name for kind, place, name in self._objects if (kind, place) == places)

    def get(self, plural: str, name: str) -> Object:
        """An object as it is."""
        return self._objects[plural, NAMESPACE, name]

    def compact(self) -> None:
        """Forget history: a watch from before now is told 410."""
        self._oldest = self.version
        self._events.clear()

    def _record(self, event: str, plural: str, namespace: str, name: str, body: Object) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self._events.append((self.version, event, plural, namespace, copy.deepcopy(body)))
        self._changed.set()
        self._changed = trio.Event()

    # --- what it answers ---

    def _refused(self, method: str, path: str) -> Any:
        self.requests.append((method, path))
        head = (websocket if method == "EXEC" else request).headers
        if head.get("Authorization") != f"Bearer {self.token}":
            return _failure(401, "Unauthorized")
        is_watch = method == "GET" and request.args.get("watch") is not None
        for fault in self.faults:
            if (
                fault.times > 0
                and (fault.method, True) == (method, path.endswith(fault.path_end))
                and (is_watch or not fault.only_watches)
            ):
                fault.times -= 1
                failure = _failure(fault.status, fault.message, fault.retry_after_s, fault.body)
                failure.fault = fault
                return failure
        return None

    async def handle(self, namespace: str, plural: str, name: str | None) -> Any:
        """A request for objects. Read whole first: hypercorn leaves a connection on which it
        answered before the body's end to wait for 15 s."""
        await request.get_data()
        refused = self._refused(request.method, request.path)
        fault = getattr(refused, "fault", None)
        if fault is not None and fault.held is not None:
            await fault.held.wait()
        if fault is None:
            return refused or await self._serve(namespace, plural, name)
        is_served = fault.status == 200 and fault.body is None
        done = await self._serve(namespace, plural, name) if is_served or fault.is_late else None
        return done if is_served else refused

    async def _serve(self, namespace: str, plural: str, name: str | None) -> Any:
        match request.method, name:
            case "GET", None if request.args.get("watch"):
                return self._watch(namespace, plural)
            case "GET", None:
                return self._list(namespace, plural)
            case "POST", None:
                return await self._create(namespace, plural)
        known = self._objects.get((plural, namespace, name or ""))
        if known is None:
            return _failure(404, f'{plural} "{name}" not found')
        if request.method == "GET":
            return known
        if request.method == "DELETE":
            return await self._delete(namespace, plural, known)
        return _failure(405, "not here")

    async def _delete(self, namespace: str, plural: str, known: Object) -> Any:
        options = await request.get_json(force=True, silent=True) or {}
        only = options.get("preconditions", {}).get("uid")
        name = known["metadata"]["name"]
        if only is not None and only != known["metadata"]["uid"]:
            return _failure(409, f"uid in precondition: {only}")
        if self.lingers:
            stamp = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
            self.put(plural, {**known, "metadata": {**known["metadata"], **stamp}}, namespace)
        else:
            self.drop(plural, name, namespace)
        return known

    def _list(self, namespace: str, plural: str) -> Object:
        selector = request.args.get("labelSelector", "")
        items = [
            body
            for (kind, place, _), body in self._objects.items()
            if (kind, place) == (plural, namespace) and _matches(body, selector)
        ]
        at = int(request.args.get("continue") or 0)
        end = at + (self.page_size or len(items) or 1)
        more = {"continue": str(end)} if end < len(items) else {}
        return {
            "apiVersion": "v1",
            "kind": f"{_KINDS[plural]}List",
            "metadata": {"resourceVersion": str(self.version), **more},
            "items": items[at:end],
        }

    async def _create(self, namespace: str, plural: str) -> Any:
        body = await request.get_json(force=True)
        name = body["metadata"]["name"]
        if (plural, namespace, name) in self._objects:
            return _failure(409, f'{plural} "{name}" already exists')
        made = self.put(plural, {**body, "status": {"phase": "Pending"}}, namespace)
        if plural == "pods" and self.kubelet_runs:
            containers = [running(one["name"]) for one in body["spec"]["containers"]]
            self.patch_status(name, **ready_status(containers))
        return made, 201

    def _watch(self, namespace: str, plural: str) -> Response:
        after = int(request.args.get("resourceVersion") or self.version)
        within_s = float(request.args.get("timeoutSeconds") or 3600)
        selector = request.args.get("labelSelector", "")
        if after < self._oldest and not self.expired_in_band:
            return _failure(410, "too old resource version")
        body = self._events_after(after, namespace, plural, selector, within_s)
        response = Response(body, content_type="application/json")
        response.timeout = None
        return response

    async def _events_after(
        self, after: int, namespace: str, plural: str, selector: str, within_s: float
    ) -> AsyncIterator[bytes]:
        self.watches_open += 1
        try:
            if after < self._oldest:
                status = _status(410, f"too old resource version: {after}")
                yield _line({"type": "ERROR", "object": status})
                return
            ends = trio.current_time() + within_s
            left = float("inf") if self.watch_events is None else self.watch_events
            while trio.current_time() < ends and left > 0:
                changed = self._changed
                for version, event, kind, place, body in list(self._events):
                    if (
                        version > after
                        and (kind, place) == (plural, namespace)
                        and _matches(body, selector)
                        and not self.is_frozen
                    ):
                        yield _line({"type": event, "object": body})
                        if (left := left - 1) <= 0:
                            return
                after = self.version if not self.is_frozen else after
                with trio.move_on_at(ends):
                    await changed.wait()
        finally:
            self.watches_open -= 1

    async def review(self) -> Any:
        """A SelfSubjectAccessReview."""
        if (refused := self._refused("POST", request.path)) is not None:
            return refused
        body = await request.get_json()
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        allowed = (asked["verb"], resource) not in self.refused_rights
        return {**body, "status": {"allowed": allowed}}, 201

    async def exec(self, namespace: str, name: str) -> Any:
        """A WebSocket that asks for an exec. One that is refused ends its connection: hypercorn
        0.18 does not see the next upgrade on it."""
        refused = await self._exec(namespace, name)
        if refused is not None:
            refused.headers["Connection"] = "close"
        return refused

    async def _exec(self, namespace: str, name: str) -> Response | None:
        if (refused := self._refused("EXEC", websocket.path)) is not None:
            return refused
        pod = self._objects.get(("pods", namespace, name))
        if pod is None:
            return _failure(404, f'pods "{name}" not found')
        if pod.get("status", {}).get("phase") != "Running":
            return _failure(400, f"pod {name} does not have a host assigned")
        agreed = [one for one in self.execs.supported if one in websocket.requested_subprotocols]
        if not agreed:
            return _failure(400, "no subprotocol in common")
        await websocket.accept(subprotocol=agreed[0])
        await self.execs.serve(websocket.args.getlist("command"), agreed[0])
        return None


def running(name: str, **rest: Any) -> Object:
    """The status of a container that runs."""
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    return {"name": name, "ready": True, "restartCount": 0, "state": state, "image": "", **rest}


def ready_status(containers: list[Object]) -> Object:
    """The status of a pod that is ready."""
    condition = {"type": "Ready", "status": "True"}
    return {"phase": "Running", "conditions": [condition], "containerStatuses": containers}


def _status(code: int, message: str, retry_after_s: int | None = None) -> Object:
    details = {} if retry_after_s is None else {"details": {"retryAfterSeconds": retry_after_s}}
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "code": code,
        "reason": _REASONS.get(code, "Unknown"),
        "message": message,
        **details,
    }


def _failure(
    code: int, message: str, retry_after_s: int | None = None, body: str | bytes | None = None
) -> Response:
    text = body if body is not None else json.dumps(_status(code, message, retry_after_s))
    kind = "application/json" if body is None else "text/html"
    return Response(text, status=code, content_type=kind)


def _line(event: Object) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _matches(body: Object, selector: str) -> bool:
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, selector.split(",")):
        name, equals, value = term.partition("=")
        if (labels.get(name) != value) if equals else (name not in labels):
            return False
    return True


@asynccontextmanager
async def api_server(
    env: dict[str, str], *, ping_s: float | None = None, tls: Tls | None = None
) -> AsyncIterator[FakeApiServer]:
    """Serve one; `ping_s`: how often it pings the other side of an exec."""
    fake = FakeApiServer(execs=PodExec(env=env), authority=tls and tls.authority)
    for name, uid in ((NAMESPACE, NAMESPACE_UID), ("kube-system", KUBE_SYSTEM_UID)):
        fake.put("namespaces", {"metadata": {"name": name, "uid": uid}}, namespace="")
    app = QuartTrio("fake")
    objects = "/api/v1/namespaces/<namespace>/<plural>"
    app.add_url_rule(objects, "all", partial(fake.handle, name=None), methods=["GET", "POST"])
    app.add_url_rule(f"{objects}/<name>", "one", fake.handle, methods=["GET", "DELETE", "PATCH"])
    app.add_url_rule(
        "/api/v1/namespaces/<name>",
        "namespace",
        partial(fake.handle, namespace="", plural="namespaces"),
        methods=["GET", "DELETE"],
    )
    reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    app.add_url_rule(reviews, "review", fake.review, methods=["POST"])
    app.add_websocket(f"{objects.replace('<plural>', 'pods')}/<name>/exec", "exec", fake.exec)
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    if tls is not None:
        config.certfile = config.keyfile = tls.certificate
    config.websocket_ping_interval = ping_s
    config.graceful_timeout = 0
    try:
        async with trio.open_nursery() as nursery:
            (bound,) = await nursery.start(serve, app, config)
            fake.port = int(bound.rpartition(":")[2])
            try:
                yield fake
            finally:
                nursery.cancel_scope.cancel()
    finally:
        # shielded: processes of a test that fails must not stay
        with trio.CancelScope(shield=True):
            await fake.execs.end_all()
