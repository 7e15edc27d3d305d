"""The page at `/docs`: the OpenAPI document as HTML, made once, without scripts.

Every viewer in use is between 0.3 and 1 MB compressed and runs scripts and inline styles; this page
needs neither, so its policy can forbid everything but its own style sheet (docs/adr/0016).
"""

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from html import escape

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: 4px; }
details { border: 1px solid #8886; border-radius: 4px; margin: .5rem 0; padding: .25rem .75rem; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 5rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left;
  vertical-align: top; }
nav a { margin-right: 1rem; }
"""
STYLE_HASH = b64encode(sha256(STYLE.encode()).digest()).decode()

Json = Mapping[str, object]


def render(document: Json) -> bytes:
    """The page. `document` is as `openapi.document` makes it."""
    return "".join(_page(document)).encode()


def _page(document: Json) -> Iterator[str]:
    info, components = _member(document, "info"), _member(document, "components")
    tags = _by_tag(document)
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>rdev: the HTTP API</title><style>{STYLE}</style></head><body>"
    yield f"<h1>rdev {_text(info['version'])}</h1><p>{_text(info['description'])}</p>"
    yield '<nav aria-label="subjects">'
    yield from (f'<a href="#{_text(tag)}">{_text(tag)}</a>' for tag in tags)
    yield '<a href="#schemas">schemas</a><a href="/openapi.json">openapi.json</a></nav><main>'
    for tag, operations in tags.items():
        yield f'<h2 id="{_text(tag)}">{_text(tag)}</h2>'
        for method, path, operation in operations:
            yield from _operation(method, path, operation)
    yield '<h2 id="schemas">schemas</h2>'
    for name, schema in _member(components, "schemas").items():
        yield f'<details id="schema-{_text(name)}"><summary><code>{_text(name)}</code></summary>'
        yield f"{_json(schema)}</details>"
    yield "</main></body></html>\n"


def _operation(method: str, path: str, operation: Json) -> Iterator[str]:
    yield f'<details id="{_text(operation["operationId"])}">'
    yield f"<summary><b>{method.upper()}</b> <code>{_text(path)}</code> "
    yield f"{_text(operation['summary'])}</summary>"
    yield f"<p>{_text(operation.get('description', ''))}</p>"
    yield from _parameters(operation)
    if "requestBody" in operation:
        yield from _body(_member(operation, "requestBody"))
    yield "<table><thead><tr><th>status</th><th>what</th><th>schema</th></tr></thead><tbody>"
    for status, answer in _member(operation, "responses").items():
        yield from _answer(status, _object(answer))
    yield "</tbody></table></details>"


def _parameters(operation: Json) -> Iterator[str]:
    found = operation["parameters"]
    assert isinstance(found, list)
    yield "<table><thead><tr><th>parameter</th><th>in</th><th>what</th></tr></thead><tbody>"
    for parameter in map(_object, found):
        required = ", required" if parameter["required"] else ""
        yield f"<tr><td><code>{_text(parameter['name'])}</code></td>"
        yield f"<td>{_text(parameter['in'])}{required}</td>"
        schema = _text(json.dumps(parameter["schema"]))
        yield f"<td>{_text(parameter.get('description', ''))} <code>{schema}</code></td></tr>"
    yield "</tbody></table>"


def _body(body: Json) -> Iterator[str]:
    for kind, content in _member(body, "content").items():
        described = _object(content)
        yield f"<p>Body: <code>{_text(kind)}</code></p>"
        if "example" in described:
            yield _json(described["example"])
        yield f"<details><summary>schema</summary>{_json(described['schema'])}</details>"


def _answer(status: str, answer: Json) -> Iterator[str]:
    yield f"<tr><td>{_text(status)}</td><td>{_text(answer['description'])}</td><td>"
    content = _member(answer, "content") if "content" in answer else {}
    for kind, described in content.items():
        schema = _text(json.dumps(_object(described)["schema"]))
        yield f"<code>{_text(kind)}</code><br><code>{schema}</code><br>"
    yield "</td></tr>"


def _by_tag(document: Json) -> Mapping[str, list[tuple[str, str, Json]]]:
    found: dict[str, list[tuple[str, str, Json]]] = {}
    for path, operations in _member(document, "paths").items():
        for method, operation in _object(operations).items():
            described = _object(operation)
            tags = described["tags"]
            assert isinstance(tags, list)
            found.setdefault(str(tags[0]), []).append((method, path, described))
    return found


def _json(value: object) -> str:
    return f"<pre>{_text(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def _text(value: object) -> str:
    return escape(str(value))


def _member(value: Json, name: str) -> dict[str, object]:
    return _object(value[name])


def _object(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value
