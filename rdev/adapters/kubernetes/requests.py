"""Requests about a namespace's objects, made again while the API server cannot serve them.

It may be away, overloaded, or not ready for what is asked (a namespace that was just made refuses
pods with 403 until it has its service account). Bounds: each request is made once, and again until
the deadline, with pauses of up to 2 s or as long as the server asks for.
"""

import random
from collections.abc import Mapping

import httpx2
import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal_of, translated
from rdev.adapters.kubernetes.objects import Metadata, Named
from rdev.adapters.kubernetes.template import Tree
from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError


class Requests:
    """Those that belong together: all have one deadline."""

    def __init__(self, api: ApiServer, *, patience_s: float) -> None:
        """The deadline is `patience_s` from now; 0 makes each request once. Opens nothing."""
        self._api = api
        self._root = f"/api/v1/namespaces/{api.namespace}"
        self._deadline_s = trio.current_time() + patience_s

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: Tree | None = None,
        params: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """The answer to one, which is a success. Errors: RdevError, that of the last one made."""
        pauses = Backoff(random=random.random, first_s=0.2, most_s=2.0)
        while True:
            try:
                return await self._once(method, path, body=body, params=params)
            except RdevError as error:
                wait_s = max(pauses.next_s(), error.retry_after_s or 0.0)
                is_late = trio.current_time() + wait_s >= self._deadline_s
                if error.code is not ErrorCode.SERVICE_UNAVAILABLE or is_late:
                    raise
            await trio.sleep(wait_s)

    async def get(self, kind: str, name: str) -> Metadata | None:
        """What an object is, None where there is none. Errors: as `ask`."""
        try:
            got = await self.ask("GET", f"{kind}/{name}")
        except RdevError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return None
            raise
        with translated():
            return msgspec.json.decode(got.content, type=Named).metadata

    async def _once(
        self, method: str, path: str, *, body: Tree | None, params: Mapping[str, str] | None
    ) -> httpx2.Response:
        with translated():
            got = await self._api.http.request(
                method, f"{self._root}/{path}", json=body, params=params
            )
            if not got.is_success:
                raise refusal_of(got)
            return got
