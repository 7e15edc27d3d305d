"""Every parameter of every route at its edges, over the real routes: just inside and just outside.

The edges are made of the schemas that the documents show, so that what they say is what is judged.
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from rdev.adapters.http.access import Route
from rdev.adapters.http.describe import Parameter
from rdev.adapters.http.openapi import DESCRIBED
from rdev.domain.errors import ErrorCode
from tests.app.server import DEADLINE_S, Api, Server, open_api
from tests.contract.run import recording_server
from tests.contract.test_edges import INSIDE, OUTSIDE, path_of

STATUS = {ErrorCode.BAD_REQUEST: 400, ErrorCode.NOT_FOUND: 404, ErrorCode.UNAUTHORIZED: 401}
PARAMETERS = [
    pytest.param(route, parameter, id=f"{' '.join(route)} {parameter.name}")
    for route, description in DESCRIBED.items()
    for parameter in description.parameters
]
FEED_IDS = ["0", "AAAAAAAAAAEAAAAAAAAAAQ"]
FOREIGN_IDS = ["1", "A" * 21, "A" * 23, "A" * 21 + "B", "_" * 22, "é" * 22]
_MOMENTS = (
    ["1970-01-01T00:00:00Z", "9998-12-31T23:59:59.999999Z", "2026-01-15t10:30:00+14:00"],
    [
        *("1969-12-31T23:59:59Z", "9999-01-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-15"),
        *("2026-01-15T10:30:00", "2026-01-15T10:30:00.1234567Z", "2026-01-15T10:30:00Z\n"),
    ],
)
# Good ones and wrong ones, where the schema alone does not tell.
SAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "since": _MOMENTS,
    "until": _MOMENTS,
    "stream_id": ([], ["cmd_" + "0" * 31, "CMD_" + "0" * 32, "cmd_" + "0" * 32, "x"]),
    "cursor": ([], ["no cursor", "\0", "x" * 5_000, "٣"]),
    "token": ([], ["x", "\0", "é", "x" * 5_000]),
}


@pytest.fixture(scope="module")
def server(quick_place: Path) -> Iterator[Server]:
    """Nothing that is sent here is run."""
    with recording_server(quick_place) as server:
        yield server


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    async with open_api(server) as api:
        await made_anew(api)
        yield api


async def made_anew(api: Api) -> None:
    """The project, also after it was deleted: that comes to its end after its answer."""
    with trio.fail_after(DEADLINE_S):
        while (await api.post("/projects", {"id": "demo"})).status_code == 409:
            await trio.sleep(0.02)
    await api.project()


def texts_of(parameter: Parameter) -> tuple[list[str], list[str]]:
    """Just inside and just outside, of the parameter's schema and the samples."""
    right, wrong = map(list, SAMPLES.get(parameter.name, ([], [])))
    match parameter.schema:
        case {"type": "integer", "minimum": int(least), "maximum": int(most)}:
            right += [str(least), str(most), f"0{least}"]
            wrong += [str(least - 1), str(most + 1), "x", "1.5", "+1", "1e1", "٣", "9" * 400]
        case {"type": "number", "minimum": float() | int() as least, "maximum": most}:
            right += [f"{least:g}", f"{most:g}", f"{least:g}.0"]
            wrong += [f"{least - 1:g}", f"{most}1", "x", "nan", "inf", "1e1", "1_0", "٣"]
        case {"enum": list(choices)}:
            right += choices
            wrong += ["nope", choices[0].upper(), choices[0] + " "]
        case {"maxLength": int(most)}:
            right += ["x" * most, "é" * most, "x" + INSIDE]
            wrong += ["x" * (most + 1), *(f"x{one}x" for one in f"\0{OUTSIDE}")]
        case {"pattern": str(pattern)} if "{22}" in pattern:
            right += FEED_IDS
            wrong += FOREIGN_IDS
        case {"pattern": str()} if parameter.name in ("after", "Last-Event-ID"):
            right += ["0", "1", "0" * 18]
            wrong += ["-1", "x", "1.5", "1" * 19, "٣"]
        case {"anyOf": list()}:  # without `stream_id` a feed
            right += FEED_IDS
            wrong += FOREIGN_IDS
    assert wrong, f"{parameter.name}: add it to SAMPLES"
    return right, wrong


async def asked(
    api: Api, route: Route, path: str, parameter: Parameter, text: str
) -> tuple[int, str]:
    """The status and, of a refusal, why; of a stream the head alone."""
    query, headers = {parameter.name: text}, {}
    if parameter.where == "header":
        query, headers = {}, {parameter.name: text.encode()}
    request = api.http.build_request(
        route[0],
        path,
        params=query,
        headers=headers,
        json=DESCRIBED[route].example,
    )
    if parameter.name == "token":
        del request.headers["Authorization"]
    answer = await api.http.send(request, stream=True)
    try:
        if answer.status_code < 400:
            return answer.status_code, ""
        await answer.aread()
        return answer.status_code, answer.json()["detail"]
    finally:
        await answer.aclose()


@pytest.mark.slow
@pytest.mark.parametrize(("route", "parameter"), PARAMETERS)
async def test_each_parameter_is_taken_inside_and_refused_outside_of_its_edges(
    api: Api, route: Route, parameter: Parameter
) -> None:
    template = route
    if "{command}" in route[1]:
        command = await api.submit("true")
        await api.ended(command)
        template = (route[0], route[1].replace("{command}", command))
    path = await path_of(api, template)
    right, wrong = texts_of(parameter)
    for text in right:
        if route == ("DELETE", "/projects/{project}"):
            await made_anew(api)  # the one before took it away
        status, why = await asked(api, route, path, parameter, text)
        # 410: it was understood, and is not stored any more.
        assert status < 400 or status == 410, (text[:80], status, why)
    if parameter.where == "query" and parameter.name != "token":
        if route == ("DELETE", "/projects/{project}"):
            await made_anew(api)
        status, why = await asked(api, route, path, parameter, "")
        assert status < 400, why
    for text in wrong:
        status, why = await asked(api, route, path, parameter, text)
        assert status == STATUS[parameter.code], (text[:80], status, why)
        if parameter.code is ErrorCode.BAD_REQUEST:
            assert parameter.name in why, (text[:80], why)
