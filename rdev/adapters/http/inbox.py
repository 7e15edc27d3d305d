"""What a request hears from its client: pieces of its body, and that the client has gone.

Hypercorn puts both into one queue of ten, and waits while it is full. An answer ends with "gone":
where a plain route does not read its body, the queue was full, and the end of the answer waited in
it for ever, shielded, also at a stop. Tests: tests/adapters/http/test_plain.py. No issue upstream
known.
"""

from contextlib import suppress

import trio
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, HTTPScope

# Where a request finds its inbox.
_EXTENSION = "rdev.inbox"


class Inbox:
    """The queue of one request. Its bound is hypercorn's (`max_app_queue_size`)."""

    __slots__ = ("_channel", "_has_left", "_queue")

    def __init__(self, channel: trio.MemorySendChannel[ASGIReceiveEvent]) -> None:
        """`channel` is where hypercorn's protocol puts what comes."""
        self._channel = channel
        self._queue: trio.MemoryReceiveChannel[ASGIReceiveEvent] | None = None
        self._has_left = False

    async def put(self, message: ASGIReceiveEvent) -> None:
        """For hypercorn. A piece waits until there is room; that the client has gone never does.
        What comes when nobody reads any more is dropped."""
        with suppress(trio.BrokenResourceError):
            if message["type"] != "http.disconnect":
                await self._channel.send(message)
                return
            try:
                self._channel.send_nowait(message)
            except trio.WouldBlock:
                self._has_left = True  # who receives takes what is in the queue first

    def read_from(self, queue: trio.MemoryReceiveChannel[ASGIReceiveEvent]) -> None:
        """The other end of the channel."""
        self._queue = queue

    async def receive(self) -> ASGIReceiveEvent:
        """For the app: the next message."""
        assert self._queue is not None
        if not self._has_left:
            return await self._queue.receive()
        await trio.lowlevel.checkpoint()
        try:
            return self._queue.receive_nowait()
        except trio.WouldBlock:
            return {"type": "http.disconnect"}

    def close(self) -> None:
        """The app is over; whoever waits with a piece goes on."""
        if self._queue is not None:
            self._queue.close()


def give_inbox(stream: HTTPStream | WSStream | None) -> None:
    """Put one between hypercorn's stream, which was just made, and its app."""
    channel = getattr(getattr(stream, "app_put", None), "__self__", None)
    if isinstance(stream, HTTPStream) and isinstance(channel, trio.MemorySendChannel):
        inbox = Inbox(channel)
        stream.app_put = inbox.put
        stream.scope["extensions"][_EXTENSION] = {"inbox": inbox}


def inbox_of(scope: HTTPScope, receive: ASGIReceiveCallable) -> Inbox | None:
    """The request's; `receive` is hypercorn's own."""
    inbox = scope["extensions"].get(_EXTENSION, {}).get("inbox")
    queue = getattr(receive, "__self__", None)
    if not isinstance(inbox, Inbox) or not isinstance(queue, trio.MemoryReceiveChannel):
        return None
    inbox.read_from(queue)
    return inbox
