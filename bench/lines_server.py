"""`rdev serve` whose commands are all one program: what 50 shells would take is not measured.

`python -m bench.lines_server serve`: an attach is a connection to the socket that BENCH_WRITER
names, where `bench.line_writer` speaks the attach protocol. Everything else is the product's own.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

import rdev.adapters.execution.local
from rdev.adapters.execution.local import LocalTransport
from rdev.adapters.execution.transport import Streams
from rdev.cli import main
from rdev.domain.ids import ProjectId

WRITER = os.environ.pop("BENCH_WRITER")


class OneProgram(LocalTransport):
    """Attaches go to the writer; the verbs that make and remove folders are done."""

    @asynccontextmanager
    async def run(self, project: ProjectId, argv: Sequence[str]) -> AsyncIterator[Streams]:
        """See `Transport.run`."""
        if "attach" in argv:
            async with await trio.open_unix_socket(WRITER) as stream:
                yield Streams(stream, stream)
        else:
            async with super().run(project, argv) as streams:
                yield streams


if __name__ == "__main__":
    rdev.adapters.execution.local.LocalTransport = OneProgram  # type: ignore[misc]
    main()
