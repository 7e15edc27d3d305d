"""sse-starlette on uvicorn, as its own documentation uses it; run by an interpreter of its own.

Speaks as `bench.fanout_server`: a JSON line with the plan in, its port out; at the next line it
publishes, burst after burst, and tells what that cost.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

import uvicorn
import uvloop
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

LINE = "x" * 60


class Reader:
    """What one client has not been sent."""

    def __init__(self) -> None:
        self.waiting: deque[dict[str, str]] = deque()
        self.news: asyncio.Future[None] | None = None

    def push(self, event: dict[str, str]) -> None:
        self.waiting.append(event)
        if self.news is not None and not self.news.done():
            self.news.set_result(None)

    async def events(self) -> AsyncIterator[dict[str, str]]:
        while True:
            while self.waiting:
                yield self.waiting.popleft()
            self.news = asyncio.get_running_loop().create_future()
            await self.news


READERS: list[Reader] = []


async def stream(request: Request) -> EventSourceResponse:
    reader = Reader()
    READERS.append(reader)
    return EventSourceResponse(reader.events())


async def serve(plan: dict[str, int]) -> None:
    app = Starlette(routes=[Route("/", stream)])
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http="httptools",
        log_level="error",
        access_log=False,
        backlog=2048,
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(json.dumps({"port": server.servers[0].sockets[0].getsockname()[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    while len(READERS) < plan["clients"]:
        await asyncio.sleep(0.01)
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    for first in range(0, plan["events"], plan["burst"]):
        for number in range(first, min(plan["events"], first + plan["burst"])):
            data = f'{{"stream":"stdout","line":"{number} {LINE}"}}'
            for reader in READERS:
                reader.push({"id": str(number), "event": "output", "data": data})
        await asyncio.sleep(0)
        while any(reader.waiting for reader in READERS):
            await asyncio.sleep(0)
    told = {
        "took_s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - cpu_began_s,
    }
    print(json.dumps(told), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    server.should_exit = server.force_exit = True
    await running


uvloop.run(serve(json.loads(sys.stdin.readline())))
