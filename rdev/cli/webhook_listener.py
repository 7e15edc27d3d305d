"""A receiver of webhooks for people who write theirs: verifies signatures and prints events.

Bounds: `BODY_BYTES_MAX` for a body, `HEAD_BYTES_MAX` for a head, `SILENCE_S` without a byte. What
is not verified is answered 400 and told on stderr; what came before is marked.
"""

import time
from collections.abc import Sequence

import click
import h11
import msgspec
import trio

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.signing import Verifier, verify

BODY_BYTES_MAX = 262_144
HEAD_BYTES_MAX = 65_536
SILENCE_S = 120.0


async def listen(host: str, port: int, verifiers: Sequence[Verifier], *, as_json: bool) -> None:
    """Receive until it is cancelled. Errors: CONFLICT where it cannot listen."""
    receiver = _Receiver(verifiers, as_json=as_json)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        message = f"cannot listen at {host}:{port}: {error.strerror}"
        raise RdevError(ErrorCode.CONFLICT, message) from error
    bound = listeners[0].socket.getsockname()
    click.echo(f"listening at http://{host}:{bound[1]}/", err=True)
    await trio.serve_listeners(receiver.handle, listeners)


class _Receiver:
    """What was seen, and what verifies."""

    def __init__(self, verifiers: Sequence[Verifier], *, as_json: bool) -> None:
        self._verifiers = verifiers
        self._as_json = as_json
        self._seen: set[str] = set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """One connection, kept alive as long as the sender likes."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        try:
            while (request := await _receive(stream, http)) is not None:
                headers, body = request
                await _answer(stream, http, self._heed(headers, body))
                if http.our_state is h11.MUST_CLOSE:
                    return
                http.start_next_cycle()
        except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError) as error:
            click.echo(f"a connection ended: {error}", err=True)

    def _heed(self, headers: dict[str, str], body: bytes) -> int:
        """Print it, and say with which status it is answered."""
        try:
            now_s = time.time()  # noqa: TID251  (the edge of a program of its own)
            event_id = verify(headers, body, self._verifiers, now_s=now_s)
            event = msgspec.json.decode(body, type=dict[str, object])
        except RdevError as error:
            click.echo(f"refused: {error.message}", err=True)
            return 400
        except msgspec.DecodeError as error:
            click.echo(f"refused: signed, but no JSON object ({error})", err=True)
            return 400
        is_again = event_id in self._seen
        self._seen.add(event_id)
        if self._as_json:
            shown = {"webhook_id": event_id, "again": is_again, "event": event}
            click.echo(msgspec.json.encode(shown).decode())
        else:
            again = "  (again)" if is_again else ""
            data = msgspec.json.encode(event.get("data")).decode()
            click.echo(f"{event.get('timestamp')}  {event.get('type')}  {event_id}{again}  {data}")
        return 200


async def _receive(
    stream: trio.SocketStream, http: h11.Connection
) -> tuple[dict[str, str], bytes] | None:
    """The next request; None when the sender is done. Errors: h11.RemoteProtocolError for what is
    no HTTP or too long."""
    headers: dict[str, str] = {}
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            with trio.fail_after(SILENCE_S):
                http.receive_data(await stream.receive_some(65_536))
        elif isinstance(event, h11.Request):
            headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers
            }
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_BYTES_MAX:
                raise h11.RemoteProtocolError(f"a body of more than {BODY_BYTES_MAX} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return headers, body
        else:
            return None


async def _answer(stream: trio.SocketStream, http: h11.Connection, status: int) -> None:
    for sent in (
        h11.Response(status_code=status, headers=[("content-length", "0")]),
        h11.EndOfMessage(),
    ):
        await stream.send_all(http.send(sent) or b"")
