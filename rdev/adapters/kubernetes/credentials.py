"""Who rdev is to the API server: a token, a token file that is rotated, or a credential plugin.

lightkube's own plugins need asyncio and speak no v1; here they run under trio, one at a time.
Source: client-go credential plugins, `client.authentication.k8s.io`.
"""

import base64
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import httpx2
import msgspec
import trio
from lightkube.config.models import User

from rdev.adapters.kubernetes.errors import UNREADABLE, unreachable
from rdev.domain.errors import RdevError

PLUGIN_S: Final = 60.0  # a plugin that asks somebody over the network, or a person
_PLUGIN_BYTES: Final = 1 << 20  # of its answer
_EARLY_S: Final = 60.0  # a credential is renewed so long before it ends
_TOKEN: Final = re.compile(r"[!-~]+")
_PLUGIN_VERSIONS: Final = frozenset(
    f"client.authentication.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1")
)


def _bearer(token: str, whose: str) -> str:
    """The header of a token, without the line break that a file or a shell put behind it.

    Errors: SERVICE_UNAVAILABLE for what no header can hold, here and without a word of it: who
    sends it would tell it in its error.
    """
    bare = token.strip()
    if _TOKEN.fullmatch(bare) is None:
        raise unreachable(f"{whose} is no token: it is empty, or more than one word of ASCII")
    return f"Bearer {bare}"


class Credentials(Protocol):
    """Makes the Authorization header."""

    async def header(self) -> str | None:
        """Its value now, or None for none. Errors: SERVICE_UNAVAILABLE."""
        ...

    def forget(self, refused: str | None) -> bool:
        """The server refused this one: whether another try may give a better one."""
        ...

    async def aclose(self) -> None:
        """Nobody asks any more."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same header for ever."""

    value: str | None

    async def header(self) -> str | None:
        """See `Credentials.header`."""
        return self.value

    def forget(self, refused: str | None) -> bool:
        """Never a better one."""
        return False

    async def aclose(self) -> None:
        """See `Credentials.aclose`."""
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A service account's token, read for each request: the kubelet rotates it within the hour."""

    path: str

    async def header(self) -> str | None:
        """See `Credentials.header`. Blocks: on one read of a file in memory."""
        try:
            # In a pod the file is in a tmpfs: a thread would cost more than the read.
            text = Path(self.path).read_text("ascii")  # noqa: ASYNC240
        except (OSError, UnicodeDecodeError) as error:
            raise unreachable(f"no token: {error}") from error
        return _bearer(text, self.path)

    def forget(self, refused: str | None) -> bool:
        """It may have been rotated between the read and the answer."""
        return True

    async def aclose(self) -> None:
        """See `Credentials.aclose`."""
        await trio.lowlevel.checkpoint()


class _PluginStatus(msgspec.Struct):
    token: str | None = None
    expirationTimestamp: datetime | None = None  # noqa: N815  (the API's name)


class _PluginAnswer(msgspec.Struct):
    status: _PluginStatus


@dataclass(slots=True, kw_only=True)
class _Run:
    """A plugin that runs, and what it has said so far: of one that says too much the beginning.
    Its stderr is the operator's to read, in our log. It is the business of no single request:
    whoever needs its answer reads on where the one before stopped."""

    process: trio.Process
    ends_at_s: float
    said: bytearray = field(default_factory=bytearray)

    async def finish(self) -> None:
        """Read to its end. Cancellation: it goes on."""
        assert self.process.stdout is not None
        while len(self.said) <= _PLUGIN_BYTES:
            if not (piece := await self.process.stdout.receive_some()):
                await self.process.wait()
                break
            self.said += piece

    async def end(self) -> None:
        """Kill it where it still runs."""
        assert self.process.stdout is not None
        self.process.kill()
        # shielded: killed, it ends at once, and its end must be taken
        with trio.CancelScope(shield=True):
            await self.process.wait()
            await self.process.stdout.aclose()


