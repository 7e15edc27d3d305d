"""What a command writes in these tests, and what a client must have seen of it."""

import statistics
from pathlib import Path

import httpx2

from tests.app.server import Json, Server, until

# The bound for a line on its way to a client behind a proxy.
LINE_MS = 200.0


class Command:
    """A command that numbers its lines until it is told to end."""

    def __init__(self, server: Server, folder: Path, *, every_s: float = 0.02) -> None:
        self.server = server
        self.gate = folder / "gate"
        self.gate.unlink(missing_ok=True)
        self._ask("POST", "/projects", {"id": "demo"})
        # The stamp is the machine's clock in ms, which the clients read too.
        script = (
            f"n=0; until [ -e {self.gate} ]; do n=$((n+1)); echo $n $(date +%s%3N);"
            f" sleep {every_s}; done"
        )
        self.id = str(self._ask("POST", "/projects/demo/shell", {"command": script})["id"])

    @property
    def path(self) -> str:
        """Of its stream."""
        return f"/commands/{self.id}/events"

    def token(self) -> str:
        """The path of its stream with a token."""
        return str(self._ask("POST", "/stream-tokens", {"stream_id": self.id})["url"])

    def end(self) -> None:
        """Let it end, and wait until that is known."""
        self.gate.touch()
        until(lambda: self.shown()["status"] == "succeeded", "the command ends", self.server)

    def shown(self) -> Json:
        return self._ask("GET", f"/commands/{self.id}")

    def lines(self) -> list[str]:
        """All that it wrote, from the store."""
        headers = {"X-API-Key": self.server.key}
        url = f"{self.server.url}/commands/{self.id}/output?stream=stdout"
        return httpx2.get(url, headers=headers, trust_env=False).text.splitlines()

    def _ask(self, method: str, path: str, body: Json | None = None) -> Json:
        headers = {"X-API-Key": self.server.key}
        url = self.server.url + path
        answer = httpx2.request(method, url, json=body, headers=headers, trust_env=False)
        assert answer.status_code < 300, answer.text
        data: Json = answer.json()["data"]
        return data


def check_each_once(command: Command, ids: list[int], lines: list[str]) -> None:
    """Every event of an ended command was seen, in order, and none of them twice."""
    shown = command.lines()
    assert lines == shown, f"{len(lines)} lines seen of {len(shown)}"
    # Two at the beginning (queued, running), two at the end (succeeded, complete).
    assert ids == list(range(1, len(shown) + 5))


def say_delays(name: str, delays_ms: list[float]) -> None:
    """Print how long lines were on their way, and hold it against the bound."""
    ordered = sorted(delays_ms)
    p99 = ordered[min(len(ordered) - 1, round(len(ordered) * 0.99))]
    median = statistics.median(ordered)
    print(f"\n{name}: {len(ordered)} lines, median {median:.0f} ms, p99 {p99:.0f} ms", end="")
    assert median <= LINE_MS / 2
    assert p99 <= LINE_MS
