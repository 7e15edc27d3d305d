"""Execs in project pods, as WebSockets: which pod and container, what the API server is asked."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rdev.adapters.kubernetes.connection import ApiServer
from rdev.adapters.kubernetes.websocket import Silence, WebSocket, open_websocket
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import ProjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTarget:
    """Where a project's commands run."""

    pod: str
    container: str


class PodExecs:
    """Opens execs. The pod of a project is looked up anew for each."""

    def __init__(
        self,
        api: ApiServer,
        target_of: Callable[[ProjectId], PodTarget | None],
        *,
        subprotocols: Sequence[str],
        silence: Silence | None = None,
    ) -> None:
        """`subprotocols` in order of preference."""
        self._api = api
        self._target_of = target_of
        self._subprotocols = subprotocols
        self._silence = silence

    @asynccontextmanager
    async def open(self, project: ProjectId, argv: Sequence[str]) -> AsyncIterator[WebSocket]:
        """Start it with stdin and stdout; stderr is not asked for.

        Errors (on entry): NOT_FOUND for a project without a pod, and what `open_websocket` says.
        """
        target = self._target_of(project)
        if target is None:
            raise RdevError(ErrorCode.NOT_FOUND, "project has no pod")
        params = [
            ("container", target.container),
            ("stdin", "true"),
            ("stdout", "true"),
            ("stderr", "false"),
            *(("command", word) for word in argv),
        ]
        path = f"/api/v1/namespaces/{self._api.namespace}/pods/{target.pod}/exec"
        async with open_websocket(
            self._api.http,
            path,
            params=params,
            subprotocols=self._subprotocols,
            silence=self._silence,
        ) as socket:
            yield socket
