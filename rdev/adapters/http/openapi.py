"""The OpenAPI 3.1 document, made of the route table, the descriptions, the parsers and the errors.

Nothing in it is written down a second time: scopes are those of access.py, limits of bodies those
that parsers judge by, statuses those of problems.py. Why not from a framework: docs/adr/0016.
"""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final

from rdev.adapters.http import (
    audit,
    commands,
    documents,
    keys,
    probes_described,
    projects,
    queue,
    schemas,
    stream,
    tickets,
    webhooks_described,
)
from rdev.adapters.http.access import ACCESS, Access, Route
from rdev.adapters.http.describe import JSON, Answer, Described, Description, Parameter, Schema
from rdev.adapters.http.problems import CONTENT_TYPE, STATUS
from rdev.adapters.http.schemas import ref
from rdev.domain.errors import ErrorCode
from rdev.domain.rules import CONTROLS, BodyRules, Characters, Rule, RuleKind, rules_of

DESCRIBED: Final[Described] = {
    **projects.DESCRIBED,
    **commands.DESCRIBED,
    **stream.DESCRIBED,
    **queue.DESCRIBED,
    **keys.DESCRIBED,
    **tickets.DESCRIBED,
    **audit.DESCRIBED,
    **webhooks_described.DESCRIBED,
    **probes_described.DESCRIBED,
    **documents.DESCRIBED,
}

# What every route may answer with, one with credentials, one with a body.
_OF_ALL = (ErrorCode.BAD_REQUEST, ErrorCode.TOO_MANY_REQUESTS, ErrorCode.INTERNAL_ERROR)
_OF_PRIVATE = (
    *(ErrorCode.UNAUTHORIZED, ErrorCode.KEY_REVOKED, ErrorCode.KEY_EXPIRED),
    *(ErrorCode.FORBIDDEN, ErrorCode.IP_NOT_ALLOWED, ErrorCode.SERVICE_UNAVAILABLE),
)
_OF_BODY = (ErrorCode.PAYLOAD_TOO_LARGE, ErrorCode.UNSUPPORTED_MEDIA_TYPE)

_PATH_FIELDS: Mapping[str, Schema] = {
    "project": schemas.PROJECT_ID,
    "command": schemas.an_id("cmd_"),
    "key": schemas.an_id("key_"),
    "webhook": schemas.an_id("whk_"),
    "delivery": schemas.an_id("dlv_"),
}

_HEADERS: Mapping[str, tuple[str, Schema]] = {
    "X-Request-Id": ("the request's id: the client's own where it is sane", schemas.TEXT),
    "Location": ("where the thing is", schemas.TEXT),
    "Idempotent-Replayed": ("`true` in the answer to a repeat", schemas.TEXT),
    "Set-Cookie": ("the session", schemas.TEXT),
    "Retry-After": ("seconds to wait", schemas.WHOLE),
    "WWW-Authenticate": ("how to authenticate", schemas.TEXT),
    "RateLimit-Policy": ("the limits that count this request (RFC 9651)", schemas.TEXT),
    "RateLimit": ("what is left of them (RFC 9651)", schemas.TEXT),
    "X-RateLimit-Limit": ("requests in the window", schemas.WHOLE),
    "X-RateLimit-Remaining": ("requests left in it", schemas.WHOLE),
    "X-RateLimit-Reset": ("seconds until more is left", schemas.WHOLE),
}
_RATE_LIMIT_HEADERS = tuple(name for name in _HEADERS if "RateLimit" in name)

_IDEMPOTENCY_KEY = Parameter(
    name="Idempotency-Key",
    about="makes a repeat within 24 hours answer with what the first made",
    schema={"type": "string", "pattern": "^[ -~]{1,255}$"},
    where="header",
)
_REQUEST_ID = Parameter(
    name="X-Request-Id",
    about="1–64 of `[A-Za-z0-9._-]`; another is replaced",
    schema=schemas.TEXT,
    where="header",
)
_ABOUT = """\
Runs coding agents, shell and git in projects and streams every line.

A success is `{"data", "meta"}`, a failure a problem (RFC 9457) with the same `error` and `meta` as
ever. Of a list, `meta.next_cursor` is absent on the last page. Unknown fields of a body are
refused; all faults are told together."""


