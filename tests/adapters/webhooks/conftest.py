"""Receivers on loopback, senders that may reach them, and the published JavaScript library.

The library is installed once into pytest's cache, by its own lock.
"""

import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme

from rdev.adapters.webhooks.dialling import tls_context
from rdev.adapters.webhooks.sender import HttpWebhookSender
from rdev.domain.sending import OutgoingRequest
from rdev.domain.signing import Secret, sign
from rdev.domain.webhook_targets import TargetRules, parse_networks, parse_target

JUDGE = Path(__file__).parent / "judge"
INSTALL_DEADLINE_S = 100


@pytest.fixture(scope="session")
def node_folder(pytestconfig: pytest.Config) -> Path:
    """A folder whose node programs can import `standardwebhooks`; skips where it cannot be made."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no node with npm")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("webhook-judge")
    for source in JUDGE.iterdir():
        shutil.copy(source, folder)
    lock = (JUDGE / "package-lock.json").read_text()
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != lock:
        argv = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(
                argv, cwd=folder, check=True, capture_output=True, timeout=INSTALL_DEADLINE_S
            )
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
            pytest.skip(f"npm cannot install standardwebhooks: {said.strip()[-300:] or error}")
        installed.write_text(lock)
    return folder


@dataclass
class Receiver:
    """A TCP server on loopback that does as its script says; tells who came and what they sent."""

    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)
    # Bytes that the kernel took for answers without end.
    sent_bytes: int = 0

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def read_request(self, stream: trio.abc.Stream) -> bytes:
        """One whole request; empty when the client is gone."""
        data = b""
        while True:
            head, blank, body = data.partition(b"\r\n\r\n")
            if blank:
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                if len(body) >= length:
                    self.requests.append(data)
                    return data
            if not (more := await stream.receive_some(65_536)):
                return b""
            data += more

    async def send_without_end(self, stream: trio.abc.Stream, piece: bytes) -> None:
        while True:
            await stream.send_all(piece)
            self.sent_bytes += len(piece)


Script = Callable[[Receiver, trio.SocketStream], Awaitable[None]]


@pytest.fixture
def receive(nursery: trio.Nursery) -> Callable[..., Awaitable[Receiver]]:
    """Starts receivers: `await receive(script)`, or of the bytes they answer each request with."""

    async def start(script: Script | bytes, host: str = "127.0.0.1") -> Receiver:
        receiver = Receiver()

        async def handle(stream: trio.SocketStream) -> None:
            receiver.connections += 1
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with stream:
                    if isinstance(script, bytes):
                        while await receiver.read_request(stream):
                            await stream.send_all(script)
                    else:
                        await script(receiver, stream)
            receiver.ended.set()

        serve = partial(trio.serve_tcp, handle, 0, host=host)
        (listener,) = await nursery.start(serve)
        receiver.port = listener.socket.getsockname()[1]
        return receiver

    return start


def loopback_rules() -> TargetRules:
    return TargetRules(allow_nets=parse_networks("127.0.0.0/8,::1"))


@pytest.fixture
async def sender_of() -> AsyncIterator[Callable[..., HttpWebhookSender]]:
    """Makes senders that may reach loopback, trust the test's authority, and wait long."""
    made = []

    def make(**options: object) -> HttpWebhookSender:
        given = {"rules": loopback_rules(), "tls": tls_context(), "total_s": 60, "connect_s": 60}
        made.append(HttpWebhookSender(**(given | options)))
        return made[-1]

    yield make
    for sender in made:
        sender.close()


@pytest.fixture
def outgoing() -> Callable[..., OutgoingRequest]:
    """Makes signed requests of a URL."""

    def make(url: str, body: bytes = b'{"type":"ping"}') -> OutgoingRequest:
        headers = sign("evt_0190", 1_614_265_330, body, [Secret(key=bytes(32))])
        return OutgoingRequest(target=parse_target(url), headers=headers, body=body)

    return make


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()
