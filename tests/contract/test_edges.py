"""Every field of every request at its edges, over the real routes: just inside and just outside.

The edges are made of the rules that judge; a field with a pattern needs a sample of its own here.
"""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rdev.adapters.http.access import Route
from rdev.adapters.http.openapi import DESCRIBED
from rdev.domain.project_requests import parse_folder_project
from rdev.domain.rules import Characters, Rule, RuleKind, rules_of
from tests.app.server import Api, Server, open_api
from tests.contract.run import recording_server

UUID = "019a8f2e-4b7c-7d1e-8f3a-5b6c7d8e9f01"
# As large as they may be, where the rule alone does not tell what is good.
SAMPLES: dict[str, list[object]] = {
    "id": ["a" * 40, "a"],
    "session_id": [UUID],
    "resume": ["r" * 200],
    "model": ["m" * 200],
    "allowed_tools": [["T" * 500], ["Edit"] * 100],
    "disallowed_tools": [["T" * 500], ["Edit"] * 100],
    "mcp_config": [{"mcpServers": {}}],
    "project_ids": [["a" * 40], [f"p{n}" for n in range(200)]],
    "allowed_ips": [["203.0.113.0/24"] * 100, ["2001:db8::/32"]],
    "args": [["log"], ["log", *["x"] * 999], ["log", "x" * 131_071]],
    "cwd": ["d" * 4_096, "a/./b//c", "..a/b.."],
    "env": [{f"A{n}": "x" for n in range(200)}, {"A" * 256: ""}, {"A": "x" * 131_069}],
    "url": ["https://hooks.example.com/".ljust(2_048, "x")],
    "since": ["2026-01-15T10:30:00Z"],
    "rate_limit": [{"requests": 1, "window_s": 1}],
}
# Beyond what the rule tells.
WRONG: dict[str, list[object]] = {
    "id": ["A", "-a", "a-", "a_b", "a.b", "é"],
    "cwd": ["/", "/etc", "..", "a/../..", "../a"],
    "env": [{"1A": "x"}, {"": "x"}, {"A": 7}, {"RDEV_A": "x"}, {"A" * 257: "x"}, {"A": "x\0"}],
    "allowed_ips": [["300.1.1.1"], ["203.0.113.0/33"]],
    "mcp_config": [{}],
    "args": [["--exec-path=/x"]],
    "prompt": [" \n"],
}
# Whose rule does not tell all that is asked of it.
JUDGED_FURTHER = ("url", "since")
# A delivery is there after an event alone; nothing may stand in the body of its route.
ROUTES = [
    route
    for route, description in DESCRIBED.items()
    if description.body is not None and "{delivery}" not in route[1]
]


@dataclass(slots=True)
class Edges:
    """What a field must take and must refuse."""

    good: list[object] = field(default_factory=list)
    bad: list[object] = field(default_factory=list)


# Beside each edge of what a line may have.
OUTSIDE = "\x01\n\x1f\x7f\x80\x9f\u061c\u200e\u200f\u2028\u202a\u202e\u2066\u2069"
INSIDE = "x \xa0\u061b\u061d\u200d\u2010\u2027\u202f\u2065\u206a\ufeff\U000e007f"


def characters_of(rule: Rule) -> tuple[list[object], list[object]]:
    """Texts with what it must refuse and with what it must take."""
    every = f"x{OUTSIDE}{INSIDE}"
    match rule.characters:
        case Characters.LINE:
            return [f"x{one}x" for one in f"\0{OUTSIDE}"], [INSIDE]
        case Characters.NO_NUL:
            return ["a\0b"], [every]
        case Characters.ANY:
            return [], [every + "\0"]