def document(
    *, version: str, described: Described = DESCRIBED, access: Mapping[Route, Access] = ACCESS
) -> dict[str, object]:
    """The whole document, ready for JSON."""
    paths: dict[str, dict[str, object]] = {}
    for (method, path), description in described.items():
        operation = _operation(method, path, description, access.get((method, path)))
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rdev",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in described.values())],
        "paths": paths,
        "components": {
            "schemas": {**schemas.COMPONENTS, **schemas.event_components()},
            "headers": {
                name: {"description": about, "schema": schema}
                for name, (about, schema) in _HEADERS.items()
            },
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def body_schema(rules: BodyRules) -> Schema:
    """The JSON Schema of a body that its rules take. Sizes are bytes in `x-max-bytes`; the length
    in characters can only be an upper bound of them."""
    required = [rule.name for rule in rules.rules if rule.required]
    schema: dict[str, object] = {
        "type": "object",
        "properties": {rule.name: _rule_schema(rule) for rule in rules.rules},
        "additionalProperties": False,
    }
    return schema | ({"required": required} if required else {})


def _operation(
    method: str, path: str, description: Description, access: Access | None
) -> dict[str, object]:
    operation: dict[str, object] = {
        "operationId": _operation_id(method, path),
        "summary": description.summary,
        "tags": [description.tag],
        "parameters": _parameters(path, description),
        "responses": _responses(path, description, access),
        "security": [] if access is None else [{"apiKey": []}, {"bearer": []}],
    }
    about = [description.about] if description.about else []
    if access is not None:
        operation["x-scopes"] = [*access.scopes]
        about.append(f"Scope: {' or '.join(access.scopes)}.")
    if about:
        operation["description"] = " ".join(about)
    if description.body is not None:
        rules = rules_of(description.body)
        content: dict[str, object] = {"schema": body_schema(rules)}
        if description.example is not None:
            content["example"] = description.example
        operation["requestBody"] = {"required": rules.is_required, "content": {JSON: content}}
    return operation


def _operation_id(method: str, path: str) -> str:
    """`get_projects_project` for GET /projects/{project}."""
    words = [method.lower(), *re.findall(r"\w+", path)]
    return "_".join(words)


def _parameters(path: str, description: Description) -> list[Schema]:
    found: list[Schema] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _PATH_FIELDS.get(name, schemas.TEXT),
        }
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    own = (*description.parameters, _REQUEST_ID)
    if description.is_idempotent:
        own = (*own, _IDEMPOTENCY_KEY)
    return found + [
        {
            "name": each.name,
            "in": each.where,
            "required": each.required,
            "description": each.about,
            "schema": each.schema,
        }
        for each in own
    ]


def _responses(path: str, description: Description, access: Access | None) -> dict[str, object]:
    found: dict[str, object] = {
        str(status): _answer(answer, access) for status, answer in description.answers.items()
    }
    for status, codes in _codes_of(_errors(path, description, access)).items():
        found.setdefault(str(status), _failure(status, codes))
    return found


def _errors(path: str, description: Description, access: Access | None) -> list[ErrorCode]:
    """Every code that the route may answer with."""
    codes = [*_OF_ALL, *description.errors]
    if access is not None:
        codes += _OF_PRIVATE
    if "{" in path:
        codes.append(ErrorCode.NOT_FOUND)
    if description.body is not None:
        codes += _OF_BODY
    if description.is_idempotent:
        codes += [ErrorCode.CONFLICT, ErrorCode.IDEMPOTENCY_MISMATCH]
    return codes


def _codes_of(codes: Iterable[ErrorCode]) -> Mapping[int, list[ErrorCode]]:
    found: dict[int, list[ErrorCode]] = {}
    for code in dict.fromkeys(codes):
        found.setdefault(STATUS[code], []).append(code)
    return dict(sorted(found.items()))


