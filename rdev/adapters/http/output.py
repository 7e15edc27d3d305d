"""The stored output of a command as bytes, as NDJSON, and as the short tails of `?wait`."""

from collections.abc import AsyncGenerator

from rdev.domain.commands import Command
from rdev.domain.lines import decode
from rdev.domain.sse import EventName, split_events
from rdev.domain.stream import Chunk, Source
from rdev.services.commands import Commands

TAIL_BYTES = 16_384
_SHOWN = frozenset({EventName.OUTPUT, EventName.GAP})


async def output_bytes(
    commands: Commands, command: Command, source: Source, *, tail_bytes: int | None
) -> AsyncGenerator[bytes, None]:
    """The exact bytes that the present attempt wrote to one stream, as far as they are stored now,
    or the last `tail_bytes` of them."""
    if tail_bytes is not None:
        yield await _tail(commands, command, source, tail_bytes=tail_bytes)
        return
    after = command.attempt_seq
    while chunks := await commands.read_log(command.id, after=after):
        after = chunks[-1].last_seq
        # Another attempt may have begun since; what it writes is not this one's.
        own = [chunk for chunk in chunks if chunk.first_seq <= command.last_seq]
        yield b"".join(_raw(chunk) for chunk in own if chunk.source is source)
        if after >= command.last_seq:
            return


async def output_lines(commands: Commands, command: Command) -> AsyncGenerator[bytes, None]:
    """The output events and gaps of both streams, of all attempts, one JSON object a line."""
    after = 0
    while chunks := await commands.read_log(command.id, after=after):
        after = chunks[-1].last_seq
        yield b"".join(_lines(chunk) for chunk in chunks if chunk.source is not Source.LIFE)
        if after >= command.last_seq:
            return


async def tail_text(commands: Commands, command: Command, source: Source) -> str:
    """The last 16 KiB as text; what is not UTF-8 is replaced."""
    raw = await _tail(commands, command, source, tail_bytes=TAIL_BYTES)
    return raw.decode(errors="replace")


async def _tail(commands: Commands, command: Command, source: Source, *, tail_bytes: int) -> bytes:
    chunks = await commands.tail(command.id, source, tail_bytes=tail_bytes)
    return b"".join(_raw(chunk) for chunk in chunks)[-tail_bytes:]


def _raw(chunk: Chunk) -> bytes:
    """The journal's bytes that a chunk stands for; a gap stands for none any more."""
    return b"" if chunk.is_gap else decode(chunk.payload)


def _lines(chunk: Chunk) -> bytes:
    events = split_events(chunk.payload, chunk.first_seq, chunk.last_seq)
    return b"".join(
        b'{"seq":%d,"event":"%b","data":%b}\n' % (seq, name.encode(), data)
        for seq, name, data in events
        if name in _SHOWN
    )