def edges_of(rule: Rule) -> Edges:  # noqa: C901  (a table of cases)
    """Made of the rule, and of the samples."""
    found = Edges()
    name = rule.name
    match rule.kind:
        case RuleKind.TEXT | RuleKind.TEXTS if rule.choices:
            found = Edges([*rule.choices], ["nope", "", 7])
        case RuleKind.TEXT:
            assert rule.max_bytes is not None
            most = rule.max_bytes
            good: list[object] = []
            if rule.pattern is None and name not in JUDGED_FURTHER:
                good = ["x" * most]
            found = Edges(good, ["x" * (most + 1), "é" * (most // 2 + 1), "", 7, ["x"]])
            wrong, right = characters_of(rule)
            found.bad += wrong
            found.good += right if good else []
        case RuleKind.TEXTS:
            assert rule.max_bytes is not None
            assert rule.max_items is not None
            found.bad = ["x", [7], [None], ["x" * (rule.max_bytes + 1)]]
            found.bad.append(["x"] * (rule.max_items + 1))
            found.bad += [[text] for text in characters_of(rule)[0]]
        case RuleKind.WHOLE:
            assert rule.least is not None
            assert rule.most is not None
            found = Edges([rule.least, rule.most], [rule.least - 1, rule.most + 1, "1", 1.5, True])
        case RuleKind.FLAG:
            found = Edges([True, False], ["true", 1])
        case RuleKind.OBJECT | RuleKind.ENTRIES:
            found.bad = [7, "x", ["x"]]
        case RuleKind.NOTHING:
            found.bad = ["x", {}, 0]
        case RuleKind.OTHER:
            assert rule.least is not None, f"{name}: say its edges in WRONG and SAMPLES"
            assert rule.most is not None
            found.good = [*rule.choices, rule.least, rule.most]
            found.bad = [rule.least - 1, rule.most + 1, "nope", 1.5, True]
    if rule.kind is RuleKind.TEXTS and rule.choices:
        found = Edges([[text] for text in rule.choices], [["nope"], [], [7], "x"])
    if rule.kind is RuleKind.ENTRIES:
        assert rule.max_items is not None
        found.bad.append({f"A{n}": "x" for n in range(rule.max_items + 1)})
    if rule.kind is not RuleKind.NOTHING:
        found.good += SAMPLES.get(name, [])
        found.bad += WRONG.get(name, [])
    if not rule.required:
        found.good.append(None)
    assert found.good or rule.kind is RuleKind.NOTHING, f"{name} has a pattern: add it to SAMPLES"
    return found


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """Nothing that is sent here is run."""
    with recording_server(quick_place) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        await api.project()
        yield api


async def path_of(api: Api, route: Route) -> str:
    """The route's path with things that are there."""
    path = route[1].replace("{project}", "demo")
    if "{key}" in path:
        body = {"name": "k", "scopes": ["projects:read"]}
        made = await api.post("/keys", body)
        path = path.replace("{key}", made.json()["data"]["id"])
    if "{webhook}" in path:
        made = await api.post("/webhooks", dict(DESCRIBED["POST", "/webhooks"].example or {}))
        assert made.status_code == 201, made.text
        path = path.replace("{webhook}", made.json()["data"]["id"])
    assert "{" not in path, f"{route}: tell this test what stands for it"
    return path


async def pointers(api: Api, route: Route, path: str, body: object) -> set[str] | None:
    """Of which fields the server complains; None where it does not."""
    encoded = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    answer = await api.http.request(route[0], path, content=encoded, headers=headers)
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code != 400:
        return None
    return {each["pointer"] for each in answer.json()["error"]["details"]}


def concerns(found: set[str] | None, pointer: str) -> bool:
    """Whether the complaint is about the field or something in it."""
    return any(each == pointer or each.startswith(pointer + "/") for each in found or ())


def bodies(example: dict, rule: Rule, value: object, parent: str | None) -> dict:
    """The example with one field as given."""
    if parent is None:
        return {**example, rule.name: value}
    inner = {**SAMPLES[parent][0], rule.name: value}  # type: ignore[dict-item]
    return {**example, parent: inner}


def fields_of(route: Route) -> Iterator[tuple[Rule, str | None]]:
    """The fields of its body and of the objects in it."""
    # The server's projects are folders; what is asked of pods is walked in
    # tests/domain/test_project_requests.py.
    parse = parse_folder_project if route == ("POST", "/projects") else DESCRIBED[route].body
    assert parse is not None
    for rule in rules_of(parse).rules:
        yield rule, None
        yield from ((inner, rule.name) for inner in rule.fields)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
async def test_each_field_is_taken_inside_and_refused_outside_of_its_edges(
    api: Api, route: Route
) -> None:
    path = await path_of(api, route)
    example = dict(DESCRIBED[route].example or {})
    for rule, parent in fields_of(route):
        pointer = f"/{parent}/{rule.name}" if parent else f"/{rule.name}"
        edges = edges_of(rule)
        for value in edges.good:
            found = await pointers(api, route, path, bodies(example, rule, value, parent))
            assert not concerns(found, pointer), (pointer, str(value)[:80], found)
        for value in edges.bad:
            found = await pointers(api, route, path, bodies(example, rule, value, parent))
            assert concerns(found, pointer), (pointer, str(value)[:80], found)
        if rule.required:
            found = await pointers(api, route, path, bodies(example, rule, None, parent))
            assert found == {pointer}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
async def test_all_faults_of_a_body_are_told_together(api: Api, route: Route) -> None:
    path = await path_of(api, route)
    rules = [rule for rule, parent in fields_of(route) if parent is None]
    body = {rule.name: edges_of(rule).bad[0] for rule in rules} | {"a/b~c": 1}
    found = await pointers(api, route, path, body)
    assert {f"/{rule.name}" for rule in rules} | {"/a~1b~0c"} <= {
        pointer for each in found or () for pointer in (each, "/" + each.split("/")[1])
    }