def _answer(answer: Answer, access: Access | None) -> dict[str, object]:
    names = ("X-Request-Id", *answer.headers, *(_RATE_LIMIT_HEADERS if access else ()))
    found: dict[str, object] = {"description": answer.about, "headers": _header_refs(names)}
    if answer.schema is None:
        return found
    schema = answer.schema
    if answer.is_page:
        schema = schemas.several(schema)
    if answer.is_enveloped:
        schema = schemas.record({"data": schema, "meta": ref("Meta")})
    content: dict[str, object] = {"schema": schema}
    if answer.events:
        # As OpenAPI 3.2 has it for `itemSchema`: what stands here is the schema of one event.
        content = {"schema": _event_schema(answer.events), "x-events": answer.events}
    found["content"] = dict.fromkeys((answer.content_type, *answer.also), content)
    return found


def _event_schema(events: Mapping[str, Schema]) -> Schema:
    """One event as an object of its fields; `data` is JSON of the event's own schema."""
    return {
        "description": "Each event of the stream by its fields; `data` is JSON.",
        "oneOf": [
            {
                "type": "object",
                "required": ["event", "data"],
                "properties": {
                    "event": {"const": name},
                    "data": {
                        "type": "string",
                        "contentMediaType": JSON,
                        "contentSchema": schema,
                    },
                    "id": schemas.TEXT,
                    "retry": schemas.WHOLE,
                },
            }
            for name, schema in events.items()
        ],
    }


def _failure(status: int, codes: list[ErrorCode]) -> dict[str, object]:
    names = ["X-Request-Id"]
    if status == HTTPStatus.UNAUTHORIZED:
        names.append("WWW-Authenticate")
    if status in (
        HTTPStatus.CONFLICT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ):
        names.append("Retry-After")
    return {
        "description": ", ".join(f"`{code}`" for code in codes),
        "headers": _header_refs(names),
        "content": {CONTENT_TYPE: {"schema": ref("Problem")}},
    }


def _header_refs(names: Iterable[str]) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _rule_schema(rule: Rule) -> Schema:
    """The JSON Schema of one field; an optional one may be null."""
    schema = _required_schema(rule)
    if not rule.required and schema.get("type", "null") != "null":
        schema = schemas.maybe(schema)
    return {**schema, "description": rule.about} if rule.about else schema


def _required_schema(rule: Rule) -> Schema:
    match rule.kind:
        case RuleKind.TEXT:
            return _text_schema(rule, least=1)
        case RuleKind.WHOLE:
            return {"type": "integer", "minimum": rule.least, "maximum": rule.most}
        case RuleKind.FLAG:
            return schemas.FLAG
        case RuleKind.TEXTS:
            return {
                "type": "array",
                "items": _text_schema(rule, least=0),
                "minItems": rule.min_items,
                "maxItems": rule.max_items,
            }
        case RuleKind.OBJECT:
            return body_schema(BodyRules(rule.fields)) if rule.fields else schemas.ANYTHING
        case RuleKind.ENTRIES:
            return _entries_schema(rule)
        case RuleKind.NOTHING:
            return {"type": "null"}
        case RuleKind.OTHER if rule.choices:
            bounds = {"type": "integer", "minimum": rule.least, "maximum": rule.most}
            return {"anyOf": [schemas.one_of(rule.choices), bounds, {"type": "null"}]}
        case RuleKind.OTHER:
            return {}


def _entries_schema(rule: Rule) -> Schema:
    assert rule.pattern is not None
    return {
        "type": "object",
        "maxProperties": rule.max_items,
        "propertyNames": {"pattern": f"^(?:{rule.pattern.pattern})$"},
        "additionalProperties": {"type": "string", "maxLength": rule.max_bytes},
    }


def _text_schema(rule: Rule, *, least: int) -> Schema:
    if rule.choices:
        return schemas.one_of(rule.choices)
    schema: dict[str, object] = {"type": "string", "minLength": least}
    if rule.max_bytes is not None:
        schema |= {"maxLength": rule.max_bytes, "x-max-bytes": rule.max_bytes}
    if rule.pattern is not None:
        schema["pattern"] = f"^(?:{rule.pattern.pattern})$"
    elif rule.characters is Characters.LINE:
        schema["pattern"] = f"^[^{CONTROLS}]*$"
    return schema
