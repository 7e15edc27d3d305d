"""What this account may do in its namespace, asked of the API server itself.

One SelfSubjectAccessReview for each right: what deploy/k8s/base/access.yaml grants.
"""

from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal_of, translated
from rdev.domain.errors import ErrorCode, RdevError

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A verb on a resource (`pods/exec`) of the core API group."""

    verb: str
    resource: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


class _Status(msgspec.Struct):
    allowed: bool = False


class _Review(msgspec.Struct):
    status: _Status


async def missing_rights(api: ApiServer, rights: tuple[Right, ...]) -> list[Right]:
    """Those that are refused, in the order given.

    Errors: SERVICE_UNAVAILABLE where the API server cannot be asked. Cancellation: at once.
    """
    return [right for right in rights if not await _is_allowed(api, right)]


async def _is_allowed(api: ApiServer, right: Right) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = {"namespace": api.namespace, "verb": right.verb, "resource": resource}
    if resource == "namespaces":
        attributes["name"] = api.namespace
    if subresource:
        attributes["subresource"] = subresource
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    with translated():
        got = await api.http.post(_REVIEWS, json=body)
        if got.status_code != HTTPStatus.CREATED:
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, refusal_of(got).message)
        return msgspec.json.decode(got.content, type=_Review).status.allowed
