"""curl as a client of a stream: real TLS, real HTTP/2, every line with the time it came."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from tests.app.server import DEADLINE_S, until

# What curl ends with when the connection ends before the answer is whole, or without one.
CUT = {18, 52, 56, 92}


@dataclass(slots=True)
class Stream:
    """What one curl has received."""

    process: subprocess.Popen[bytes]
    ids: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    delays_ms: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    # The version and the status that curl told of, after its end.
    said: str = ""

    def wait(self) -> int:
        """curl's exit status."""
        status = self.process.wait(DEADLINE_S)
        assert self.process.stderr is not None
        self.said += self.process.stderr.read().decode()
        return status

    def until_lines(self, count: int) -> None:
        until(lambda: len(self.lines) >= count, f"curl has seen {count} lines")

    def read(self) -> None:
        """Take down what comes, to its end."""
        assert self.process.stdout is not None
        name = ""
        for raw in self.process.stdout:
            text = raw.decode().rstrip("\n")
            kind, _, value = text.partition(": ")
            if kind == "event":
                name = value
                self.names.append(name)
            elif kind == "id":
                self.ids.append(int(value))
            elif kind == "data" and name == "output":
                line = json.loads(value)["line"]
                self.lines.append(line)
                self.delays_ms.append(time.time() * 1000 - float(line.split()[1]))


@contextmanager
def stream(
    url: str, key: str, authority: Path, *, protocol: str, after: int = 0
) -> Iterator[Stream]:
    """Follow a stream. `protocol`: `--http1.1` or `--http2`, which must then be what is spoken."""
    argv = ["curl", "--silent", "--show-error", "--no-buffer", protocol]
    argv += ["--cacert", str(authority), "--header", f"X-API-Key: {key}"]
    argv += ["--header", f"Last-Event-ID: {after}"] if after else []
    argv += ["--write-out", r"%{stderr}version %{http_version} status %{http_code}", url]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = Stream(process)
    reader = Thread(target=seen.read)
    reader.start()
    try:
        yield seen
    finally:
        process.terminate()
        process.wait()
        reader.join(DEADLINE_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
