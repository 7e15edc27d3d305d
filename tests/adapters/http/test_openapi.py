"""The document says what the code does: routes, limits, codes; and the page shows it."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from jsonschema import Draft202012Validator

from rdev.adapters.http.access import ACCESS
from rdev.adapters.http.app import PUBLIC_PATHS
from rdev.adapters.http.documents import POLICY
from rdev.adapters.http.openapi import DESCRIBED, document
from rdev.adapters.http.page import STYLE, STYLE_HASH, render
from rdev.adapters.http.problems import STATUS
from rdev.domain.errors import ErrorCode
from rdev.domain.sse import EventName

DOCUMENT = json.loads(json.dumps(document(version="0.0.0")))
OPERATIONS = [
    (method, path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]


def test_a_published_validator_accepts_the_document() -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_route_has_a_description_and_every_description_a_route() -> None:
    """A route of yours fails here: describe it in `DESCRIBED`, next to where it is declared."""
    public = {("GET", path) for path in PUBLIC_PATHS}
    missing = (ACCESS.keys() | public) - DESCRIBED.keys()
    assert not missing, f"no description in DESCRIBED: {sorted(missing)}"
    stray = DESCRIBED.keys() - ACCESS.keys() - public
    assert not stray, f"described, but no route: {sorted(stray)}"


def test_every_code_is_documented_with_its_status() -> None:
    text = {code: set() for code in ErrorCode}
    for _, _, operation in OPERATIONS:
        for status, answer in operation["responses"].items():
            for code in ErrorCode:
                if f"`{code}`" in answer["description"]:
                    text[code].add(int(status))
    assert text == {code: {status} for code, status in STATUS.items()}


def test_every_event_of_a_stream_is_documented() -> None:
    for path in ("/commands/{command}/events", "/projects/{project}/events"):
        content = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]
        assert content["text/event-stream"]["x-events"].keys() == {*EventName}


def refs(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "$ref":
                yield item
            yield from refs(item)
    elif isinstance(value, list):
        for item in value:
            yield from refs(item)


def test_every_reference_has_a_target_and_every_component_is_used() -> None:
    named = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    named |= {f"#/components/headers/{name}" for name in DOCUMENT["components"]["headers"]}
    assert set(refs(DOCUMENT)) == named


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_an_example_of_a_schema_fits_it(name: str) -> None:
    schema = {**DOCUMENT, "$ref": f"#/components/schemas/{name}"}
    for example in DOCUMENT["components"]["schemas"][name].get("examples", ()):
        Draft202012Validator(schema).validate(example)


@pytest.mark.parametrize(
    "operation",
    [pytest.param(each, id=f"{m} {p}") for m, p, each in OPERATIONS if "requestBody" in each],
)
def test_the_example_of_a_body_fits_its_schema_and_its_parser(operation: dict) -> None:
    content = operation["requestBody"]["content"]["application/json"]
    Draft202012Validator(content["schema"]).validate(content["example"])
    described = next(
        each for each in DESCRIBED.values() if each.summary == operation["summary"] and each.body
    )
    assert described.body is not None
    described.body(content["example"])


class Links(HTMLParser):
    """Whatever of a page a browser would fetch, run or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("href", "src", "action", "srcset", "data", "poster", "formaction"):
                self.addresses.append(value or "")


def test_no_address_of_the_page_leaves_the_origin() -> None:
    page = render(DOCUMENT).decode()
    links = Links()
    links.feed(page)
    assert links.addresses
    for address in links.addresses:
        assert address == "/openapi.json" or address.startswith("#"), address
    assert not links.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not any(name.startswith("on") or name == "style" for name in links.attributes)
    assert "@import" not in STYLE
    assert "url(" not in STYLE


def test_the_page_shows_every_operation_and_schema() -> None:
    page = render(DOCUMENT).decode()
    for _, _, operation in OPERATIONS:
        assert f'id="{operation["operationId"]}"' in page
    for name in DOCUMENT["components"]["schemas"]:
        assert f'id="schema-{name}"' in page


def test_the_policy_forbids_all_but_the_pages_own_style() -> None:
    directives = dict(part.strip().split(" ", 1) for part in POLICY.split(";"))
    assert directives == {
        "default-src": "'none'",
        "style-src": f"'sha256-{STYLE_HASH}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert f"<style>{STYLE}</style>" in render(DOCUMENT).decode()
