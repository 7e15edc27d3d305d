"""JSON Schemas of what is answered, by name, with an example each; the document's components.

The events of a command's stream are made of the very structs that are encoded. The rest is held
against real answers by the tests (tests/app/test_openapi.py).
"""

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Final

import msgspec

from rdev.adapters.http.describe import Schema
from rdev.adapters.http.probes import Status as Health
from rdev.domain.audit_chain import FaultKind
from rdev.domain.commands import Kind, Priority, Status
from rdev.domain.errors import ErrorCode
from rdev.domain.feed import FeedComplete, FeedConnected, FeedStatus
from rdev.domain.ids import PROJECT_PATTERN
from rdev.domain.keys import KeyStatus, Scope
from rdev.domain.projects import ProjectStatus
from rdev.domain.stream import CompleteEvent, ConnectedEvent, GapEvent, StatusEvent

TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
FLAG: Final[Schema] = {"type": "boolean"}
ANYTHING: Final[Schema] = {"type": "object"}
MOMENT: Final[Schema] = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
}
PROJECT_ID: Final[Schema] = {"type": "string", "pattern": f"^(?:{PROJECT_PATTERN.pattern})$"}


def record(schemas: Mapping[str, Schema], *, optional: Collection[str] = ()) -> dict[str, object]:
    """An object with these members; further ones may be added one day."""
    required = [name for name in schemas if name not in optional]
    return {"type": "object", "properties": dict(schemas), "required": required}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    if "enum" in schema:
        values = schema["enum"]
        assert isinstance(values, list)
        return {**schema, "type": ["string", "null"], "enum": [*values, None]}
    return {**schema, "type": [schema["type"], "null"]}


