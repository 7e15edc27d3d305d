"""HTTP/2 on one connection: hypercorn's protocol, with the ends and the bounds it lacks.

Every guard here answers something seen in hypercorn 0.18; each has a test in
tests/adapters/http/test_frames.py or tests/faults/test_abuse_h2.py:

* An answer that waits for a window waited for ever when its stream was reset or its connection
  closed, and held its place among the requests in work: 500 resets stopped the server for all.
* Frames that cost the server more than the client (CVE-2019-9512, -9515, -9518, CVE-2023-44487)
  were taken without end. Bounds: `_BURST` of them at once, `_PER_S` each second.
* Data for a stream that was answered already, a priority that makes a ring, a method that is no
  ASCII: each raised an error of the program's, and a trace in the log.

Priorities are not heeded at all (RFC 9113, section 5.3.2 lets a server leave them).
"""

from collections.abc import Sequence

import h2.events
import hypercorn.protocol
import trio
from h2.errors import ErrorCodes
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h2 import H2Protocol

from rdev.adapters.http.inbox import give_inbox

# Frames beyond what requests need. A browser that leaves a page resets some tens of streams.
_BURST = 300
_PER_S = 100.0
# Read in one turn of the event loop: a ping has 17 bytes, and 64 KiB of them took a tenth of a
# second from everybody else.
_SLICE_BYTES = 4_096
# A piece of a body that is smaller than this costs as much as a frame without any.
_SMALL_BYTES = 64


class GuardedH2(H2Protocol):
    """Hypercorn's protocol with the guards."""

    _left = float(_BURST)
    _counted_at_s = 0.0

    async def handle(self, event: Event) -> None:
        """What the connection brings. At its end nobody waits for a window any more."""
        if isinstance(event, RawData):
            for start in range(0, len(event.data), _SLICE_BYTES):
                if not self.closed:
                    await super().handle(RawData(event.data[start : start + _SLICE_BYTES]))
                    await trio.lowlevel.checkpoint()
            return
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in tuple(self.stream_buffers.values()):
                await buffer.close()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        if not self._may_send(events):
            self.connection.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            await self._flush()
            await self.send(Closed())
            return
        for event in events:
            if isinstance(event, h2.events.PriorityUpdated):
                continue
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # Of a request that has its answer; the connection's window is given back.
                length = event.flow_controlled_length or 0
                self.connection.acknowledge_received_data(length, event.stream_id)
            elif isinstance(event, h2.events.RequestReceived) and not _is_readable(event):
                self.connection.reset_stream(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            else:
                await super()._handle_events([event])
        await self._flush()

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        await super()._create_stream(request)
        if request.stream_id is not None:
            give_inbox(self.streams.get(request.stream_id))

    async def _close_stream(self, stream_id: int) -> None:
        await super()._close_stream(stream_id)
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            await buffer.close()

    def _may_send(self, events: Sequence[h2.events.Event]) -> bool:
        """Whether there were not too many frames of the costly kinds."""
        now_s = trio.current_time()
        refilled = self._left + (now_s - self._counted_at_s) * _PER_S
        self._left = min(_BURST, refilled) - sum(map(_is_costly, events))
        self._counted_at_s = now_s
        return self._left >= 0


def _is_costly(event: h2.events.Event) -> bool:
    match event:
        case h2.events.DataReceived():
            return len(event.data or b"") < _SMALL_BYTES and event.stream_ended is None
        case (
            h2.events.PingReceived()
            | h2.events.RemoteSettingsChanged()
            | h2.events.PriorityUpdated()
            | h2.events.StreamReset()
        ):
            return True
        case _:
            return False


def _is_readable(request: h2.events.RequestReceived) -> bool:
    """Whether it has a path and a method that can be told. (There are no tunnels here.)"""
    fields = {name: value for name, value in request.headers or () if name.startswith(b":")}
    method, path = fields.get(b":method", b""), fields.get(b":path", b"")
    return bool(path) and path.isascii() and method.isascii() and method.upper() != b"CONNECT"


# Hypercorn makes its protocols by this name, and asks nobody which.
hypercorn.protocol.H2Protocol = GuardedH2  # type: ignore[attr-defined]