@dataclass(slots=True)
class Plugin:
    """A program that prints a token. `now` gives the wall clock, which expiry is written in."""

    argv: Sequence[str]
    env: Mapping[str, str]
    api_version: str
    now: Callable[[], datetime]
    _value: str | None = None
    _until: float = -math.inf  # seconds since 1970
    _ended: int = 0  # how often it was asked, and how it failed the last time
    _failure: RdevError | None = None
    _run: _Run | None = None
    _one_at_a_time: trio.Lock = field(default_factory=trio.Lock)

    async def header(self) -> str | None:
        """See `Credentials.header`. Blocks: while the plugin runs, at most a minute; whoever waits
        for another one's try has its failure too, or the last of them would wait for all.
        Cancellation: the plugin goes on, for who asks next."""
        ended = self._ended
        async with self._one_at_a_time:
            if self._value is None or self.now().timestamp() >= self._until:
                if self._failure is not None and self._ended != ended:
                    raise RdevError(self._failure.code, self._failure.message)
                await self._renew()
            return self._value

    async def _renew(self) -> None:
        try:
            status = await self._ask()
            header = _bearer(status.token or "", "what the credential plugin gives")
        except RdevError as error:
            self._failure, self._ended = error, self._ended + 1
            raise
        # Who was cancelled meanwhile has said nothing of the plugin: that does not count.
        self._failure, self._ended = None, self._ended + 1
        ends = status.expirationTimestamp
        self._value = header
        self._until = math.inf if ends is None else ends.timestamp() - _EARLY_S

    def forget(self, refused: str | None) -> bool:
        """Ask the plugin again, unless somebody has since that one was given."""
        if self._value == refused:
            self._value = None
        return True

    async def aclose(self) -> None:
        """End the plugin, if it runs."""
        run, self._run = self._run, None
        if run is not None:
            await run.end()
        await trio.lowlevel.checkpoint()

    async def _ask(self) -> _PluginStatus:
        run = await self._begin()
        with trio.move_on_at(run.ends_at_s) as patience:
            await run.finish()
        # Here comes whose wait is over, not who was cancelled.
        self._run = None
        await run.end()
        if patience.cancelled_caught:
            raise unreachable("the credential plugin does not end")
        if len(run.said) > _PLUGIN_BYTES:
            raise unreachable(f"the credential plugin says more than {_PLUGIN_BYTES} bytes")
        if run.process.returncode != 0:
            raise unreachable(f"the credential plugin ended with {run.process.returncode}")
        return _read_status(bytes(run.said))

    async def _begin(self) -> _Run:
        """The one that runs, unless it was left alone for so long that its answer is old."""
        left, self._run = self._run, None
        if left is not None and trio.current_time() < left.ends_at_s:
            self._run = left
            return left
        if left is not None:
            await left.end()
        info = {
            "apiVersion": self.api_version,
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        told = {"KUBERNETES_EXEC_INFO": msgspec.json.encode(info).decode()}
        try:
            process = await trio.lowlevel.open_process(
                list(self.argv),
                env={**os.environ, **self.env, **told},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
        except OSError as error:
            raise unreachable(f"credential plugin: {error.strerror}") from error
        self._run = _Run(process=process, ends_at_s=trio.current_time() + PLUGIN_S)
        return self._run


def _read_status(said: bytes) -> _PluginStatus:
    try:
        status = msgspec.json.decode(said, type=_PluginAnswer).status
    except UNREADABLE as error:
        raise unreachable("the credential plugin's answer is not understood") from error
    if not status.token:
        raise unreachable("the credential plugin gives no token (certificates are not taken)")
    return status


def _utc_now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  (the `now` of whoever gives none)


def credentials_of(user: User | None, now: Callable[[], datetime] = _utc_now) -> Credentials:
    """What a kubeconfig's user is known by; client certificates are the TLS context's.

    Errors: SERVICE_UNAVAILABLE for what is not supported.
    """
    if user is None:
        return Fixed(None)
    if user.token_file is not None:
        return TokenFile(user.token_file)
    if user.token is not None:
        return Fixed(_bearer(user.token, "the kubeconfig's token"))
    if user.exec is not None:
        if user.exec.apiVersion not in _PLUGIN_VERSIONS:
            raise unreachable(f"credential plugins of {user.exec.apiVersion} are not supported")
        env = {one.name: one.value for one in user.exec.env or ()}
        argv = (user.exec.command, *(user.exec.args or ()))
        return Plugin(argv=argv, env=env, api_version=user.exec.apiVersion, now=now)
    if user.username is not None and user.password is not None:
        pair = f"{user.username}:{user.password}".encode()
        return Fixed(f"Basic {base64.b64encode(pair).decode('ascii')}")
    if user.auth_provider is not None:
        raise unreachable("auth-provider is not supported: use a credential plugin")
    return Fixed(None)


class AuthorizedTransport(httpx2.AsyncBaseTransport):
    """A transport that says who we are, and asks again once where that was refused."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, credentials: Credentials) -> None:
        """Takes `inner` over: closing this closes it."""
        self._inner = inner
        self._credentials = credentials

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it. Errors: httpx2's, and SERVICE_UNAVAILABLE where we have no credential."""
        response = await self._send(request)
        refused = request.headers.get("Authorization")
        if response.status_code == 401 and self._credentials.forget(refused):
            await response.aclose()
            response = await self._send(request)
        return response

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        value = await self._credentials.header()
        if value is not None:
            request.headers["Authorization"] = value
        try:
            return await self._inner.handle_async_request(request)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
            # A connection that was kept may have been closed by the server meanwhile. To ask twice
            # harms nothing: a read, or an exec of a script that may run twice.
            if request.method != "GET":
                raise
            return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections, and end a plugin that runs."""
        try:
            await self._inner.aclose()
        finally:
            await self._credentials.aclose()