def several(schema: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": schema}


def by_name(schema: Schema) -> Schema:
    """An object whose members, whatever their names, are all of this kind."""
    return {"type": "object", "additionalProperties": schema}


def one_of(values: Iterable[str]) -> Schema:
    """A text of a closed list."""
    return {"type": "string", "enum": [str(value) for value in values]}


def an_id(prefix: str) -> Schema:
    """An id with its prefix."""
    return {"type": "string", "pattern": f"^{prefix}[0-9a-f]{{32}}$"}


def ref(name: str) -> Schema:
    """A component."""
    return {"$ref": f"#/components/schemas/{name}"}


_COMMAND_ID = "cmd_019a8f2e4b7c7d1e8f3a5b6c7d8e9f01"
_KEY_ID = "key_019a8f2e4b7c7d1e8f3a5b6c7d8e9f02"
_WHEN = "2026-01-15T10:30:00.123Z"

META: Final = record(
    {"request_id": TEXT, "timestamp": MOMENT, "next_cursor": TEXT}, optional=["next_cursor"]
)
_DEPTH: Final = {"queued": COUNT, "oldest_wait_s": maybe(NUMBER)}
_COUNTS: Final = record(dict.fromkeys(Priority, COUNT))

SUBMITTED: Final = record(
    {
        "id": an_id("cmd_"),
        "project": PROJECT_ID,
        "kind": one_of(Kind),
        "status": one_of(Status),
        "priority": one_of(Priority),
        "queue_position": maybe(WHOLE),
        "stream_url": TEXT,
        "created_at": MOMENT,
        "exit_code": maybe(WHOLE),
        "duration_ms": maybe(COUNT),
        "stdout_tail": TEXT,
        "stderr_tail": TEXT,
    },
    optional=["exit_code", "duration_ms", "stdout_tail", "stderr_tail"],
) | {
    "description": "The last four come with `?wait` alone.",
    "examples": [
        {
            "id": _COMMAND_ID,
            "project": "demo",
            "kind": "shell",
            "status": "queued",
            "priority": "normal",
            "queue_position": 1,
            "stream_url": f"/commands/{_COMMAND_ID}/events",
            "created_at": _WHEN,
        }
    ],
}

COMMAND: Final = record(
    {
        "id": an_id("cmd_"),
        "project": PROJECT_ID,
        "kind": one_of(Kind),
        "status": one_of(Status),
        "priority": one_of(Priority),
        "attempt": COUNT,
        "exit_code": maybe(WHOLE),
        "signal": maybe(WHOLE),
        "reason": maybe(TEXT),
        "may_still_run": FLAG,
        "created_at": MOMENT,
        "started_at": maybe(MOMENT),
        "finished_at": maybe(MOMENT),
        "duration_ms": maybe(COUNT),
        "queue_wait_ms": maybe(COUNT),
        "stdout_bytes": COUNT,
        "stderr_bytes": COUNT,
        "dropped_bytes": COUNT,
        "truncated": FLAG,
        "argv": several(TEXT),
        "key_id": TEXT,
        "session_id": maybe(TEXT),
        "usage": maybe(ANYTHING),
        "kill": maybe(record({"confirmed": FLAG, "survivors": several(WHOLE)})),
        "stream_url": TEXT,
        "queue_position": WHOLE,
    },
    optional=["queue_position"],
) | {
    "examples": [
        {
            "id": _COMMAND_ID,
            "project": "demo",
            "kind": "shell",
            "status": "succeeded",
            "priority": "normal",
            "attempt": 1,
            "exit_code": 0,
            "signal": None,
            "reason": None,
            "may_still_run": False,
            "created_at": _WHEN,
            "started_at": _WHEN,
            "finished_at": _WHEN,
            "duration_ms": 41,
            "queue_wait_ms": 3,
            "stdout_bytes": 6,
            "stderr_bytes": 0,
            "dropped_bytes": 0,
            "truncated": False,
            "argv": ["sh", "-c", "echo hello"],
            "key_id": _KEY_ID,
            "session_id": None,
            "usage": None,
            "kill": None,
            "stream_url": f"/commands/{_COMMAND_ID}/events",
        }
    ]
}

PROJECT: Final = record(
    {
        "id": PROJECT_ID,
        "name": TEXT,
        "status": one_of(ProjectStatus),
        "reason": maybe(TEXT),
        "message": maybe(TEXT),
        "executor": TEXT,
        "pod": maybe(TEXT),
        "image": maybe(TEXT),
        "labels": by_name(TEXT),
        "annotations": by_name(TEXT),
        "last_seen": maybe(MOMENT),
        "created_at": MOMENT,
        "commands": record({"queued": COUNT, "running": COUNT}),
    }
) | {
    "examples": [
        {
            "id": "demo",
            "name": "demo",
            "status": "ready",
            "reason": None,
            "message": None,
            "executor": "local",
            "pod": None,
            "image": None,
            "labels": {},
            "annotations": {},
            "last_seen": None,
            "created_at": _WHEN,
            "commands": {"queued": 0, "running": 1},
        }
    ]
}

_KEY_MEMBERS: Final = {
    "id": an_id("key_"),
    "name": TEXT,
    "key_prefix": TEXT,
    "status": one_of(KeyStatus),
    "scopes": several(one_of(Scope)),
    "project_ids": maybe(several(PROJECT_ID)),
    "allowed_ips": several(TEXT),
    "rate_limit": maybe(record({"requests": WHOLE, "window_s": WHOLE})),
    "created_by": TEXT,
    "created_at": MOMENT,
    "expires_at": maybe(MOMENT),
    "revoked_at": maybe(MOMENT),
    "last_used_at": maybe(MOMENT),
}
_KEY_EXAMPLE: Final = {
    "id": _KEY_ID,
    "name": "ci",
    "key_prefix": "rdev_sk_Ab3dEf7h",
    "status": "active",
    "scopes": ["projects:execute"],
    "project_ids": ["demo"],
    "allowed_ips": ["203.0.113.0/24"],
    "rate_limit": None,
    "created_by": "admin",
    "created_at": _WHEN,
    "expires_at": "2026-04-15T10:30:00.123Z",
    "revoked_at": None,
    "last_used_at": None,
}
KEY: Final = record(_KEY_MEMBERS) | {"examples": [_KEY_EXAMPLE]}
SHOWN_KEY: Final = record(_KEY_MEMBERS | {"key": maybe(TEXT)}) | {
    "description": "`key` is the key's text: shown here once, null in a replay.",
    "examples": [_KEY_EXAMPLE | {"key": None}],
}

QUEUE: Final = record(
    {
        **_DEPTH,
        "running": COUNT,
        "priorities": record({each: record(_DEPTH) for each in Priority}),
        "projects": several(
            record({"id": PROJECT_ID, **_DEPTH, "running": COUNT, "priorities": _COUNTS})
        ),
        "projects_total": COUNT,
        "limits": record({"project_max": COUNT, "server_max": COUNT}),
        "server": record(
            {
                "running": COUNT,
                "running_max": COUNT,
                "claims_per_s": NUMBER,
                "claimed": COUNT,
                "finished": COUNT,
                "stale_writes": COUNT,
                "take_overs": COUNT,
            }
        ),
    }
)

AUDIT_ENTRY: Final = record(
    {
        "seq": COUNT,
        "at": MOMENT,
        "actor": record({"id": maybe(TEXT), "name": maybe(TEXT)}),
        "ip": maybe(TEXT),
        "request_id": maybe(TEXT),
        "action": TEXT,
        "target": maybe(TEXT),
        "project": maybe(TEXT),
        "outcome": TEXT,
        "detail": ANYTHING,
        "hash": TEXT,
        "prev_hash": maybe(TEXT),
    }
)
VERDICT: Final = record(
    {
        "valid": FLAG,
        "checked": COUNT,
        "last_seq": COUNT,
        "last_hash": TEXT,
        "more": FLAG,
        "fault": maybe(record({"kind": one_of(FaultKind), "seq": maybe(COUNT), "message": TEXT})),
    }
)

SESSION: Final = record({"key_id": TEXT, "expires_at": MOMENT})
STREAM_TOKEN: Final = record(
    {"token": TEXT, "stream_id": an_id("cmd_"), "url": TEXT, "expires_at": MOMENT}
)

HEALTH: Final = record({"status": one_of(Health)})
READY: Final = record(
    {
        "status": one_of(Health),
        "checks": by_name(
            record(
                {"status": one_of(Health), "latency_ms": COUNT, "message": TEXT},
                optional=["message"],
            )
        ),
    }
)

PROBLEM: Final = record(
    {
        "type": TEXT,
        "title": TEXT,
        "status": WHOLE,
        "detail": TEXT,
        "instance": TEXT,
        "error": record(
            {
                "code": one_of(ErrorCode),
                "message": TEXT,
                "details": several(record({"pointer": TEXT, "message": TEXT})),
                "info": ANYTHING,
            },
            optional=["info"],
        ),
        "meta": META,
    }
) | {
    "description": "RFC 9457, with the members of the original envelope.",
    "examples": [
        {
            "type": "urn:rdev:error:bad_request",
            "title": "Bad request",
            "status": 400,
            "detail": "/command: is required",
            "instance": "/projects/demo/shell",
            "error": {
                "code": "BAD_REQUEST",
                "message": "/command: is required",
                "details": [{"pointer": "/command", "message": "is required"}],
            },
            "meta": {"request_id": "req-019a8f2e4b7c7d1e8f3a5b6c7d8e9f03", "timestamp": _WHEN},
        }
    ],
}

COMPONENTS: Final[Mapping[str, Schema]] = {
    "Meta": META,
    "Problem": PROBLEM,
    "Project": PROJECT,
    "Submitted": SUBMITTED,
    "Command": COMMAND,
    "Key": KEY,
    "ShownKey": SHOWN_KEY,
    "Queue": QUEUE,
}

_OUTPUT: Final = record(
    {"stream": one_of(["stdout", "stderr"]), "line": TEXT, "base64": TEXT, "partial": FLAG},
    optional=["line", "base64", "partial"],
) | {"examples": [{"stream": "stdout", "line": "hello"}]}
_REASONS: Final = ("draining", "slow_consumer", "key_revoked", "key_expired", "project_deleted")

# Events that are no struct of the domain.
_LOOSE_EVENTS: Final[Mapping[str, Schema]] = {
    "OutputEvent": _OUTPUT,
    "AgentEvent": record({"type": TEXT}) | {"examples": [{"type": "assistant"}]},
    "HeartbeatEvent": record({"timestamp": MOMENT}) | {"examples": [{"timestamp": _WHEN}]},
    "ErrorEvent": record({"code": one_of(ErrorCode), "message": TEXT}),
    "DisconnectingEvent": record({"reason": one_of(_REASONS)})
    | {"examples": [{"reason": "draining"}]},
}


@cache
def event_components() -> Mapping[str, Schema]:
    """The schemas of the events of a command's stream, by component."""
    structs = (
        *(ConnectedEvent, StatusEvent, GapEvent, CompleteEvent),
        *(FeedConnected, FeedStatus, FeedComplete),
    )
    _, made = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    return {**made, **_LOOSE_EVENTS}


STREAM_EVENTS: Final[Mapping[str, Schema]] = {
    "connected": ref("ConnectedEvent"),
    "status": ref("StatusEvent"),
    "output": ref("OutputEvent"),
    "agent": ref("AgentEvent"),
    "gap": ref("GapEvent"),
    "complete": ref("CompleteEvent"),
    "heartbeat": ref("HeartbeatEvent"),
    "error": ref("ErrorEvent"),
    "disconnecting": ref("DisconnectingEvent"),
}

FEED_EVENTS: Final[Mapping[str, Schema]] = {
    "connected": ref("FeedConnected"),
    "status": ref("FeedStatus"),
    "complete": ref("FeedComplete"),
    **{name: STREAM_EVENTS[name] for name in ("heartbeat", "error", "disconnecting")},
}
STREAM_AND_FEED_EVENTS: Final[Mapping[str, Schema]] = {
    name: {"anyOf": [schema, FEED_EVENTS[name]]}
    if FEED_EVENTS.get(name, schema) != schema
    else schema
    for name, schema in STREAM_EVENTS.items()
}
