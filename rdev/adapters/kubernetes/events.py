"""The events of a watch: one object a line, as they come. A line is at most `_LINE_BYTES`."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final

import httpx2
import msgspec
import trio

from rdev.adapters.kubernetes.errors import refusal
from rdev.adapters.kubernetes.objects import PodEvent
from rdev.domain.errors import ErrorCode, RdevError

EXPIRED: Final = 410
_LINE_BYTES: Final = 4 * 2**20  # etcd holds objects of 1.5 MiB
_REST_S: Final = 0.5  # for the end of a watch that is over


@asynccontextmanager
async def lines_of(response: httpx2.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The lines of a watch. httpx2 leaves its generators open where one stops in the middle: what
    is left is read, which is nothing after an error, or cancelled, which closes them."""
    async with aclosing(_lines(response)) as lines:
        try:
            yield lines
        finally:
            with trio.move_on_after(_REST_S):
                async for _ in lines:  # noqa: ASYNC102  # a generator that was cancelled is at its end
                    pass
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102  # as above


async def _lines(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The lines of a watch as they come; of one that is too long, its beginning."""
    begun: list[bytes] = []  # of a line whose end has not come
    size = 0
    async with aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            *ends, rest = piece.split(b"\n")
            for end in ends:
                line = b"".join((*begun, end))
                begun, size = [], 0
                if line:
                    yield line
            begun.append(rest)
            size += len(rest)
            if size > _LINE_BYTES:
                yield b"".join(begun)
                begun, size = [], 0


def read_event(line: bytes) -> PodEvent:
    """Errors: RdevError for more than any object is; one of `UNREADABLE` for what is none."""
    if len(line) > _LINE_BYTES:
        message = f"a line of the watch of pods is longer than {_LINE_BYTES} bytes"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
    return msgspec.json.decode(line, type=PodEvent)


def check_expired(event: PodEvent) -> None:
    """Errors: RdevError for what is not just a version that is too old."""
    if event.object.code != EXPIRED:
        body = msgspec.json.encode({"message": event.object.message})
        raise refusal(event.object.code or 500, body)
