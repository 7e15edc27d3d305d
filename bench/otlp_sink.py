"""A collector that takes everything and keeps nothing: `python -m bench.otlp_sink ADDRESS_FILE`.

As little as HTTP/1.1 needs, so that it costs less than the exporter it serves.
"""

import re
import sys
from functools import partial
from pathlib import Path

import trio

RECEIVE_BYTES = 1 << 18
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


async def _serve(stream: trio.SocketStream) -> None:
    data = b""
    async for piece in stream:
        data += piece
        while (end := data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(data, 0, end)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(data) < whole:
                break
            data = data[whole:]
            await stream.send_all(ANSWER)


async def _main(address: Path) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    fresh = address.with_suffix(".new")
    fresh.write_text(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}\n")
    fresh.rename(address)
    await trio.serve_listeners(_serve, listeners)


if __name__ == "__main__":
    trio.run(partial(_main, Path(sys.argv[1])))
