"""SUBSYSTEM Namespace: which namespace of which cluster the projects are in, by its UID.

Names are the same everywhere; no two namespaces ever have the same UID, so two servers with one UID
see the same pods. It is asked for until it is known, with pauses, and compared at each check: a
namespace that was deleted and made anew has lost its pods and volumes, and is another place.
"""

import logging
import random
from typing import Final

import msgspec
import trio

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.errors import refusal_of, translated
from rdev.domain.backoff import Backoff
from rdev.domain.errors import ErrorCode, RdevError

_log = logging.getLogger("rdev.kubernetes")

_PAUSE_MOST_S: Final = 10.0
_FRESH_S: Final = 15.0


class _Metadata(msgspec.Struct):
    uid: str


class _Namespace(msgspec.Struct):
    metadata: _Metadata


class Namespace:
    """Finds out where we are; until then there is no reach, and nothing is claimed."""

    name = "namespace"

    def __init__(self, api: ApiServer) -> None:
        """Opens nothing."""
        self._api = api
        self._uid: str | None = None
        self._is_another = False
        self._stopping = trio.CancelScope()

    @property
    def is_known(self) -> bool:
        """Whether there is a UID, and it is still that of the namespace."""
        return self._uid is not None and not self._is_another

    def uid(self) -> str:
        """The UID as it was first read. Errors: SERVICE_UNAVAILABLE before that."""
        if self._uid is None:
            message = "kubernetes cannot be reached: the namespace is not known yet"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
        return self._uid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask until it is known, then wait for `stop`. Survives whatever the API server says."""
        backoff = Backoff(random=random.random, first_s=0.1, most_s=_PAUSE_MOST_S)
        task_status.started()
        with self._stopping:
            while self._uid is None:
                try:
                    await self.check()
                except RdevError as error:
                    _log.warning("namespace not known", extra={"error": error.message})
                    await trio.sleep(max(backoff.next_s(), min(error.retry_after_s or 0, 60)))
            await trio.sleep_forever()

    def stop(self) -> None:
        """End `run`."""
        self._stopping.cancel()

    async def check_lately(self) -> None:
        """As `check`, but does not ask where the API server has answered anything within the last
        `_FRESH_S` and nothing has failed since: any number of probes cost four requests a minute.
        """
        if not (self.is_known and self._api.contact.is_younger_than(_FRESH_S)):
            await self.check()

    async def check(self) -> None:
        """Ask for the namespace: one small GET.

        Errors: SERVICE_UNAVAILABLE for an API server that does not answer, for rights that we lack,
        and for a namespace that is gone or another one.
        """
        uid = await self._ask()
        if self._uid is None:
            self._uid = uid
            _log.info("namespace known", extra={"namespace": self._api.namespace, "uid": uid})
        self._is_another = uid != self._uid
        if self._is_another:
            message = f"namespace {self._api.namespace} was made anew: restart the server"
            raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)

    async def _ask(self) -> str:
        with translated():
            got = await self._api.signs.get(f"/api/v1/namespaces/{self._api.namespace}")
            if got.status_code != 200:
                raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, refusal_of(got).message)
            return msgspec.json.decode(got.content, type=_Namespace).metadata.uid
