"""`GET /openapi.json` and `GET /docs`: the contract for programs and for people, without a key.

Both are bytes that were made once. The page has no script and no link to another host: its policy
forbids both.
"""

from collections.abc import Mapping

import msgspec
from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import JSON, Answer, Described, Description
from rdev.adapters.http.page import STYLE_HASH, render

# Nothing is fetched, run, framed or sent; the one style sheet is the page's own.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
_CACHE = "public, max-age=300"

DESCRIBED: Described = {
    ("GET", "/openapi.json"): Description(
        summary="This document",
        tag="operations",
        answers={200: Answer(about="OpenAPI 3.1", schema=schemas.ANYTHING, is_enveloped=False)},
    ),
    ("GET", "/docs"): Description(
        summary="This document for people",
        tag="operations",
        answers={
            200: Answer(
                about="a page without scripts",
                schema=schemas.TEXT,
                is_enveloped=False,
                content_type="text/html",
            )
        },
    ),
}


def document_routes(document: Mapping[str, object]) -> Blueprint:
    """The two routes of the document that `openapi.document` made."""
    routes = Blueprint("documents", __name__)
    encoded, page = msgspec.json.encode(document), render(document)

    @routes.get("/openapi.json")
    async def get_document() -> Response:
        return Response(encoded, content_type=JSON, headers={"Cache-Control": _CACHE})

    @routes.get("/docs")
    async def get_page() -> Response:
        headers = {
            "Cache-Control": _CACHE,
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(page, content_type="text/html; charset=utf-8", headers=headers)

    return routes
